"""Recipes as written, and loadouts: a recipe with everything it names found, read and pinned."""
