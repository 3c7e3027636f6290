"""Read experts' weights and turn them into deltas, one matrix of the base at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lmoe_cli.bank.delta import ROW_BLOCK_ELEMENTS, Delta, Term
from lmoe_cli.bank.variants.ia3 import ia3_delta
from lmoe_cli.bank.variants.loha import loha_delta
from lmoe_cli.bank.variants.lokr import lokr_delta
from lmoe_cli.bank.variants.lora import embedding_delta, lora_delta
from lmoe_cli.bank.variants.saved import saved_delta
from lmoe_cli.bank.variants.source import Contents
from lmoe_cli.bank.variants.vera import vera_delta
from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.loadout.layout import Assignment, Target
from lmoe_cli.loadout.loadout import Expert, Loadout
from lmoe_cli.loadout.saved import is_left_out

VARIANTS: dict[str, Callable[[Contents], Delta]] = {
    "lora": lora_delta,
    "embedding": embedding_delta,
    "ia3": ia3_delta,
    "loha": loha_delta,
    "lokr": lokr_delta,
    "vera": vera_delta,
    "saved": saved_delta,
}
"""Kind of part → what makes its delta. See `adapter.contents.MARKERS`."""


class ExpertWeights:
    """An expert's weights, open for reading. Use `open_expert`."""

    def __init__(self, expert: Expert, reader: TensorReader) -> None:
        self.expert = expert
        self._reader = reader
        self._stacks: dict[str, Tensor] = {}
        """Tensors of the part that was read last, where experts are stacked in them."""

    def delta(self, item: Assignment, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]) -> Delta:
        """What this expert does to one matrix, its own scaling folded in, its weight not.

        Args:
            item: Which part, on which matrix.
            weight: Gives W, (d_out, d_in), float32. Called only where the variant needs it.
            bias: Gives the base's bias, (d_out,), float32.

        Raises:
            InvalidFileError: A weight is not finite.
        """
        contents = Contents(
            read=lambda role: self._role(item, role),
            has=lambda role: role in item.part.tensors,
            scaling=item.part.scaling,
            d_in=item.target.d_in,
            weight=weight,
            bias=bias,
            transposed=item.target.transposed,
        )
        return VARIANTS[item.part.kind](contents)

    def _role(self, item: Assignment, role: str) -> Tensor:
        shared = self.expert.adapter.shared
        stored = item.part.tensors[role] if role in item.part.tensors else shared[role]
        tensor = self._stacked(item, role, stored) if item.part.experts > 1 else self._read(stored)
        if role != "saved_weight":  # as large as the base's own: converted a few rows at a time
            tensor = tensor.to(torch.float32)
        if item.rows and role == "lora_B":
            tensor = tensor[slice(*item.rows)]
        return tensor

    def _stacked(self, item: Assignment, role: str, stored: Stored) -> Tensor:
        """One expert's part of a tensor in which all of a mixture are stacked, which is read once for all of them."""
        if stored.name not in self._stacks:
            names = {tensor.name for tensor in item.part.tensors.values()}
            self._stacks = {name: tensor for name, tensor in self._stacks.items() if name in names}
            self._stacks[stored.name] = self._read(stored)
        tensor, rank, number = self._stacks[stored.name], item.part.rank, item.expert
        if role == "lora_A":  # (experts x r, d_in): the rank runs fastest
            tensor = tensor[number * rank : (number + 1) * rank]
        elif role == "lora_B":  # (d_out, r x experts): the expert runs fastest
            tensor = tensor.view(tensor.shape[0], rank, -1)[:, :, number]
        return tensor.clone()  # which does not keep the whole alive

    def _read(self, stored: Stored) -> Tensor:
        tensor = self._reader.tensor(stored.name)
        if not all(torch.isfinite(rows).all() for rows in tensor.reshape(-1).split(ROW_BLOCK_ELEMENTS)):  # type: ignore[no-untyped-call]
            where = f"{self.expert.name}: {stored.name}"
            hint = "the adapter diverged in training or was damaged"
            raise InvalidFileError("weights-not-finite", f"{where} holds NaN or infinity", hint=hint, where=where)
        return tensor


class Terms:
    """Reads what all experts of a loadout do, one matrix of the base at a time. Use `open_terms`."""

    def __init__(self, loadout: Loadout, weights: Sequence[ExpertWeights]) -> None:
        self._loadout = loadout
        self._weights = weights

    def parts(
        self, target: Target, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]
    ) -> Iterator[tuple[int, Delta, float]]:
        """What each expert does to one matrix, and what the recipe's rules multiply it by there.

        Args:
            target: The matrix.
            weight: Gives W, (d_out, d_in), float32. Called only where a variant needs it.
            bias: Gives the base's bias, (d_out,), float32.

        Yields:
            Number of the expert, its delta, and the factor. Dimensionless; an expert's weight is not in it.

        Raises:
            InvalidFileError: A weight of an expert is not finite.
        """
        for number, item in self._loadout.by_target[target]:
            expert = self._loadout.experts[number]
            if is_left_out(self._loadout, expert.name, item.part):
                continue
            yield number, self._weights[number].delta(item, weight, bias), expert.profile_at(item.part.module)

    def at(self, target: Target, weight: Callable[[], Tensor], bias: Callable[[], Tensor | None]) -> list[Term]:
        """The parts of all experts in one matrix, with the recipe's rules for it folded in, but not their weights.

        See `parts` for arguments and errors.
        """
        found: list[Term] = []
        for number, delta, factor in self.parts(target, weight, bias):
            rest = replace(delta, saved=None).scaled(factor)
            found.append(Term(number, replace(rest, saved=delta.saved), factor))
        return found

    def gated(
        self,
        target: Target,
        weight: Callable[[], Tensor],
        bias: Callable[[], Tensor | None],
        gates: Sequence[float],
    ) -> list[tuple[float, Delta]]:
        """Gates and deltas of one matrix, as `delta.update` adds them up. See `parts` for arguments and errors.

        ``gates`` has one number per expert.
        """
        return [(gates[number] * factor, delta) for number, delta, factor in self.parts(target, weight, bias)]


@contextmanager
def open_terms(loadout: Loadout) -> Iterator[Terms]:
    """Open the weights of all experts for the length of a block."""
    with ExitStack() as stack:
        yield Terms(loadout, [stack.enter_context(open_expert(expert)) for expert in loadout.experts])


@contextmanager
def open_expert(expert: Expert) -> Iterator[ExpertWeights]:
    """Open an expert's weight files for the length of a block."""
    adapter = expert.adapter
    with TensorReader(adapter.stored, adapter.weights.require) as reader:
        yield ExpertWeights(expert, reader)
