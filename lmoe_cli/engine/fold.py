"""Fold a fixed blend into the base's weights in memory, and unfold it again to the last bit.

    W <- round(W + sum_e g_e dW_e)

Nothing of the base is put aside. A matrix that is mapped from its file stays there, and a folded one takes its place;
any other one is overwritten, and read again from the base's files when the blend is unfolded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from lmoe_cli.bank.delta import Delta, Update, bias_update, update
from lmoe_cli.bank.gates import in_force
from lmoe_cli.bank.load import Terms, open_terms
from lmoe_cli.bank.stored import stored_matrix
from lmoe_cli.bank.tree import Location, Tree
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.engine.memory import Mapped
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.layout import Target
from lmoe_cli.loadout.loadout import Loadout

Undo = Callable[[], None]


class Folded:
    """A blend that is folded into a base, or a part of it while that goes on."""

    def __init__(self) -> None:
        self._undo: list[Undo] = []
        self.is_whole = False
        """Whether all of it is folded: not before the end of `fold`, and not from the beginning of `unfold`."""

    def add(self, undo: Undo) -> None:
        """Remember how to take back what comes next."""
        self._undo.append(undo)

    @property
    def is_undone(self) -> bool:
        """Whether the base is as it was before."""
        return not self._undo

    def unfold(self) -> None:
        """Put everything back as it was before, to the last bit. Where that fails half-way it may be called again."""
        self.is_whole = False
        while self._undo:
            self._undo[-1]()
            self._undo.pop()


@dataclass(frozen=True)
class _Part:
    """One matrix that experts change, before anything is written."""

    target: Target
    place: Location
    gated: list[tuple[float, Delta]]
    change: Update | None


def fold(model: nn.Module, loadout: Loadout, weights: Mapping[str, float], folded: Folded) -> None:
    """Fold a blend into a loaded base. What stops half-way is taken back.

    Args:
        model: The base, without a bank on it.
        loadout: Its files are on this machine.
        weights: Expert's name → weight.
        folded: Takes note of what is done, and undoes it; also where taking back fails half-way.

    Raises:
        UsageError: The base is quantised, or its weights in memory are not those of its files.
    """
    tree = Tree(model)
    shared = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    gates = in_force([weights[expert.name] for expert in loadout.experts], loadout.recipe.skip_below).tolist()
    places = {target: tree.find(items[0][1]) for target, items in loadout.by_target.items()}
    if any(tree.is_quantized(place) for place in places.values()):
        hint = "use 'router: {type: weighted}' or 'fold: false'"
        raise UsageError("fold-quantized", "a blend cannot be folded into a quantised base", hint=hint)
    # Adapters may name a matrix and a part of it, or a matrix in two ways: what lies together is changed together.
    together: dict[tuple[str, str | None, int | None], list[Target]] = {}
    for target, place in places.items():
        together.setdefault((place.module, place.parameter, place.index), []).append(target)
    mapped = Mapped()
    try:
        with open_terms(loadout) as terms, _reader(loadout) as reader:
            for targets in together.values():
                parts = [_part(tree, terms, target, places[target], gates) for target in targets]
                changes = [part for part in parts if part.change is not None]
                if changes:
                    parameter = _parameter(tree, changes[0].place)
                    stays = shared[id(parameter)] > 1 or (changes[0].place.index is None and mapped.holds(parameter))
                    if stays:
                        _replace(tree, changes, folded)
                    else:
                        _overwrite(loadout, reader, tree, changes, folded)
                for part in parts:
                    _fold_bias(tree, part.place, part.gated, folded)
    except BaseException:
        folded.unfold()
        raise
    folded.is_whole = True


def _part(tree: Tree, terms: Terms, target: Target, place: Location, gates: Sequence[float]) -> _Part:
    gated = terms.gated(target, partial(tree.weight, place), partial(tree.bias, place), gates)
    return _Part(target, place, gated, update(gated, transposed=tree.is_transposed(place)))


def _parameter(tree: Tree, place: Location) -> nn.Parameter:
    parameter: nn.Parameter = getattr(tree.modules[place.module], place.parameter or "weight")
    return parameter


def _write(tree: Tree, parts: Sequence[_Part], weight: Tensor, out: Tensor) -> None:
    """Write a changed matrix, rounded once.

    Args:
        tree: The base's modules.
        parts: Changes of it or of some of its rows, which may overlap.
        weight: As stored; may be ``out`` itself.
        out: Same shape.
    """
    rows = {part.place.rows for part in parts}
    if len(rows) == len(parts) and (len(parts) == 1 or None not in rows):  # none overlaps another
        for part in parts:
            if part.change is not None:
                change = part.change.to(weight.device)
                change.apply_(_as_matrix(tree.rows(weight, part.place)), _as_matrix(tree.rows(out, part.place)))
        return
    before = weight.to("cpu", torch.float32, copy=True)
    total = before.clone()
    for part in parts:
        if part.change is not None:
            added = part.change.change(_as_matrix(tree.rows(before, part.place)))
            _as_matrix(tree.rows(total, part.place)).add_(added)
    out.copy_(total)


def _as_matrix(tensor: Tensor) -> Tensor:
    """A norm's weight is a matrix of one column."""
    return tensor if tensor.dim() == 2 else tensor[:, None]


def _replace(tree: Tree, parts: Sequence[_Part], folded: Folded) -> None:
    """Give a module a parameter of its own, and leave the old one as it is: in its file, or tied to another one."""
    place = parts[0].place
    module, before = tree.modules[place.module], _parameter(tree, place)
    own = torch.empty_like(before)
    if any(part.place.rows is not None or part.place.index is not None for part in parts):
        own.copy_(before)
    _write(tree, parts, before.detach(), own)
    folded.add(partial(setattr, module, place.parameter or "weight", before))
    setattr(module, place.parameter or "weight", nn.Parameter(own, requires_grad=False))


def _overwrite(loadout: Loadout, reader: TensorReader, tree: Tree, parts: Sequence[_Part], folded: Folded) -> None:
    """Change a matrix where it lies, after making sure that its file can bring it back."""
    for part in parts:
        view = tree.stored(part.place)
        if not torch.equal(view, _from_file(reader, part.target, view)):
            hint = "it was changed after loading, or transformers converts it; use 'fold: false'"
            message = f"{part.target.module}: the weights in memory are not those of the file"
            raise UsageError("fold-unsafe", message, hint=hint)

    def undo() -> None:
        with _reader(loadout) as again:
            for part in parts:
                view = tree.stored(part.place)
                view.copy_(_from_file(again, part.target, view))

    folded.add(undo)  # first: what is written to row by row may stop in the middle
    whole = tree.stored(replace(parts[0].place, rows=None))
    _write(tree, parts, whole, whole)


def _reader(loadout: Loadout) -> TensorReader:
    return TensorReader(loadout.base.stored, loadout.base.source.require)


def _from_file(reader: TensorReader, target: Target, like: Tensor) -> Tensor:
    return stored_matrix(reader, target).to(like.device, like.dtype)


def _fold_bias(tree: Tree, place: Location, gated: list[tuple[float, Delta]], folded: Folded) -> None:
    change = bias_update(gated)
    if change is None:
        return
    module = tree.modules[place.module]
    before = module.bias
    like = before if isinstance(before, Tensor) else tree.stored(place)
    total = change.to(like.device) if before is None else before.detach().float() + change.to(like.device)
    folded.add(partial(setattr, module, "bias", before))
    module.bias = nn.Parameter(total.to(like.dtype), requires_grad=False)
