"""Examples as tokens in a file: read once, in the order of the data, and from then on at random.

    token 31 bits, learned 1 bit, little-endian        one word per token, examples one after the other

In memory are only where each example begins, whose it is, at which strength and how often it is learned from.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lmoe_cli.data.examples import Example
from lmoe_cli.files import NewFile

LEARNED = 1 << 31
IGNORED = -100
"""Label of a token that is not to be predicted."""


class Owner(NamedTuple):
    """Whose data an example is from."""

    expert: int
    """Its number; -1 for data of all."""
    strength: float = 1.0
    """Weight of the expert while it learns from it."""
    repeat: int = 1
    """Times that it comes in a pass."""


@dataclass(frozen=True)
class Spooled:
    """One example, read back."""

    tokens: Tensor
    """(T,), int64."""
    labels: Tensor
    """(T,), int64: the token itself where it is to be predicted, else `IGNORED`."""
    owner: Owner


class Spool:
    """Examples in a file, by number.

    Args:
        path: Of the file; it must not exist. It is written whole before it is read.
        examples: Whose data each is from, and the example.
    """

    def __init__(self, path: Path, examples: Iterable[tuple[Owner, Example]]) -> None:
        self._starts = array("Q", [0])
        self._experts = array("i")
        self._strengths = array("d")
        self._repeats = array("H")
        self._lines = array("Q")
        self._files: list[str] = []
        with NewFile(path) as file:
            for owner, example in examples:
                words = np.array(example.tokens, dtype=np.uint32)
                words |= np.where(np.array(example.learned), np.uint32(LEARNED), np.uint32(0))
                file.write(words.astype("<u4").tobytes())
                self._starts.append(self._starts[-1] + len(words))
                self._experts.append(owner.expert)
                self._strengths.append(owner.strength)
                self._repeats.append(owner.repeat)
                name, _, line = example.where.rpartition(":")
                if name not in self._files[-1:]:
                    self._files.append(name)
                self._lines.append(len(self._files) - 1 << 40 | int(line))
        self._words = np.memmap(path, dtype="<u4", mode="r") if self._experts else np.empty(0, dtype="<u4")

    def __len__(self) -> int:
        return len(self._experts)

    def numbers(self) -> Iterator[int]:
        """The examples of one pass, each as often as it comes in it."""
        for number, times in enumerate(self._repeats):
            yield from [number] * times

    def length(self, number: int) -> int:
        """Tokens of an example."""
        return self._starts[number + 1] - self._starts[number]

    def where(self, number: int) -> str:
        """File and line that an example is from."""
        place = self._lines[number]
        return f"{self._files[place >> 40]}:{place & (1 << 40) - 1}"

    def __getitem__(self, number: int) -> Spooled:
        words = np.array(self._words[self._starts[number] : self._starts[number + 1]])
        tokens = torch.from_numpy((words & (LEARNED - 1)).astype(np.int64))
        learned = torch.from_numpy((words & LEARNED) != 0)
        owner = Owner(self._experts[number], self._strengths[number], self._repeats[number])
        return Spooled(tokens, torch.where(learned, tokens, IGNORED), owner)
