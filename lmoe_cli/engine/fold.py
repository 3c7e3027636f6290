"""Fold a fixed blend into the base's weights in memory, and unfold it again to the last bit.

    W <- round(W + sum_e g_e dW_e)

Unfolding reads the changed matrices again from the base's files, so there is no second copy of the base in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from lmoe_cli.bank.delta import Delta, Update, bias_update, update
from lmoe_cli.bank.gates import in_force
from lmoe_cli.bank.load import open_terms
from lmoe_cli.bank.tree import Location, Tree
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.layout import Target
from lmoe_cli.loadout.loadout import Loadout

Undo = Callable[[], None]


class Folded:
    """A blend that is folded into a base."""

    def __init__(self, undo: list[Undo]) -> None:
        self._undo = undo

    def unfold(self) -> None:
        """Put everything back as it was before, to the last bit."""
        while self._undo:
            self._undo.pop()()


def fold(model: nn.Module, loadout: Loadout, weights: Mapping[str, float]) -> Folded:
    """Fold a blend into a loaded base.

    Args:
        model: The base, without a bank on it.
        loadout: Its files are on this machine.
        weights: Expert's name → weight.

    Returns:
        What undoes it.

    Raises:
        UsageError: The base is quantised, or its weights in memory are not those of its files.
    """
    tree = Tree(model)
    shared = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    gates = in_force([weights[expert.name] for expert in loadout.experts], loadout.recipe.skip_below).tolist()
    places = {target: tree.find(items[0][1]) for target, items in loadout.by_target.items()}
    if any(not tree.stored(place).is_floating_point() for place in places.values()):
        hint = "use 'router: {type: weighted}' or 'fold: false'"
        raise UsageError("fold-quantized", "a blend cannot be folded into a quantised base", hint=hint)
    undo: list[Undo] = []
    folded = Folded(undo)
    try:
        with open_terms(loadout) as terms, _reader(loadout) as reader:
            for target, place in places.items():
                found = terms.at(target, partial(tree.weight, place), partial(tree.bias, place))
                gated = [pair for term in found for pair in term.gated(gates[term.expert])]
                total = update(gated, transposed=tree.is_transposed(place))
                if total is not None:
                    is_shared = shared[id(_parameter(tree, place))] > 1
                    change = _replace if is_shared else partial(_overwrite, loadout, reader, target)
                    undo.append(change(tree, place, total))
                undo += _fold_bias(tree, place, gated)
    except BaseException:
        folded.unfold()
        raise
    return folded


def _parameter(tree: Tree, place: Location) -> nn.Parameter:
    parameter: nn.Parameter = getattr(tree.modules[place.module], place.parameter or "weight")
    return parameter


def _replace(tree: Tree, place: Location, total: Update) -> Undo:
    """Give a module a parameter of its own: another one, tied to it, keeps the old."""
    module, before = tree.modules[place.module], _parameter(tree, place)
    own = torch.empty_like(before)
    total.to(before.device).apply_(before.detach(), own)
    setattr(module, place.parameter or "weight", nn.Parameter(own, requires_grad=False))

    def undo() -> None:
        setattr(module, place.parameter or "weight", before)

    return undo


def _overwrite(
    loadout: Loadout, reader: TensorReader, target: Target, tree: Tree, place: Location, total: Update
) -> Undo:
    """Change a matrix where it lies, after making sure that its file can bring it back."""
    view = tree.stored(place)
    if not torch.equal(view, _from_file(reader, target, view)):
        hint = "it was changed after loading, or transformers converts it; use 'fold: false'"
        raise UsageError("fold-unsafe", f"{target.module}: the weights in memory are not those of the file", hint=hint)
    matrix = view if view.dim() == 2 else view[:, None]
    total.to(view.device).apply_(matrix, matrix)

    def undo() -> None:
        with _reader(loadout) as again:
            tree.stored(place).copy_(_from_file(again, target, view))

    return undo


def _reader(loadout: Loadout) -> TensorReader:
    return TensorReader(loadout.base.stored, loadout.base.source.require)


def _from_file(reader: TensorReader, target: Target, like: Tensor) -> Tensor:
    tensor = reader.tensor(target.tensor)
    if target.index is not None:
        tensor = tensor[target.index]
        if target.rows:
            tensor = tensor[:, slice(*target.rows)] if target.transposed else tensor[slice(*target.rows)]
    return tensor.to(like.device, like.dtype)


def _fold_bias(tree: Tree, place: Location, gated: list[tuple[float, Delta]]) -> list[Undo]:
    change = bias_update(gated)
    if change is None:
        return []
    module = tree.modules[place.module]
    before = module.bias
    like = before if isinstance(before, Tensor) else tree.stored(place)
    total = change.to(like.device) if before is None else before.detach().float() + change.to(like.device)
    module.bias = nn.Parameter(total.to(like.dtype), requires_grad=False)

    def undo() -> None:
        module.bias = before

    return [undo]
