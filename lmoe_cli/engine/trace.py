"""Which expert has how much say in which token of a text, place by place.

A token's gates are those with which the model reads it. Where they are the same for every token, because the router
decides once per prompt or not at all, they are computed without running the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lmoe_cli.adapter.names import HEADS
from lmoe_cli.bank.blocks import block_names
from lmoe_cli.bank.routed import MODEL
from lmoe_cli.engine.cache import last_only
from lmoe_cli.engine.engine import Engine
from lmoe_cli.engine.generate import Decoder
from lmoe_cli.engine.say import shares
from lmoe_cli.engine.widened import for_prompts
from lmoe_cli.loadout.routers import Scope
from lmoe_cli.router.token import TokenRouter


@dataclass(frozen=True)
class Spot:
    """A place that has gates of its own."""

    name: str
    """Of the first module of a site, of a block, or ``model``."""
    layer: int | None
    """Number of the block it is in; None outside of blocks, and where one gate is for all."""

    @property
    def label(self) -> str:
        """What stands for its layer: a number, or its own name."""
        return self.name if self.layer is None else str(self.layer)


@dataclass(frozen=True)
class Trace:
    """The gates of a text."""

    names: tuple[str, ...]
    """Of the experts, in the order of the gates."""
    scope: Scope
    """What the gates depend on."""
    spots: tuple[Spot, ...]
    gates: Tensor
    """g, (P, T, E), float32, on the CPU: of each place and token."""
    left_out: tuple[str, ...] = ()
    """Places where the model does not read every token, so that nobody can tell whose gates are whose."""

    def shares(self, places: Sequence[int] | None = None) -> Tensor:
        """How much say each expert has in each token, (T, E); see `say`.

        Args:
            places: Numbers of those that count; all of them when None.
        """
        return shares((self.gates if places is None else self.gates[list(places)]).mean(0))

    @cached_property
    def layers(self) -> Mapping[str, list[int]]:
        """Label of each layer, in order → numbers of its places."""
        found: dict[str, list[int]] = {}
        for number, spot in enumerate(self.spots):
            found.setdefault(spot.label, []).append(number)
        return found


def trace(engine: Engine, tokens: Sequence[int]) -> Trace:
    """The gates of each token of a text.

    Args:
        engine: With the weights in force; a router that decides per prompt has read it.
        tokens: T of them, at least one.
    """
    names, router = engine.bank.names, engine.router
    if not isinstance(router, TokenRouter):
        with engine.still():
            row = engine.bank.gates.values[:1].cpu()  # (1, E)
        spots, profile = _profile(engine)
        return Trace(names, router.scope, spots, (row * profile)[:, None].expand(-1, len(tokens), -1).clone())
    with router.watched() as seen:
        _read(engine, tokens)
    at, left_out = {}, []
    for spot in _spots(engine, seen):
        whole = [rows for one in seen[spot.name] if len(rows := one.reshape(-1, len(names))) == len(tokens)]
        if whole:
            at[spot] = torch.stack(whole).mean(0)  # of a module that reads its input more than once
        elif seen[spot.name]:
            left_out.append(spot.name)
        else:  # its experts are all at rest
            at[spot] = torch.zeros(len(tokens), len(names))
    gates = torch.stack([rows.float().cpu() for rows in at.values()]) if at else torch.zeros(1, len(tokens), len(names))
    return Trace(names, router.scope, tuple(at) or (Spot(MODEL, None),), gates, tuple(left_out))


@torch.inference_mode()
def _read(engine: Engine, tokens: Sequence[int]) -> None:
    """Let the model read a text; logits of every token are computed only where the head has gates of its own."""
    heads = {*HEADS, "output"} & {name.rpartition(".")[2] for name in engine.bank.places}
    with engine.still(), for_prompts(engine):
        ids = torch.tensor([list(tokens)], device=engine.bank.gates.values.device)
        engine.model(input_ids=ids, use_cache=False, **({} if heads else last_only(engine.model)))


def _spots(engine: Engine, names: Mapping[str, Any]) -> list[Spot]:
    """Places in the order in which they stand in the model."""
    order = {name: number for number, (name, _) in enumerate(engine.model.named_modules())}
    blocks = block_names(engine.model)
    spots = [Spot(name, _layer(name, blocks)) for name in names]
    return sorted(spots, key=lambda spot: (_inside(spot, len(blocks)), order.get(spot.name, -1)))


def _inside(spot: Spot, count: int) -> int:
    """What is outside of blocks comes after them, but for a gate of the whole model."""
    return -1 if spot.name == MODEL else count if spot.layer is None else spot.layer


def _layer(name: str, blocks: Sequence[str]) -> int | None:
    """Number of the block that something is in; a checkpoint may call the model around the blocks otherwise."""
    ends = [".".join(block.split(".")[-2:]) for block in blocks]
    return next((number for number, end in enumerate(ends) if f".{end}." in f".{name}."), None)


def _profile(engine: Engine) -> tuple[tuple[Spot, ...], Tensor]:
    """What the recipe's rules multiply weights with, (P, E), at each matrix; one place for all where it has none."""
    experts, names = engine.loadout.experts, engine.bank.names
    if not any(isinstance(expert.entry.weight, list) for expert in experts):
        return (Spot(MODEL, None),), torch.ones(1, len(names))
    found: dict[str, Tensor] = {}
    for target, items in engine.loadout.by_target.items():
        row = found.setdefault(target.module, torch.ones(len(names)))
        for number, item in items:
            row[number] = experts[number].profile_at(item.part.module)
    spots = _spots(engine, found)
    return tuple(spots), torch.stack([found[spot.name] for spot in spots])


def texts(engine: Engine, tokens: Sequence[int]) -> list[str]:
    """The text of each token, special ones too; one after the other they are the whole text.

    Of a character that takes several tokens the last one has it all.
    """

    def decode(ids: list[int]) -> str:
        text: str = engine.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    decoder = Decoder(decode, [])
    found = [decoder.add(token) for token in tokens]
    if found:
        found[-1] += decoder.rest()
    return found
