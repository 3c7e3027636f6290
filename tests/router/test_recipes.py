"""The recipes with routers that come along fit, and route as they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lmoe_cli
from lmoe_cli.check import check
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.parse import read_recipe

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("name", ["party-encoder", "party-arrow"])
def test_the_parts_of_a_recipe_fit_without_a_remark(name):
    path = RECIPES / f"{name}.yaml"
    found = [item for item in check(resolve(read_recipe(path), str(path))).findings if item.severity != "note"]
    assert found == []


@pytest.mark.parametrize(
    ("prompt", "expert"),
    [
        ("A bandit attacks the village.", "warrior"),
        ("The mirror is cursed.", "mage"),
        ("My brother is wounded.", "healer"),
    ],
)
def test_a_prompt_that_no_example_holds_goes_where_it_belongs(prompt, expert):
    engine = lmoe_cli.load(RECIPES / "party-encoder.yaml", device="cpu", dtype="float32")
    assert all(prompt not in item.entry.examples for item in engine.loadout.experts)
    engine.stream(prompt)
    gates = dict(zip(engine.bank.names, engine.bank.gates.values[0].tolist(), strict=True))
    assert gates[expert] > 0.5, gates


def test_arrow_gives_each_token_two_experts_that_differ_from_token_to_token():
    engine = lmoe_cli.load(RECIPES / "party-arrow.yaml", device="cpu", dtype="float32")
    with engine.router.watched() as seen:
        engine.logits(torch.tensor([engine.encode("A goblin blocks the bridge.")]))
    gates = torch.cat([one[0] for one in seen.values()])  # (P, T, E)
    assert ((gates > 0).sum(-1) == 2).all()
    assert torch.allclose(gates.sum(-1), torch.tensor(1.0), atol=1e-5)
    assert (gates > 0).any(0).all()
    assert not (gates[:, :1] > 0).eq(gates > 0).all()
