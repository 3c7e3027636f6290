"""A quantised base runs under a blend, and the experts on it are exact."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny_quantised import WIDE, is_packed, quantised

from laws.cases import Case
from lmoe_cli.bake.plan import make_plan
from lmoe_cli.bank import bank
from lmoe_cli.bank.product import Products
from lmoe_cli.engine.build import start
from lmoe_cli.errors import UsageError
from lmoe_cli.findings import RefusedError


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A base whose layers are wide enough to be quantised, with adapters on it."""
    folder = tmp_path_factory.mktemp("wide")
    base = tiny.save_base("llama", folder / "base", **WIDE)
    made = {variant: tiny.save_adapter(base, variant, folder / variant) for variant in ("lora", "dora")}
    return {variant: Case(base, adapter, adapter) for variant, adapter in made.items()}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("length", [1, 12])
def test_an_expert_on_a_quantised_base_acts_on_what_the_quantised_weights_stand_for(
    kind, variant, length, wide, tmp_path
):
    from peft.utils.integrations import dequantize_module_weight

    own, tokens = wide[variant], tiny.tokens(1, length)
    dense = tiny.load(own.base)
    for name, module in quantised(own.base, kind).named_modules():  # before a forward packs the weights
        if is_packed(module):
            dense.get_submodule(name).weight.data = dequantize_module_weight(module).float()
    with torch.no_grad():
        plain = dense(tokens).logits
    dense.save_pretrained(tmp_path)
    with torch.no_grad():
        theirs = tiny.peft_model(tmp_path, own.one)(tokens).logits
    engine = start(own.loadout({"one": 1.0}), device="cpu", dtype="float32", quantize=kind)
    ours = engine.logits(tokens)
    with torch.no_grad():
        noise = (engine.detach()(tokens).logits - plain).abs().max()  # quantised layers compute coarsely
    effect = (theirs - plain).abs().max()
    assert (ours - theirs).abs().max() < 3 * noise + 1e-3
    assert noise < 0.1 * effect, "the comparison would see nothing"


def test_kernels_for_experts_on_packed_weights_are_chosen_by_matrices_of_their_shapes(wide, monkeypatch):
    shapes = []
    monkeypatch.setattr(bank, "choose_products", lambda weights: shapes.extend(w.shape for w in weights) or Products())
    start(wide["lora"].loadout({"one": 1.0}), device="cpu", dtype="float32", quantize="nf4")
    linear = [module for module in tiny.load(wide["lora"].base).modules() if isinstance(module, torch.nn.Linear)]
    assert sorted(shapes) == sorted(module.weight.shape for module in linear)


def test_shapes_that_have_no_quantised_product_here_are_refused_when_they_are_loaded(tmp_path, monkeypatch):
    """Some CPUs take a path of bitsandbytes that wants multiples of 32; here its product is made to refuse."""
    import bitsandbytes

    def refuse(*_):
        raise AssertionError("N must be divisible by block_n")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", refuse)
    base = tiny.save_base("llama", tmp_path / "base", **WIDE)
    adapter = tiny.save_adapter(base, "lora", tmp_path / "one")
    with pytest.raises(UsageError, match="N must be divisible") as caught:
        start(Case(base, adapter, adapter).loadout({"one": 1.0}), device="cpu", dtype="float32", quantize="nf4")
    assert caught.value.code == "quantize-unsupported"


def test_a_quantised_base_cannot_be_folded_into(wide):
    engine = start(wide["lora"].loadout({"one": 1.0}), device="cpu", dtype="float32", quantize="nf4")
    before = engine.logits(tiny.tokens())
    with pytest.raises(UsageError, match="quantised"):
        engine.fold()
    assert torch.equal(engine.logits(tiny.tokens()), before)


def test_a_checkpoint_that_is_stored_quantised_runs_but_is_not_baked(wide, tmp_path):
    from lmoe_cli.check import check
    from lmoe_cli.loadout.loadout import resolve
    from lmoe_cli.loadout.recipe import Recipe

    quantised(wide["lora"].base, "nf4").save_pretrained(tmp_path / "quantised")
    experts = {"one": {"adapter": str(wide["lora"].one)}}
    recipe = Recipe.model_validate({"base": str(tmp_path / "quantised"), "experts": experts})
    loadout = resolve(recipe, "a test")
    report = check(loadout)
    assert report.ok
    assert "base-quantized" in {item.code for item in report.findings}
    engine = start(loadout, device="cpu", dtype="float32")
    fresh = start(wide["lora"].loadout({"one": 1.0}), device="cpu", dtype="float32", quantize="nf4")
    torch.testing.assert_close(engine.logits(tiny.tokens()), fresh.logits(tiny.tokens()))
    with pytest.raises(RefusedError):
        make_plan(loadout)
