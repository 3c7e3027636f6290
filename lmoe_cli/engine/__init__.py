"""Base, bank and router together: token ids in, token ids out."""
