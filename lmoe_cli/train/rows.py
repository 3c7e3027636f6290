"""Rows of a batch: an example each, or several packed into one, none of which sees another."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lmoe_cli.train.spool import IGNORED, Spool

OPEN = 64
"""Rows that are open for more at a time while packing."""


class Rows(Dataset[list[int]]):
    """Which examples stand in which row. Item by item their numbers; `collate` reads them.

    Args:
        spool: The examples.
        numbers: Which of them.
        packs: Fill rows with several.
        length: Most tokens in a row.
        seed: Mixes examples before they are packed.
    """

    def __init__(self, spool: Spool, numbers: Sequence[int], *, packs: bool, length: int, seed: int) -> None:
        self.spool = spool
        self.packs = packs
        self._rows = _packed(spool, numbers, length, seed) if packs else [[number] for number in numbers]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> list[int]:
        return self._rows[index]

    def collate(self, rows: Sequence[list[int]]) -> Mapping[str, Tensor]:
        """A batch of rows, padded to the longest.

        Returns:
            ``input_ids``, ``labels``, ``experts`` (-1: of all) and, packed, ``position_ids``, else ``attention_mask``;
            (B, T), int64 each; ``strengths``, (B, T), float32. And ``numbers`` of the examples in each row, -1 for no
            more, (B, N), int64.
        """
        names = ("input_ids", "labels", "experts", "strengths", "position_ids")
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        for row in rows:
            parts = [self.spool[number] for number in row]
            labels = [torch.cat([torch.tensor([IGNORED]), part.labels[1:]]) for part in parts]
            found["input_ids"].append(torch.cat([part.tokens for part in parts]))
            found["labels"].append(torch.cat(labels))
            found["experts"].append(torch.cat([torch.full_like(part.tokens, part.owner.expert) for part in parts]))
            found["strengths"].append(torch.cat([torch.full(part.tokens.shape, part.owner.strength) for part in parts]))
            found["position_ids"].append(torch.cat([torch.arange(len(part.tokens)) for part in parts]))
        padding: dict[str, Any] = {"labels": IGNORED, "experts": -1}
        batch = {name: pad_sequence(own, True, padding.get(name, 0)) for name, own in found.items()}
        if not self.packs:
            lengths = torch.tensor([len(row) for row in found["input_ids"]])
            mask = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
            del batch["position_ids"]
            batch["attention_mask"] = mask.long()
        batch["numbers"] = pad_sequence([torch.tensor(row) for row in rows], True, -1)
        return batch

    def where(self, numbers: Tensor) -> str:
        """The first few examples of a batch, by file and line. See `collate`."""
        own = [number for number in numbers.flatten().tolist() if number >= 0]
        told = ", ".join(self.spool.where(number) for number in own[:4])
        return told + (f" and {len(own) - 4} more" if len(own) > 4 else "")


def _packed(spool: Spool, numbers: Sequence[int], length: int, seed: int) -> list[list[int]]:
    """First fit: each example goes into the first open row that has room for it."""
    mixed = list(numbers)
    random.Random(seed).shuffle(mixed)
    closed: list[list[int]] = []
    rows: list[tuple[int, list[int]]] = []  # room left, and what stands there
    for number in mixed:
        size = spool.length(number)
        place = next((index for index, (room, _) in enumerate(rows) if room >= size), None)
        if place is None:
            rows.append((length - size, [number]))
            if len(rows) > OPEN:
                closed.append(rows.pop(0)[1])
        else:
            room, row = rows[place]
            row.append(number)
            rows[place] = (room - size, row)
    return closed + [row for _, row in rows]
