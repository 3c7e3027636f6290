"""What lines of data files call their splits."""

from __future__ import annotations

TRAIN, VALID, TEST = "train", "valid", "test"
HELD_OUT = (VALID, TEST)
"""Splits that nothing is made of, since an evaluation may judge by them."""
OTHER_WORDS = {"validation": VALID, "val": VALID, "dev": VALID, "eval": VALID, "training": TRAIN}
"""Other words for a split → ours."""


def split_name(word: str) -> str:
    """The split that a line means, in lower case; our own word where another one is known for it."""
    name = word.strip().lower()
    return OTHER_WORDS.get(name, name)
