"""One base with two experts on it per architecture and kind of adapter, made once and shared by all laws."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch

from lmoe_cli.engine.build import start
from lmoe_cli.engine.engine import Engine
from lmoe_cli.loadout.loadout import Loadout, resolve
from lmoe_cli.loadout.recipe import Recipe

ROOT = Path(tempfile.mkdtemp(prefix="lmoe-laws-"))
IMPOSSIBLE = {("gpt2", "loha"), ("gpt2", "lokr")}
ALIKE = ("mistral", "olmo2")
"""Have the linear layers of llama under the same names, so kinds of adapters differ there as they do in llama."""
CASES = [
    pytest.param(arch, variant, id=f"{arch}-{variant}", marks=pytest.mark.xdist_group(arch))
    for arch in tiny.ARCHITECTURES
    for variant in tiny.VARIANTS
    if (arch, variant) not in IMPOSSIBLE and (variant not in ("experts", "gate") or arch in ("qwen3_moe", "mixtral"))
]
EACH = {
    *(("llama", variant) for variant in tiny.VARIANTS), *((arch, "lora") for arch in tiny.ARCHITECTURES),
    ("gpt2", "dora"), ("qwen3_moe", "experts"), ("qwen3_moe", "gate"), ("mixtral", "experts"),
}  # fmt: skip
"""Every kind of adapter and every architecture, though not each of these on each of those, as on the usual path."""
ARCHITECTURES = [pytest.param(arch, id=arch, marks=pytest.mark.xdist_group(arch)) for arch in tiny.ARCHITECTURES]
MIXED = {"one": 0.7, "two": -0.4}
"""Weights of a blend: one expert weak, the other turned around."""


@dataclass(frozen=True)
class Case:
    """A loadout of two experts, and how to run it."""

    base: Path
    one: Path
    """Of the kind that is tested."""
    two: Path
    """Plain LoRA of another rank."""

    def loadout(self, weights: Mapping[str, float]) -> Loadout:
        return _resolved(self, json.dumps(weights))

    def engine(self, weights: Mapping[str, float]) -> Engine:
        return start(self.loadout(weights), device="cpu", dtype="float32")


@functools.cache
def _resolved(own: Case, weights: str) -> Loadout:
    folders = {"one": own.one, "two": own.two}
    experts = {name: {"adapter": str(folders[name]), "weight": weight} for name, weight in json.loads(weights).items()}
    return resolve(Recipe.model_validate({"base": str(own.base), "experts": experts}), "a test")


@functools.cache
def base(arch: str) -> Path:
    return tiny.save_base(arch, ROOT / arch)


@functools.cache
def _loaded(folder: Path) -> torch.nn.Module:
    return tiny.load(folder)


def fresh(folder: Path) -> torch.nn.Module:
    """A base as transformers loads it, from the disk the first time alone: loading is no matter of the laws."""
    return copy.deepcopy(_loaded(folder))


@functools.cache
def case(arch: str, variant: str) -> Case:
    folder = base(arch)
    one = tiny.save_adapter(folder, variant, ROOT / f"{arch}-{variant}")
    two = ROOT / f"{arch}-other"
    if not two.exists():
        tiny.save_adapter(folder, "lora", two, seed=9, rank=3)
    assert one is not None
    return Case(folder, one, two)


@functools.cache
def short() -> Case:
    """Two LoRAs on a llama of one layer, for tests that compile it, which takes seconds for each."""
    folder = tiny.save_base("llama", ROOT / "short", num_hidden_layers=1)
    one, two = ROOT / "short-one", ROOT / "short-two"
    tiny.save_adapter(folder, "lora", one)
    tiny.save_adapter(folder, "lora", two, seed=9, rank=3)
    return Case(folder, one, two)


@functools.cache
def mixed(arch: str, variant: str, path: str) -> torch.Tensor:
    """Logits of the live blend of both experts, as they are computed on a path."""
    return case(arch, variant).engine(MIXED).logits(tiny.tokens())


@functools.cache
def _in_peft(base: Path, adapter: Path) -> torch.nn.Module:
    return tiny.peft_on(fresh(base), adapter)


@functools.cache
def alone(arch: str, variant: str) -> torch.Tensor:
    """Logits of one expert in PEFT."""
    own = case(arch, variant)
    with torch.no_grad():
        return _in_peft(own.base, own.one)(tiny.tokens()).logits


@functools.cache
def _merged(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Weights of a base with an adapter merged into it by PEFT, which nothing else is asked of afterwards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _in_peft(base, adapter).merge_and_unload().state_dict()


@functools.cache
def summed(arch: str, variant: str) -> torch.Tensor:
    """Logits of the base plus what PEFT merges for each expert of the blend, times its weight."""
    alone(arch, variant)  # before it is merged
    own = case(arch, variant)
    blended = fresh(own.base)
    before = {name: tensor.double() for name, tensor in blended.state_dict().items()}
    total = {name: tensor.clone() for name, tensor in before.items()}
    for folder, weight in ((own.one, MIXED["one"]), (own.two, MIXED["two"])):
        for name, tensor in _merged(own.base, folder).items():
            total[name] += weight * (tensor.double() - before[name])
    blended.load_state_dict({name: tensor.float() for name, tensor in total.items()})
    with torch.no_grad():
        return blended(tiny.tokens()).logits


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal up to what float32 sums in another order may differ."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
