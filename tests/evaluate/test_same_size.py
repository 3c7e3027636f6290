"""One LoRA in the place of several has as many numbers as they have, on the layers that they change."""

from __future__ import annotations

import pytest

from evaluate.made import loadout
from lmoe_cli.errors import UsageError
from lmoe_cli.evaluate.same_size import TOLERANCE, about_size, same_size
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.train.config import TrainedExpert
from lmoe_cli.train.fresh import write_fresh

KINDS = [("llama", "lora"), ("llama", "dora"), ("llama", "patterns"), ("llama", "head"), ("gpt2", "lora")]


@pytest.mark.parametrize(("arch", "variant"), [*KINDS, ("qwen3_moe", "lora"), ("qwen3_moe", "experts")])
def test_what_is_made_at_that_rank_has_as_many_numbers_on_linear_layers_that_experts_change(tmp_path, arch, variant):
    found = loadout(arch, one=variant, two=variant)
    size = same_size(found)
    write_fresh(tmp_path, found.base, TrainedExpert(rank=size.rank, targets=size.targets, data="x.jsonl"), seed=0)
    recipe = {"base": found.recipe.base, "experts": {"fresh": {"adapter": str(tmp_path)}}}
    (fresh,) = resolve(Recipe.model_validate(recipe), "a test").experts
    numbers = sum(tensor.info.elements for tensor in fresh.adapter.stored.values())
    assert abs(numbers - size.numbers) <= numbers / size.rank / 2
    changed = {module for expert in found.experts for module in expert.adapter.parts}
    assert set(size.targets) == set(fresh.adapter.parts) <= changed


def test_sizes_that_differ_by_more_than_rounding_are_told_with_both_numbers():
    size = same_size(loadout(one="lora"))
    for numbers in (size.numbers, int(size.numbers * (1 + TOLERANCE)), int(size.numbers * (1 - TOLERANCE)) + 1):
        assert about_size(size, numbers) == []
    for numbers in (int(size.numbers * (1.01 + TOLERANCE)), int(size.numbers * (0.99 - TOLERANCE))):
        (told,) = about_size(size, numbers)
        assert (told.code, told.severity) == ("retrained-size", "warning")
        assert f"{numbers} numbers" in told.message
        assert str(size.numbers) in told.message


def test_experts_without_a_low_rank_product_have_no_such_size():
    with pytest.raises(UsageError) as caught:
        same_size(loadout(one="ia3"))
    assert caught.value.hint == "leave --retrain out"
