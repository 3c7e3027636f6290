"""A trained gate with one expert more or less, without training it again."""
