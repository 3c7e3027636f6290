"""Trains the embedded demo: a small adventurer, and the three classes that act in the same scenes."""
