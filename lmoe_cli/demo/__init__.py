"""The embedded demo: an adventurer and three classes, as package data."""
