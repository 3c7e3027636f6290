"""One base with two experts on it per architecture and kind of adapter, made once and shared by all laws."""

from __future__ import annotations

import functools
import tempfile
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
CASES = [
    pytest.param(arch, variant, id=f"{arch}-{variant}", marks=pytest.mark.xdist_group(arch))
    for arch in tiny.ARCHITECTURES
    for variant in tiny.VARIANTS
    if (arch, variant) not in IMPOSSIBLE and (variant not in ("experts", "gate") or arch in ("qwen3_moe", "mixtral"))
]
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
        folders = {"one": self.one, "two": self.two}
        experts = {name: {"adapter": str(folders[name]), "weight": weight} for name, weight in weights.items()}
        return resolve(Recipe.model_validate({"base": str(self.base), "experts": experts}), "a test")

    def engine(self, weights: Mapping[str, float]) -> Engine:
        return start(self.loadout(weights), device="cpu", dtype="float32")


@functools.cache
def base(arch: str) -> Path:
    return tiny.save_base(arch, ROOT / arch)


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
def mixed(arch: str, variant: str) -> torch.Tensor:
    """Logits of the live blend of both experts."""
    return case(arch, variant).engine(MIXED).logits(tiny.tokens())


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Equal up to what float32 sums in another order may differ."""
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
