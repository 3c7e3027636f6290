"""All experts of a loadout on a device: what stands on each module of the base, and the gates they share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lmoe_cli.bank.blended import Blended
from lmoe_cli.bank.delta import Term
from lmoe_cli.bank.embedding import BlendedEmbedding
from lmoe_cli.bank.experts import BlendedExperts, SliceTerm
from lmoe_cli.bank.gates import Gates
from lmoe_cli.bank.linear import BareLinear, BlendedLinear
from lmoe_cli.bank.load import open_terms
from lmoe_cli.bank.product import Products, choose_products
from lmoe_cli.bank.shared import Latest, SharedInput
from lmoe_cli.bank.site import FusedSite
from lmoe_cli.bank.tree import Location, Tree, compute_dtype, is_linear
from lmoe_cli.bank.whole import BlendedModule
from lmoe_cli.loadout.loadout import Loadout

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


def build_bank(model: nn.Module, loadout: Loadout, dtype: torch.dtype) -> Bank:
    """Read all experts of a loadout and make the modules that blend them on a loaded model.

    Args:
        model: The base, as loaded. Nothing in it is changed.
        loadout: Its files are on this machine.
        dtype: Of the factors on modules whose own weight is quantised.

    Raises:
        InvalidFileError: A weight of an expert is not finite.
        LmoeError: The model class lacks a module that the checkpoint has.
    """
    tree = Tree(model)
    gates = Gates(len(loadout.experts), next(model.parameters()).device, loadout.recipe.skip_below)
    placed: dict[str, list[tuple[Location, Term]]] = {}
    with open_terms(loadout) as terms:
        for target, items in loadout.by_target.items():
            place = tree.find(items[0][1])
            found = terms.at(target, partial(tree.weight, place), partial(tree.bias, place))
            placed.setdefault(place.module, []).extend((place, term) for term in found)
    names = tuple(expert.name for expert in loadout.experts)
    return make_bank(tree, names, {name: own for name, own in placed.items() if own}, gates, dtype)


def make_bank(
    tree: Tree,
    names: tuple[str, ...],
    terms: Mapping[str, list[tuple[Location, Term]]],
    gates: Gates,
    dtype: torch.dtype,
) -> Bank:
    """Make the modules that blend.

    Args:
        tree: The base's modules.
        names: Of the experts, in the order of the gates.
        terms: Name of a module → what experts do to it, and where in it.
        gates: Of the model.
        dtype: Of the factors on modules whose own weight is quantised.
    """
    layers = {name: module for name, module in tree.modules.items() if type(module) is nn.Linear}
    products = choose_products(module.weight for module in layers.values())
    bare: dict[str, BareLinear] = {}
    if products != Products():
        bare = {name: BareLinear(module, gates, len(names), products) for name, module in layers.items()}
    return Bank(names, gates, _blended(tree, terms, gates, dtype, products), bare)


def _blended(
    tree: Tree,
    terms: Mapping[str, list[tuple[Location, Term]]],
    gates: Gates,
    dtype: torch.dtype,
    products: Products,
) -> dict[str, Blended]:
    """What replaces each module, sharing the stacked A where siblings read the same input."""
    made: dict[str, Blended] = {}
    linear: dict[str, list[Term]] = {}
    for name, placed in terms.items():
        module = tree.modules[name]
        own = [term for _, term in placed]
        kind, device = compute_dtype(module, dtype), next(module.parameters()).device
        if any(place.parameter for place, _ in placed):
            slices = [
                SliceTerm(place.parameter, place.index, place.rows, term)
                for place, term in placed
                if place.parameter is not None and place.index is not None
            ]
            kind = next(parameter.dtype for parameter in module.parameters() if parameter.is_floating_point())
            made[name] = BlendedExperts(module, slices, gates, kind, device)
        elif isinstance(module, nn.Embedding):
            made[name] = BlendedEmbedding(module, own, gates, kind, device)
        elif is_linear(module):
            linear[name] = own
        else:
            made[name] = BlendedModule(module, own, gates)
    latest = Latest()
    for group in _groups(linear):
        first = tree.modules[group[0]]
        kind, device = compute_dtype(first, dtype), next(first.parameters()).device
        low = [name for name in group if any(term.delta.a is not None for term in linear[name])]
        shared = SharedInput(gates, latest, [linear[name] for name in low], kind, device, products) if low else None
        for name in group:
            member = low.index(name) if name in low else 0
            stack = shared if name in low else None
            made[name] = BlendedLinear(tree.modules[name], linear[name], gates, stack, member, kind, device, products)
        layers = [layer for name in low if isinstance(layer := made[name], BlendedLinear)]
        site = FusedSite(shared, layers) if shared and FusedSite.is_possible(shared) else None
        for layer in layers:
            layer.join(site, are_plain=all(sibling.is_plain for sibling in layers))
    return made


def _groups(terms: Mapping[str, Sequence[Term]]) -> list[list[str]]:
    """Names of modules, those that read the same input together."""
    found: dict[tuple[str, int | str, int | None], list[str]] = {}
    for name, own in terms.items():
        parent, _, leaf = name.rpartition(".")
        number = next((number for number, group in enumerate(GROUPS) if leaf in group), None)
        width = next((term.delta.a.shape[1] for term in own if term.delta.a is not None), None)
        found.setdefault((parent, leaf if number is None else number, width), []).append(name)
    order = [leaf for group in GROUPS for leaf in group]
    for group in found.values():
        group.sort(key=lambda name: order.index(leaf) if (leaf := name.rpartition(".")[2]) in order else -1)
    return list(found.values())
