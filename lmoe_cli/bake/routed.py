"""What of a router that decides can be written into weights: the blend of one prompt, or the mean of its gates.

    y = W x + sum_e g_e(x) dW_e x     becomes     y = W x + sum_e m_e dW_e x,     m_e = mean over tokens of g_e

at every place that has gates of its own. A router that decides per token cannot be baked exactly: m is the constant
that is nearest to g at each place in the mean square, nothing more. How far the whole model is from the routed one is
measured; see `divergence`. The result is an ordinary loadout whose experts have a weight per module. This is ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lmoe_cli.bank.blocks import block_names
from lmoe_cli.bank.routed import MODEL
from lmoe_cli.bank.tree import Tree
from lmoe_cli.data.examples import Example
from lmoe_cli.data.records import Record
from lmoe_cli.engine.cache import last_only
from lmoe_cli.engine.engine import Engine
from lmoe_cli.errors import LmoeError
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.loadout.profile import weight_at
from lmoe_cli.loadout.recipe import ExpertEntry, WeightRule
from lmoe_cli.loadout.routers import StaticRouter
from lmoe_cli.loadout.write import number_of
from lmoe_cli.router.token import TokenRouter

Case = tuple[Record, Example]
"""A record and its tokens."""


@dataclass(frozen=True)
class Means:
    """Mean gates of a routed loadout on some text."""

    gates: Mapping[str, Sequence[float]]
    """Place → m of each expert, in the order of the loadout; ``model`` where a router decides per prompt."""
    records: int
    tokens: int
    """That were read."""
    unseen: tuple[str, ...] = ()
    """Places that no token came to: they have the mean of all others."""


def of_prompt(engine: Engine, prompt: str) -> Loadout:
    """The loadout of an engine with the blend that its router gives one prompt.

    Args:
        engine: Its router decides per prompt.
        prompt: A user's message.
    """
    engine.route(prompt)
    return with_means(engine, {MODEL: _row(engine)})


def measure(engine: Engine, cases: Iterable[Case]) -> Means:
    """The mean gates over all tokens of some records, or over the records where a router decides per prompt.

    Args:
        engine: The routed loadout.
        cases: Read one after the other.
    """
    if not isinstance(engine.router, TokenRouter):
        rows = []
        for record, _ in cases:
            engine.route(prompt_of(record))
            rows.append(_row(engine))
        return Means({MODEL: torch.tensor(rows, dtype=torch.float64).mean(0).tolist()}, len(rows), 0)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    records = tokens = 0
    for _, example in cases:
        for place, gates in _gates(engine, engine.router, example.tokens).items():
            sums[place] = gates.double().sum(0) + sums.get(place, 0.0)
            counts[place] = counts.get(place, 0) + len(gates)
        records, tokens = records + 1, tokens + len(example.tokens)
    found = {place: (total / counts[place]).tolist() for place, total in sums.items() if counts[place]}
    knobs = list(engine.weights.values())
    rest = torch.tensor(list(found.values()), dtype=torch.float64).mean(0).tolist() if found else knobs
    unseen = tuple(place for place in engine.bank.places if place not in found)
    return Means({place: found.get(place, rest) for place in engine.bank.places}, records, tokens, unseen)


def prompt_of(record: Record) -> str | list[Mapping[str, str]]:
    """What of a record a router that decides per prompt would read: what comes before the last answer."""
    if record.text is not None:
        return record.text
    messages = list(record.messages)
    return messages[: record.learned[-1]] or messages


def with_means(engine: Engine, means: Mapping[str, Sequence[float]]) -> Loadout:
    """The loadout of an engine with fixed gates in place of its router's.

    Args:
        engine: Knows which place each module belongs to.
        means: See `Means.gates`.
    """
    loadout, knobs = engine.loadout, list(engine.weights.values())
    values: list[dict[str, float]] = [{} for _ in loadout.experts]
    place_of = _places(engine)
    for target, items in loadout.by_target.items():
        own = means.get(place_of[target.module], knobs if engine.bank.places else means[MODEL])
        for number, item in items:
            module, expert = item.part.module, loadout.experts[number]
            value = number_of(expert.name, expert.profile_at(module) * own[number])
            if values[number].setdefault(module, value) != value:
                message = f"{module}: parts of it have gates of their own"
                raise LmoeError("tensor-dropped", message, hint="report this as a bug", where=module)
    entries = [
        expert.entry.model_copy(update={"weight": _weight(own, knob)})
        for expert, own, knob in zip(loadout.experts, values, knobs, strict=True)
    ]
    return _with_entries(loadout, entries)


def _places(engine: Engine) -> Mapping[str, str]:
    """Module of a target → name of the place whose gates it has; its own name where the weights act."""
    tree, names = Tree(engine.model), {id(place.gates): name for name, place in engine.bank.places.items()}
    found: dict[str, str] = {}
    for target, items in engine.loadout.by_target.items():
        blended = engine.bank.modules.get(tree.find(items[0][1]).module)  # none where the recipe leaves all out
        found[target.module] = names.get(id(blended.gates), target.module) if blended else target.module
    return found


def _with_entries(loadout: Loadout, entries: Sequence[ExpertEntry]) -> Loadout:
    experts = tuple(replace(expert, entry=entry) for expert, entry in zip(loadout.experts, entries, strict=True))
    changes = {
        "experts": {expert.name: expert.entry for expert in experts},
        "router": StaticRouter(type="static", fold=True),
    }
    return replace(loadout, recipe=loadout.recipe.model_copy(update=changes), experts=experts, gate=None)


def _weight(values: Mapping[str, float], knob: float) -> float | list[WeightRule]:
    """Weights of an expert's modules as rules: the longest names first, so that none hides another."""
    if len(set(values.values())) <= 1:
        return next(iter(values.values()), knob)
    modules = sorted(values, key=lambda module: (-module.count("."), module))
    rules = [WeightRule(match=match, value=value) for match, value in _shortened(modules, values).items()]
    wrong = [module for module in modules if weight_at(rules, module) != values[module]]
    if wrong:
        raise LmoeError("bug", f"{wrong[0]}: no rule gives its weight", hint="report this as a bug", where=wrong[0])
    return rules


def _shortened(modules: Sequence[str], values: Mapping[str, float]) -> dict[str, float]:
    """The same weights, but one for all modules below a module where they have the same."""
    below: dict[str, list[str]] = {}
    for module in modules:
        parent = module.rpartition(".")[0]
        while parent:
            below.setdefault(parent, []).append(module)
            parent = parent.rpartition(".")[0]
    whole = {parent for parent, inside in below.items() if len({values[module] for module in inside}) == 1}
    found: dict[str, float] = {}
    for module in modules:
        parents = [module]
        while parent := parents[-1].rpartition(".")[0]:
            parents.append(parent)
        found[next((parent for parent in reversed(parents) if parent in whole), module)] = values[module]
    return dict(sorted(found.items(), key=lambda rule: (-rule[0].count("."), rule[0])))


def _row(engine: Engine) -> list[float]:
    row: list[float] = engine.bank.gates.values[0].tolist()
    return row


@torch.inference_mode()
def _gates(engine: Engine, router: TokenRouter, tokens: Sequence[int]) -> Mapping[str, Tensor]:
    """Gates of every token that comes to a place, (N, E), float32; none where the experts are at rest."""
    ids = torch.tensor([list(tokens)], device=engine.bank.gates.values.device)
    blocks = tuple(f"{name}." for name in (MODEL, *block_names(engine.model)))
    in_blocks = all(f"{name}.".startswith(blocks) for name in engine.bank.places)
    with engine.still(), router.watched() as seen:
        engine.model(input_ids=ids, use_cache=False, **(last_only(engine.model) if in_blocks else {}))
    count = len(engine.bank.names)
    return {place: torch.cat([one.reshape(-1, count).cpu() for one in rows]) for place, rows in seen.items() if rows}
