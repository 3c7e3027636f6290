"""All experts of a loadout on a device: what stands on each module of the base, and the gates they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lmoe_cli.bank.blended import Blended
from lmoe_cli.bank.blocks import block_names, block_width
from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.embedding import BlendedEmbedding
from lmoe_cli.bank.experts import BlendedExperts, SliceTerm
from lmoe_cli.bank.gates import Gates
from lmoe_cli.bank.linear import BareLinear, BlendedLinear
from lmoe_cli.bank.load import open_terms
from lmoe_cli.bank.product import Products, choose_products
from lmoe_cli.bank.routed import Place, Places
from lmoe_cli.bank.shared import Latest, SharedInput
from lmoe_cli.bank.site import FusedSite
from lmoe_cli.bank.tree import Location, Tree, compute_dtype, input_width, is_linear, is_lookup, is_packed
from lmoe_cli.bank.whole import BlendedModule
from lmoe_cli.errors import InvalidFileError, UsageError
from lmoe_cli.loadout.layout import Target
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.loadout.routers import Share

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"), ("query", "key", "value"))
"""Sibling modules that may read the same input. Only those with inputs of equal width are put together, and the product
is shared only where they are called with the very same tensor, so a wrong guess costs time, not exactness."""


@dataclass(frozen=True)
class Bank:
    """Blended modules to stand in for modules of the base."""

    names: tuple[str, ...]
    """The experts, in the order of the gates."""
    gates: Gates
    modules: Mapping[str, Blended]
    """Name among ``model.named_modules()`` → what replaces it."""
    bare: Mapping[str, BareLinear]
    """The same for every linear layer of the base, where other kernels than torch's choice are quicker; without
    experts."""
    places: Mapping[str, Place]
    """What has gates of its own where a router decides per token. Its gates act once their ``route`` is set."""

    @property
    def live(self) -> dict[str, Blended]:
        """What stands on the base while the blend runs: also layers without experts are computed the quickest way."""
        return {**self.bare, **self.modules}

    @property
    def size(self) -> int:
        """Bytes of factors, vectors and whole matrices on the device."""
        seen: dict[int, Tensor] = {}
        for module in self.modules.values():
            for tensor in module.held():
                seen[id(tensor)] = tensor
        return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())


Change = Callable[[Target, Term, Callable[[], Tensor]], Term]
"""A matrix of the base, what an expert does to it, and W (d_out, d_in), float32, when asked → what to do there
instead."""


def build_bank(
    model: nn.Module,
    loadout: Loadout,
    dtype: torch.dtype,
    share: Share | None = None,
    change: Change | None = None,
) -> Bank:
    """Read all experts of a loadout and make the modules that blend them on a loaded model.

    Args:
        model: The base, as loaded. Nothing in it is changed.
        loadout: Its files are on this machine.
        dtype: Of the factors on modules whose own weight is quantised.
        share: What has gates of its own where a router decides per token.
        change: Puts something else in the place of what the experts do, such as noise to compare with.

    Raises:
        InvalidFileError: A weight of an expert is not finite.
        LmoeError: The model class lacks a module that the checkpoint has.
    """
    tree = Tree(model)
    gates = Gates(len(loadout.experts), next(model.parameters()).device, loadout.recipe.skip_below)
    places = Places(gates, share, block_names(model), block_width(model)) if share else Places(gates)
    targets: dict[str, list[tuple[Target, Location]]] = {}
    for target, items in loadout.by_target.items():
        place = tree.find(items[0][1])
        targets.setdefault(place.module, []).append((target, place))
    names = tuple(expert.name for expert in loadout.experts)
    with open_terms(loadout) as terms:

        def read(name: str) -> list[tuple[Location, Term]]:
            found = [
                (place, change(target, term, partial(tree.weight, place)) if change else term)
                for target, place in targets[name]
                for term in terms.at(target, partial(tree.weight, place), partial(tree.bias, place))
            ]
            for _, term in found:
                _require_fit(tree.modules[name], name, term, names[term.expert])
            return found

        return make_bank(tree, names, targets, read, places, dtype)


def _require_fit(module: nn.Module, name: str, term: Term, expert: str) -> None:
    """Refuse on packed weights, whose shape no header tells, what `check` refuses on others.

    Raises:
        InvalidFileError: Factors of another size.
    """
    delta = term.delta
    if not is_packed(module) or delta.a is None or delta.b is None or not isinstance(module, nn.Linear):
        return
    shape, due = (delta.b.shape[0], delta.a.shape[1]), (module.out_features, module.in_features)
    if shape != due:
        message = f"{expert}: {name} {shape} on {due}"
        raise InvalidFileError("shape-mismatch", message, hint="it was trained on another base", where=expert)


def make_bank(
    tree: Tree,
    names: tuple[str, ...],
    modules: Iterable[str],
    read: Callable[[str], list[tuple[Location, Term]]],
    places: Places,
    dtype: torch.dtype,
) -> Bank:
    """Make the modules that blend.

    Args:
        tree: The base's modules.
        names: Of the experts, in the order of the gates.
        modules: Names of those that experts may act on.
        read: Tells what experts do to one of them, and where in it. Asked once for each; what it gave for one family of
            siblings is dropped before the next.
        places: Tells which gates each module obeys.
        dtype: Of the factors on modules whose own weight is quantised.
    """
    gates = places.knobs
    layers = {name: module for name, module in tree.modules.items() if type(module) is nn.Linear}
    weights = [module.weight for module in layers.values()]
    # Nothing reads packed weights as they are, but experts are multiplied with beside them.
    packed = [module for module in tree.modules.values() if isinstance(module, nn.Linear) and is_packed(module)]
    weights += [torch.ones(1).to(dtype).expand(module.out_features, module.in_features) for module in packed]
    products = choose_products(weights)
    bare: dict[str, BareLinear] = {}
    if products != Products():
        bare = {name: BareLinear(module, gates, len(names), products) for name, module in layers.items()}
    builder = _Builder(tree, places, dtype, products)
    for family in _families(modules):
        builder.add({name: placed for name in family if (placed := read(name))})
    return Bank(names, gates, builder.made, bare, places.found)


def _unsupported(name: str, reason: str) -> UsageError:
    hint = "train on its other modules, or run the adapter with PEFT"
    return UsageError("module-unsupported", f"{name}: the class of this base {reason}", hint=hint, where=name)


class _Builder:
    """Makes what replaces each module, sharing the stacked A where siblings read the same input."""

    def __init__(self, tree: Tree, places: Places, dtype: torch.dtype, products: Products) -> None:
        self.made: dict[str, Blended] = {}
        self._tree, self._places, self._dtype, self._products = tree, places, dtype, products
        self._latest = Latest()

    def add(self, family: Mapping[str, list[tuple[Location, Term]]]) -> None:
        """Make the modules of siblings."""
        linear: dict[str, list[Term]] = {}
        for name, placed in family.items():
            if is_linear(self._tree.modules[name]) and not any(place.parameter for place, _ in placed):
                linear[name] = [term for _, term in placed]
            else:
                self.made[name] = self._other(name, placed)
        for group in _by_width(linear):
            self._add_linear(group)

    def _other(self, name: str, placed: list[tuple[Location, Term]]) -> Blended:
        own, module = [term for _, term in placed], self._tree.modules[name]
        kind, device = self._place(module)
        if any(place.parameter for place, _ in placed):
            slices = [
                SliceTerm(place.parameter, place.index, place.rows, term)
                for place, term in placed
                if place.parameter is not None and place.index is not None
            ]
            kind = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
            gates, at = self._gates(name, _tokens_width(placed))
            experts = BlendedExperts(module, slices, gates, kind, device)
            if at:
                at.sites.append(experts)
            return experts
        # These read token numbers, or have no products of their own: the knobs are their gates.
        if isinstance(module, nn.Embedding):
            if not is_lookup(module):
                raise _unsupported(name, "does more than look rows up")
            return BlendedEmbedding(module, own, self._places.knobs, kind, device)
        if any(term.delta.bias is not None for term in own) and getattr(module, "bias", None) is None:
            raise _unsupported(name, "has no bias, and an expert brings one")
        return BlendedModule(module, own, self._places.knobs)

    def _add_linear(self, group: Mapping[str, list[Term]]) -> None:
        products, first = self._products, next(iter(group))
        kind, device = self._place(self._tree.modules[first])
        gates, place = self._gates(first, input_width(self._tree.modules[first]))
        low = [name for name, own in group.items() if any(term.delta.a is not None for term in own)]
        shared = None
        if low:
            shared = SharedInput(gates, self._latest, [group[name] for name in low], kind, device, products)
            if place:
                place.sites.append(shared)
        layers = []
        for name, own in group.items():
            member, stack = (low.index(name), shared) if name in low else (0, None)
            layer = BlendedLinear(self._tree.modules[name], own, gates, stack, member, kind, device, products)
            self.made[name] = layer
            if stack:
                layers.append(layer)
        if shared:
            shared.use([layer.b for layer in layers if layer.b is not None])
        site = FusedSite(shared, layers) if shared and FusedSite.is_possible(shared) else None
        for layer in layers:
            layer.join(site, are_plain=all(sibling.is_plain for sibling in layers))

    def _gates(self, module: str, width: int) -> tuple[Gates, Place | None]:
        place = self._places.at(module, width)
        return (place.gates, place) if place else (self._places.knobs, None)

    def _place(self, module: nn.Module) -> tuple[torch.dtype, torch.device]:
        return compute_dtype(module, self._dtype), next(module.parameters()).device


def _tokens_width(placed: list[tuple[Location, Term]]) -> int:
    """Width of the tokens that fused experts read, and give: d_in of the first matrix, d_out of the last."""
    for place, term in placed:
        if term.delta.a is not None and term.delta.b is not None:
            return term.delta.b.shape[0] if place.parameter == "down_proj" else term.delta.a.shape[1]
    return 0


def _families(modules: Iterable[str]) -> list[list[str]]:
    """Names of modules, siblings that may read the same input together, in the order of `GROUPS`."""
    found: dict[tuple[str, int | str], list[str]] = {}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        number = next((number for number, group in enumerate(GROUPS) if leaf in group), None)
        found.setdefault((parent, leaf if number is None else number), []).append(name)
    order = [leaf for group in GROUPS for leaf in group]
    for family in found.values():
        family.sort(key=lambda name: order.index(leaf) if (leaf := name.rpartition(".")[2]) in order else -1)
    return list(found.values())


def _by_width(family: Mapping[str, list[Term]]) -> list[dict[str, list[Term]]]:
    """Siblings apart that take inputs of different width."""
    found: dict[int | None, dict[str, list[Term]]] = {}
    for name, own in family.items():
        width = next((term.delta.a.shape[1] for term in own if term.delta.a is not None), None)
        found.setdefault(width, {})[name] = own
    return list(found.values())
