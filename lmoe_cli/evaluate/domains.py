"""What is judged by: files of records, each a domain with a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lmoe_cli.data.examples import Encoder, Example, Tally
from lmoe_cli.data.records import Record, data_hash, read_records
from lmoe_cli.data.splits import of_split, require_some
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.split_names import VALID

ALL = "all"
"""Name of the split that is every record."""


@dataclass(frozen=True)
class Case:
    """One record, as it is judged."""

    record: Record
    tokens: Tensor
    """(T,), int64."""
    learned: Tensor
    """Which of them are judged, (T,), bool. The first is not: nothing stands before it."""
    size_bytes: int
    """UTF-8 bytes of what the judged tokens say; special tokens say nothing."""

    @property
    def count(self) -> int:
        """Tokens that are judged."""
        return int(self.learned.sum())


@dataclass(frozen=True)
class Domain:
    """A file of records, or a split of it."""

    name: str
    path: Path
    sha256: str
    split: str
    cases: tuple[Case, ...]
    tally: Tally
    """What became of the records."""

    @property
    def counts(self) -> Tensor:
        """Judged tokens of each case, (N,), float64."""
        return torch.tensor([case.count for case in self.cases], dtype=torch.float64)

    @property
    def sizes(self) -> Tensor:
        """Bytes that they say, (N,), float64."""
        return torch.tensor([case.size_bytes for case in self.cases], dtype=torch.float64)


def read_domain(
    name: str,
    path: Path,
    encoder: Callable[[], Encoder],
    decode: Callable[[Sequence[int]], str],
    *,
    split: str | None = None,
    limit: int | None = None,
) -> Domain:
    """Read a domain.

    Args:
        name: For tables.
        path: Of the file.
        encoder: Makes one that counts from nothing.
        decode: Tokens → text without special tokens.
        split: Which records: those whose ``split`` says so, or `ALL`. When None, ``valid`` where the file has such a
            field, and otherwise all.
        limit: Most records; the first ones are taken.

    Raises:
        NotFoundError, InvalidFileError: See `read_records` and `Encoder.encode`; or nothing is left to judge by.
    """
    chosen = split or (VALID if has_splits(path) else ALL)
    found = read_records(path)
    if chosen != ALL:
        found = require_some(of_split(found, chosen), path, chosen)
    return domain_of(name, path, islice(found, limit), chosen, encoder(), decode)


def domain_of(
    name: str,
    path: Path,
    records: Iterable[Record],
    split: str,
    encode: Encoder,
    decode: Callable[[Sequence[int]], str],
) -> Domain:
    """A domain of some records of a file. See `read_domain` for arguments and errors."""
    cases = tuple(
        case_of(record, example, decode) for record in records if (example := encode.encode(record)) is not None
    )
    if not cases:
        hint = "raise --max-tokens" if encode.tally.skipped or encode.tally.unlearned else "a file with more records"
        raise InvalidFileError("data-empty", f"{path}: nothing is left to judge by", hint=hint, where=str(path))
    return Domain(name, path, data_hash(path), split, cases, encode.tally)


def has_splits(path: Path) -> bool:
    """Whether any record of a file says which split it is of."""
    return any(record.split is not None for record in read_records(path))


def case_of(record: Record, example: Example, decode: Callable[[Sequence[int]], str]) -> Case:
    """A record and its tokens as a case. See `read_domain` for arguments."""
    learned = torch.tensor(example.learned)
    learned[0] = False
    said = [decode(example.tokens[start:stop]) for start, stop in runs(learned)]
    size = sum(len(text.encode("utf-8", "replace")) for text in said)
    return Case(record, torch.tensor(example.tokens), learned, size)


def runs(learned: Tensor) -> Iterator[tuple[int, int]]:
    """Where judged tokens stand side by side: first position, and the one behind the last.

    Args:
        learned: (T,), bool.
    """
    edges = torch.diff(learned.int(), prepend=torch.zeros(1), append=torch.zeros(1))
    starts, stops = (edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist()
    yield from zip(starts, stops, strict=True)
