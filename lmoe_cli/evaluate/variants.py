"""What is compared: the base, its experts in several ways, and controls, all on one loaded base.

Fixed weights act on one bank of experts as they were published: a recipe's rules per module are not in it. A recipe
with such rules, or with a router that decides, gets its own bank on the same base, and so do random experts; at most
one bank is in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from lmoe_cli.bank.bank import build_bank
from lmoe_cli.engine.build import share_of, start
from lmoe_cli.engine.device import choose_device, choose_dtype
from lmoe_cli.engine.engine import Engine
from lmoe_cli.engine.without import leave_out
from lmoe_cli.errors import NotFoundError
from lmoe_cli.evaluate.random_experts import noise
from lmoe_cli.hub import Progress
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.router import registry

Kind = Literal["base", "expert", "uniform", "recipe", "without", "random", "other"]


@dataclass(frozen=True)
class Variant:
    """One way to use the experts."""

    name: str
    kind: Kind
    loadout: Loadout
    """What is on the base, and what routes."""
    weights: Mapping[str, float]
    """Of its experts; of a router that decides, what multiplies its gates."""
    expert: str | None = None
    """The one that it is about."""
    noise: int | None = None
    """Seed of random experts in the place of its own."""


def as_written(loadout: Loadout, plain: Loadout) -> Loadout:
    """What computes the recipe: its own router, or the published experts where fixed weights are all it says.

    Args:
        loadout: The recipe's.
        plain: The same, as `Loadout.published`.
    """
    if loadout.recipe.router.type not in ("static", "weighted"):
        return loadout
    has_rules = any(isinstance(expert.entry.weight, list) for expert in loadout.experts)
    return loadout.live if has_rules else plain


def plan(loadout: Loadout, *, without: Sequence[str] = (), seed: int | None = 0) -> list[Variant]:
    """All variants of a loadout, those on the same bank next to each other.

    Args:
        loadout: Of the recipe.
        without: Experts to leave out, each in a variant of its own.
        seed: Of the random experts; None for none.

    Raises:
        NotFoundError: There is no expert of a name in ``without``.
    """
    plain, names = loadout.published, [expert.name for expert in loadout.experts]
    for name in without:
        if name not in names:
            hint = f"experts: {', '.join(names) or 'none'}"
            raise NotFoundError("expert-unknown", f"--without {name}: no such expert", hint=hint)
    nothing = dict.fromkeys(names, 0.0)
    found = [Variant("base", "base", plain, nothing)]
    found += [Variant(f"only {name}", "expert", plain, {**nothing, name: 1.0}, name) for name in names]
    if len(names) > 1:  # of one expert it is that expert
        found.append(Variant("uniform", "uniform", plain, dict.fromkeys(names, 1 / len(names))))
    written = as_written(loadout, plain)
    weights = {expert.name: expert.weight for expert in loadout.experts}
    recipe = Variant("recipe", "recipe", written, weights)
    found.append(recipe)
    for name in dict.fromkeys(without):
        found.append(Variant(f"without {name}", "without", written, {**weights, name: 0.0}, name))
    if names and seed is not None:
        found.append(Variant("random", "random", written, weights, noise=seed))
    return found


def other(name: str, loadout: Loadout) -> Variant:
    """Another loadout on the same base, such as one LoRA of the same size trained on the same data."""
    weights = {expert.name: expert.weight for expert in loadout.experts}
    return Variant(name, "other", as_written(loadout, loadout), weights)


class Stage:
    """A loaded base, and the experts of one variant on it at a time. Use `open_stage`."""

    def __init__(self, engine: Engine, dtype: torch.dtype) -> None:
        self.engine = engine
        """With the experts of the last variant on the base."""
        self.model: nn.Module = engine.model
        self._dtype = dtype
        self._noise: int | None = None

    def take(self, variant: Variant) -> Engine:
        """Put the experts of a variant onto the base, with its weights in force."""
        if variant.loadout is not self.engine.loadout or variant.noise != self._noise:
            self._change(variant)
        if self.engine.router.can_turn:  # also where they are in force: rows of the last batch may have had their own
            self.engine.set_weights(variant.weights)
        else:
            leave_out(self.engine, *([variant.expert] if variant.kind == "without" and variant.expert else []))
        return self.engine

    def _change(self, variant: Variant) -> None:
        known = {name: value for name, value in vars(self.engine).items() if name == "tokenizer"}  # slow to read again
        trusts = self.engine.trusts
        self.engine.detach()
        del self.engine
        gc.collect()  # at most one bank is in memory, and it has cycles
        loadout, router = variant.loadout, variant.loadout.recipe.router
        change = None if variant.noise is None else noise(variant.noise, [expert.name for expert in loadout.experts])
        bank = build_bank(self.model, loadout, self._dtype, share_of(loadout), change)
        weights = {expert.name: expert.weight for expert in loadout.experts}
        self.engine = Engine(loadout, self.model, bank, registry.load(router)(router, weights), trusts=trusts)
        vars(self.engine).update(known)
        self._noise = variant.noise


def open_stage(
    variants: Sequence[Variant],
    *,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Stage:
    """Load the base of some variants, with the experts of the first.

    Args:
        variants: From `plan`.
        device: See `lmoe_cli.load`, also for the rest and for errors.
        dtype: As there.
        quantize: As there.
        trust_remote_code: As there.
        progress: Is told of what is fetched.
    """
    for variant in variants:
        variant.loadout.fetch(progress)
    loadout = variants[0].loadout
    engine = start(
        loadout,
        device=device,
        dtype=dtype,
        quantize=quantize,
        trust_remote_code=trust_remote_code,
        answers=False,
        progress=progress,
    )
    base = loadout.base
    return Stage(engine, choose_dtype(dtype, base.runs_in, base.size, choose_device(device)))
