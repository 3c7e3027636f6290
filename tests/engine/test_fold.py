"""A folded blend is the live one, and comes off again to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from laws.cases import assert_close, case

from lmoe_cli.engine.build import start


def started(loadout, **recipe):
    return start(replace(loadout, recipe=loadout.recipe.model_copy(update=recipe)), device="cpu", dtype="float32")


def by_formula(own, weight):
    """W + g (W_peft - W), in every parameter."""
    model = tiny.load(own.base)
    merged = tiny.peft_model(own.base, own.one).merge_and_unload().state_dict()
    before = model.state_dict()
    model.load_state_dict({name: tensor + weight * (merged[name] - tensor) for name, tensor in before.items()})
    with torch.no_grad():
        return model(tiny.tokens()).logits


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("weight", [0.001, -0.3, 0.7])
def test_an_expert_is_skipped_below_skip_below_and_counts_when_equal(weight, folded):
    own = case("llama", "lora")
    engine = started(own.loadout({"one": weight}), skip_below=abs(weight))
    if folded:
        engine.fold()
    assert_close(engine.logits(tiny.tokens()), by_formula(own, weight))

    engine = started(own.loadout({"one": weight}), skip_below=abs(weight) * 1.001)
    if folded:
        engine.fold()
    with torch.no_grad():
        assert torch.equal(engine.logits(tiny.tokens()), tiny.load(own.base)(tiny.tokens()).logits)
