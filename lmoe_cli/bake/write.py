"""Write the tensors of a plan: W plus the weighted deltas in float32, rounded once, streamed block by block."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmoe_cli.bake.methods.method import Settings, TaskVectors
from lmoe_cli.bake.methods.registry import METHODS
from lmoe_cli.bake.plan import Output, Plan
from lmoe_cli.bake.stored import rows_of, stored_at
from lmoe_cli.bank.delta import ROW_BLOCK_ELEMENTS, Delta, Update, bias_update, update
from lmoe_cli.bank.gates import in_force
from lmoe_cli.bank.load import Terms, open_terms
from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.checkpoint.writer import ShardWriter
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.files import NewFile
from lmoe_cli.loadout.layout import Target
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.loadout.recipe import BakeSettings

Advance = Callable[[int], None]
"""Told the bytes that were written."""


@dataclass(frozen=True)
class Baked:
    """What became of one tensor that experts changed."""

    name: str
    file: str
    experts: tuple[str, ...]
    change: float
    """Frobenius norm of W' - W, before rounding, relative to that of W."""
    rounding: float
    """Frobenius norm of what rounding took away, relative to that of W'."""


@dataclass(frozen=True)
class Written:
    """A file that was written."""

    name: str
    sha256: str
    tensors: tuple[Baked, ...]


def write_model(
    plan: Plan,
    loadout: Loadout,
    weights: Mapping[str, float],
    settings: BakeSettings,
    folder: Path,
    *,
    jobs: int = 1,
    advance: Advance = lambda _: None,
) -> list[Written]:
    """Write every weight file of a plan.

    Args:
        plan: What to write.
        loadout: Its files are on this machine.
        weights: Expert's name → weight.
        settings: Method and its parameters.
        folder: Where to.
        jobs: Files written at a time. The bytes do not depend on it.
        advance: Told the bytes that were written.
    """
    threads = max(1, torch.get_num_threads() // jobs)
    metadata = _metadata(loadout)

    def one(name: str) -> Written:
        torch.set_num_threads(threads)
        with ExitStack() as stack:
            reader = stack.enter_context(TensorReader(loadout.base.stored, loadout.base.source.require))
            terms = stack.enter_context(open_terms(loadout))
            baker = _Baker(loadout, weights, settings, reader, terms)
            outputs = plan.files[name]
            shapes = {output.name: output.shape for output in outputs}
            file = stack.enter_context(ShardWriter(folder / name, shapes, metadata))
            told = [found for output in outputs if (found := baker.write(output, name, file, advance))]
        return Written(name, file.sha256, tuple(told))

    before = torch.get_num_threads()
    try:
        if jobs == 1:
            return [one(name) for name in plan.files]
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(one, plan.files))
    finally:
        torch.set_num_threads(before)


def _metadata(loadout: Loadout) -> Mapping[str, str]:
    file = loadout.base.weight_files[0]
    return loadout.base.source.header(file).metadata or {"format": "pt"}


class _Baker:
    """Writes tensors one after the other."""

    def __init__(
        self,
        loadout: Loadout,
        weights: Mapping[str, float],
        settings: BakeSettings,
        reader: TensorReader,
        terms: Terms,
    ) -> None:
        self.loadout = loadout
        gates = [weights[expert.name] for expert in loadout.experts]
        self.gates = in_force(gates, loadout.recipe.skip_below).tolist()
        self.settings = settings
        self.reader = reader
        self.terms = terms

    def write(self, output: Output, file: str, writer: NewFile, advance: Advance) -> Baked | None:
        """Append one tensor; tells what became of it where experts changed it."""
        if output.is_copy:
            info = output.source.info
            if info.dtype in FLOATS:
                _require_finite(self.reader.tensor(output.source.name), output.source.name)
            writer.copy(self.loadout.base.source.require(output.source.file), info.start, info.size)
            advance(info.size)
            return None
        tensor = self.reader.tensor(output.source.name)
        sink = _Sink(output.source.name, writer, getattr(torch, FLOATS[output.shape.dtype]), advance)
        if output.bias_of is not None:
            used = self._bias(sink, tensor, output.bias_of)
        elif not output.targets:
            for rows in tensor.reshape(-1).split(ROW_BLOCK_ELEMENTS):  # type: ignore[no-untyped-call]
                sink.add(rows, rows.float())
            return None
        elif output.targets[0].index is None:
            used = self._matrix(sink, tensor, output.targets[0])
        else:
            used = self._stack(sink, tensor, output.targets)
        names = sorted({self.loadout.experts[expert].name for expert in used})
        return Baked(output.name, file, tuple(names), sink.change, sink.rounding)

    def _bias(self, sink: _Sink, tensor: Tensor, target: Target) -> list[int]:
        exact = tensor.float()
        if self.settings.method == "linear":
            change = bias_update(
                self.terms.gated(target, *stored_at(self.loadout.base, self.reader, target), self.gates)
            )
            exact = exact if change is None else exact + change
        else:
            vectors = self._task_vectors(
                target, "bias", lambda delta: None if delta.bias is None else delta.bias[:, None].clone()
            )
            exact = exact if vectors is None else vectors.block(tensor[:, None], 0)[:, 0]
        sink.add(tensor, exact)
        return self._experts(target)

    def _matrix(self, sink: _Sink, tensor: Tensor, target: Target) -> list[int]:
        matrix = tensor if tensor.dim() == 2 else tensor[:, None]  # a norm's weight is a matrix of one column
        total = self._update(target, matrix)
        step = max(1, ROW_BLOCK_ELEMENTS // max(1, matrix.shape[1]))
        for start in range(0, matrix.shape[0], step):
            rows = matrix[start : start + step]
            sink.add(rows, rows.float() if total is None else total.block(rows, start))
        return self._experts(target)

    def _stack(self, sink: _Sink, tensor: Tensor, targets: tuple[Target, ...]) -> list[int]:
        """A tensor of three dimensions: one slice after the other, each changed by its own experts."""
        used: list[int] = []
        for index in range(tensor.shape[0]):
            exact = tensor[index].to(torch.float32, copy=True)
            for target in targets:
                if target.index == index:
                    used += self._experts(target)
                    part = rows_of(exact, target)
                    if (total := self._update(target, part)) is not None:
                        part.copy_(total.block(part, 0))
            sink.add(tensor[index], exact)
        return used

    def _experts(self, target: Target) -> list[int]:
        return [number for number, _ in self.loadout.by_target[target]]

    def _update(self, target: Target, matrix: Tensor) -> Update | TaskVectors | None:
        """The change of a stored matrix by the method of the recipe."""
        if self.settings.method == "linear":
            gated = self.terms.gated(target, *stored_at(self.loadout.base, self.reader, target), self.gates)
            return update(gated, transposed=target.transposed)

        def dense(delta: Delta) -> Tensor | None:
            alone = update([(1.0, delta)], transposed=target.transposed)
            return None if alone is None else alone.change(matrix)

        return self._task_vectors(target, "weight", dense)

    def _task_vectors(self, target: Target, name: str, dense: Callable[[Delta], Tensor | None]) -> TaskVectors | None:
        """What a method makes of the experts' deltas of one tensor, each weighted by gate and rule."""
        deltas: list[Tensor] = []
        weights: list[float] = []
        others = dict(enumerate(self.gates))
        for number, delta, factor in self.terms.parts(target, *stored_at(self.loadout.base, self.reader, target)):
            if (vector := dense(delta)) is not None:
                deltas.append(vector)
                weights.append(others.pop(number) * factor)
        if not deltas:
            return None
        # Seeded per tensor, so that the draws do not depend on which file is written first.
        seed = hashlib.sha256(f"{self.settings.seed}/{target.module}.{name}/{target.index}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(seed[:7], "little"))
        settings = Settings(self.settings.density, self.settings.epsilon, self.settings.normalize, generator)
        return TaskVectors(METHODS[self.settings.method], deltas, weights, sum(others.values()), settings)


def _require_finite(tensor: Tensor, name: str) -> None:
    for block in tensor.reshape(-1).split(ROW_BLOCK_ELEMENTS):  # type: ignore[no-untyped-call]
        # A sum passes NaN and infinity on, and is read much faster; that of huge numbers may overflow by itself.
        if not math.isfinite(float(block.sum(dtype=torch.float32))) and not torch.isfinite(block).all():
            raise _not_finite(name)


def _not_finite(name: str) -> InvalidFileError:
    hint = "the base is damaged: download it again"
    return InvalidFileError("weights-not-finite", f"the base's {name} holds NaN or infinity", hint=hint)


class _Sink:
    """Where the rows of one tensor go: rounded once, appended to the file, and measured."""

    def __init__(self, name: str, writer: NewFile, dtype: torch.dtype, advance: Advance) -> None:
        self.name, self.writer, self.dtype, self.advance = name, writer, dtype, advance
        self._before = self._changed = self._after = self._lost = 0.0

    def add(self, before: Tensor, exact: Tensor) -> None:
        """Append rows.

        Args:
            before: As the base has them.
            exact: As they shall be, float32.

        Raises:
            InvalidFileError: They are too large for the dtype.
        """
        rounded = exact.to(self.dtype)
        plain = before.float().view_as(exact)
        self._before += _squares(plain)
        self._changed += _squares(exact - plain)
        self._after += _squares(exact)
        self._lost += _squares(rounded.float() - exact)
        if not math.isfinite(self._before):
            raise _not_finite(self.name)
        if not math.isfinite(self._lost):
            name = str(self.dtype).removeprefix("torch.")
            hint = "try --dtype bfloat16 or float32, or smaller weights"
            raise InvalidFileError("bake-overflow", f"{self.name}: a blended weight does not fit {name}", hint=hint)
        data = rounded.contiguous().view(torch.uint8).numpy()
        self.writer.write(memoryview(data))  # type: ignore[arg-type]
        self.advance(data.nbytes)

    @property
    def change(self) -> float:
        """Norm of the change, before rounding, relative to that of the base."""
        return math.sqrt(self._changed / self._before) if self._before else 0.0

    @property
    def rounding(self) -> float:
        """Norm of what rounding took away, relative to that of the result."""
        return math.sqrt(self._lost / self._after) if self._after else 0.0


def _squares(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2
