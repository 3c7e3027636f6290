"""What of a file is learned from, and what is kept to judge by.

In this order: another file, the line's own ``split``, or a fraction of the lines that say nothing. Which lines that
fraction takes depends on what they say and a seed alone, so neither their order nor where reading began matters, and
the same text twice is never on both sides.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lmoe_cli.data.records import Record, read_records
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.split_names import TRAIN, VALID


@dataclass(frozen=True)
class Split:
    """How a data file parts in two."""

    path: Path
    """Of the data."""
    valid: Path | None = None
    """Of a file to judge by. Then nothing of ``path`` is used for that."""
    fraction: float = 0.0
    """Of lines without ``split`` that are kept to judge by, 0 to 1; with ``valid`` none are."""
    seed: int = 0
    """Draws that fraction."""

    def train(self) -> Iterator[Record]:
        """What is learned from: lines that say so, or say nothing and were not drawn."""
        fraction = 0.0 if self.valid else self.fraction
        return of_split(read_records(self.path), TRAIN, fraction=fraction, seed=self.seed)

    def held_out(self) -> Iterator[Record]:
        """What is kept to judge by. In a file of its own, lines that say nothing are, too."""
        if self.valid:
            return of_split(read_records(self.valid), VALID, fraction=1.0)
        return of_split(read_records(self.path), VALID, fraction=self.fraction, seed=self.seed)


def split_of(record: Record, *, fraction: float = 0.0, seed: int = 0) -> str:
    """Split of a record: its own word, or else ``valid`` for a fraction and ``train`` for the rest.

    Args:
        record: Read from a file.
        fraction: 0 to 1.
        seed: Another seed draws others.
    """
    if record.split is not None:
        return record.split
    if fraction <= 0:
        return TRAIN
    drawn = hashlib.sha256(b"%d:%s" % (seed, record.digest)).digest()
    return VALID if int.from_bytes(drawn[:8], "big") < fraction * 2**64 else TRAIN


def of_split(records: Iterable[Record], split: str, *, fraction: float = 0.0, seed: int = 0) -> Iterator[Record]:
    """Records of one split. See `split_of` for arguments."""
    return (record for record in records if split_of(record, fraction=fraction, seed=seed) == split)


def require_some(records: Iterator[Record], path: Path, split: str) -> Iterator[Record]:
    """Pass records on, and refuse where none came.

    Raises:
        InvalidFileError: None is of the split.
    """
    some = False
    for record in records:
        some = True
        yield record
    if not some:
        hint = f'lines with "split": "{split}", or another split'
        raise InvalidFileError("data-empty", f"{path}: no record is of the split '{split}'", hint=hint, where=str(path))
