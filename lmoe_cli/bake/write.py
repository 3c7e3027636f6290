"""Write the tensors of a plan: W plus the weighted deltas in float32, rounded once, streamed block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from lmoe_cli.bake.blocks import blocks, scratch, single_threaded
from lmoe_cli.bake.methods.method import Rows, Settings, TaskVectors
from lmoe_cli.bake.methods.registry import METHODS
from lmoe_cli.bake.plan import Output, Plan
from lmoe_cli.bake.rows import Advance, Block, Sink, require_finite
from lmoe_cli.bake.stored import stored_at
from lmoe_cli.bake.unit import Halves, split
from lmoe_cli.bank.delta import Delta, Update, bias_update, update
from lmoe_cli.bank.gates import in_force
from lmoe_cli.bank.load import Terms, open_terms
from lmoe_cli.bank.stored import rows_of
from lmoe_cli.checkpoint.dequantize import Matrix
from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.checkpoint.writer import ShardWriter
from lmoe_cli.files import NewFile
from lmoe_cli.loadout.layout import Target
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.loadout.recipe import BakeSettings

NewSink = Callable[[float | None], Sink]
"""Takes the norm of the whole change where it is known."""
Gated = Sequence[tuple[float, Delta]]
"""Deltas and what they are multiplied by."""


@dataclass(frozen=True)
class Baked:
    """What became of one tensor that experts changed."""

    name: str
    file: str
    experts: tuple[str, ...]
    change: float
    """Frobenius norm of W' - W, before rounding, relative to that of W."""
    rounding: float
    """Frobenius norm of what rounding took away, relative to that of W'; measured on every eighth block of rows."""
    compared: int = 0
    """Elements from the matrix unit that were compared with the float32 sum, rounded."""
    differing: int = 0
    """How many of them are another number."""


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
    is_fused: bool = False,
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
        is_fused: Let the matrix unit add up what is bfloat16 and stays so.
        advance: Told the bytes that were written.
    """
    metadata = _metadata(loadout)
    jobs = min(jobs, len(plan.files))
    stopped = Event()

    def tell(size: int) -> None:
        if stopped.is_set():
            raise InterruptedError("another file could not be written")
        advance(size)

    def one(name: str) -> Written:
        with ExitStack() as stack:
            reader = stack.enter_context(TensorReader(loadout.base.stored, loadout.base.source.require))
            terms = stack.enter_context(open_terms(loadout))
            computing = stack.enter_context(ThreadPoolExecutor(max(1, threads // jobs)))
            baker = _Baker(loadout, weights, settings, reader, terms, computing, is_fused=is_fused)
            outputs = plan.files[name]
            shapes = {output.name: output.shape for output in outputs}
            file = stack.enter_context(ShardWriter(folder / name, shapes, metadata))
            told = [found for output in outputs if (found := baker.write(output, name, file, tell))]
        return Written(name, file.sha256, tuple(told))

    with single_threaded() as threads, ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(one, plan.files))
        except BaseException:  # also a signal, which reaches this thread alone
            stopped.set()
            raise


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
        pool: Executor,
        *,
        is_fused: bool,
    ) -> None:
        self.loadout = loadout
        self.is_fused = is_fused
        gates = [weights[expert.name] for expert in loadout.experts]
        self.gates = in_force(gates, loadout.recipe.skip_below).tolist()
        self.settings = settings
        self.reader = reader
        self.terms = terms
        self.pool = pool

    def write(self, output: Output, file: str, writer: NewFile, advance: Advance) -> Baked | None:
        """Append one tensor; tells what became of it where experts changed it."""
        if output.is_copy:
            info = output.source.info
            if info.dtype in FLOATS:
                require_finite(self.reader.tensor(output.source.name), output.source.name)
            writer.copy(self.loadout.base.source.require(output.source.file), info.start, info.size)
            advance(info.size)
            return None
        rows = self.reader.rows(output.source.name)
        dtype = getattr(torch, FLOATS[output.shape.dtype])

        def sink(change: float | None) -> Sink:
            return Sink(output.source.name, writer, dtype, self.pool, advance, change)

        if isinstance(rows, Tensor) and output.bias_of is not None:
            targets: tuple[Target, ...] = (output.bias_of,)
            written = self._bias(sink, rows, output.bias_of)
        elif not output.targets:
            sink(0.0).add(_blocks(rows if isinstance(rows, Matrix) else rows.reshape(-1, 1), None))
            return None
        elif isinstance(rows, Matrix) or output.targets[0].index is None:
            targets = output.targets[:1]
            written = self._matrix(sink, rows, output.targets[0], dtype)
        else:
            targets = output.targets
            written = self._stack(sink, rows, output.targets)
        used = {number for target in targets for number, _ in self.loadout.by_target[target]}
        names = sorted(self.loadout.experts[expert].name for expert in used)
        seen = written.measured
        return Baked(output.name, file, tuple(names), written.change, written.rounding, seen.compared, seen.differing)

    def _bias(self, sink: NewSink, tensor: Tensor, target: Target) -> Sink:
        if self.settings.method == "linear":
            gated = self.terms.gated(target, *stored_at(self.loadout.base, self.reader, target), self.gates)
            added = bias_update(gated)
            change = None if added is None else (lambda rows: rows.add_(added))
        else:

            def rows_of_bias(own: Gated) -> Rows | None:
                total = bias_update(own)
                return None if total is None else _column(total)

            vectors = self._task_vectors(target, "bias", (len(tensor), 1), rows_of_bias)
            change = None if vectors is None else (lambda rows: vectors.add_to(rows[:, None], 0))
        own = sink(None)
        own.add([Block(tensor.numel(), lambda: tensor, change)])
        return own

    def _matrix(self, sink: NewSink, rows: Tensor | Matrix, target: Target, dtype: torch.dtype) -> Sink:
        if isinstance(rows, Tensor) and rows.dim() == 1:  # a norm's weight is a matrix of one column
            rows = rows[:, None]
        change = self._update(target, rows)
        is_fused = self.is_fused and rows.dtype == dtype == torch.bfloat16
        halves = split(change) if is_fused and isinstance(change, Update) else None
        own = sink(0.0 if change is None else change.norm)
        own.add(_blocks(rows, change, halves))
        return own

    def _stack(self, sink: NewSink, tensor: Tensor, targets: tuple[Target, ...]) -> Sink:
        """A tensor of three dimensions: one slice after the other, each changed by its own experts."""

        def apply(changes: list[tuple[Target, Update | TaskVectors]], rows: Tensor) -> None:
            for target, change in changes:
                part = rows_of(rows, target)
                own = part.contiguous()
                change.add_to(own, 0)
                part.copy_(own)

        def slices() -> Iterator[Block]:
            for index in range(tensor.shape[0]):
                found = [target for target in targets if target.index == index]
                changes = [(target, self._update(target, rows_of(tensor[index], target))) for target in found]
                live = [(target, change) for target, change in changes if change is not None]
                yield Block(tensor[index].numel(), partial(tensor.__getitem__, index), partial(apply, live))

        own = sink(None)
        own.add(slices())
        return own

    def _update(self, target: Target, matrix: Tensor | Matrix) -> Update | TaskVectors | None:
        """The change of a stored matrix by the method of the recipe."""
        if self.settings.method == "linear":
            gated = self.terms.gated(target, *stored_at(self.loadout.base, self.reader, target), self.gates)
            return update(gated, transposed=target.transposed)

        def change(own: Gated) -> Rows | None:
            total = update(own, transposed=target.transposed)
            return None if total is None else partial(_rows_of_change, total, matrix)

        return self._task_vectors(target, "weight", (matrix.shape[0], matrix.shape[1]), change)

    def _task_vectors(
        self, target: Target, name: str, shape: tuple[int, int], change: Callable[[Gated], Rows | None]
    ) -> TaskVectors | None:
        """What a method makes of the experts' deltas of one tensor, each weighted by gate and rule."""
        deltas: list[Rows] = []
        weights: list[float] = []
        others = dict(enumerate(self.gates))
        parts: dict[int, list[tuple[float, Delta]]] = {}
        for number, delta, factor in self.terms.parts(target, *stored_at(self.loadout.base, self.reader, target)):
            parts.setdefault(number, []).append((factor, delta))
        for number, own in parts.items():  # an expert that names a matrix twice has one delta there, their sum
            alone = len(own) == 1
            if (rows := change([(1.0, own[0][1])] if alone else own)) is not None:
                deltas.append(rows)
                weights.append(others.pop(number) * (own[0][0] if alone else 1.0))
        if not deltas:
            return None
        # Seeded per tensor, so that the draws do not depend on which file is written first.
        seed = f"{self.settings.seed}/{target.module}.{name}/{target.index}"
        settings = Settings(self.settings.density, self.settings.epsilon, self.settings.normalize, seed)
        method, rest = METHODS[self.settings.method], sum(others.values())
        return TaskVectors(method, deltas, shape, weights, rest, settings, self.pool.map)


def _rows_of_change(change: Update, matrix: Tensor | Matrix, rows: slice) -> Tensor:
    """Some rows of a change, float32, in memory of this thread."""
    numbers = range(matrix.shape[0])[rows]
    out = scratch("delta", (len(numbers), matrix.shape[1]))
    if change.is_low_rank:
        return change.change(None, rows, out)
    if isinstance(matrix, Matrix) and numbers.step != 1:  # of which only neighbours are read at a time
        return change.change(torch.cat([matrix[row : row + 1] for row in numbers]), rows, out)
    return change.change(matrix[rows], rows, out)


def _column(vector: Tensor) -> Rows:
    return lambda some: vector[some, None].clone()


def _blocks(
    matrix: Tensor | Matrix, change: Update | TaskVectors | None, halves: Halves | None = None
) -> Iterator[Block]:
    """The rows of a matrix, block by block."""
    for rows in blocks(matrix.shape):
        yield Block(
            (rows.stop - rows.start) * matrix.shape[1],
            partial(matrix.__getitem__, rows),
            None if change is None else partial(_change, change, rows.start),
            None if halves is None else partial(_fused, halves, rows.start),
        )


def _change(change: Update | TaskVectors, start: int, rows: Tensor) -> None:
    change.add_to(rows, start)


def _fused(halves: Halves, start: int, rows: Tensor, out: Tensor) -> None:
    halves.into(rows, start, out)
