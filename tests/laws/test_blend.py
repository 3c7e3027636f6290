"""The laws of a blend, over kinds of adapters and architectures, against PEFT and transformers."""

from __future__ import annotations

import json

import pytest
import tiny
import torch

from laws.cases import ARCHITECTURES, CASES, MIXED, alone, assert_close, base, case, mixed, summed

pytestmark = pytest.mark.usefixtures("path")


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_one_expert_at_weight_1_is_that_adapter_in_peft(arch, variant):
    theirs = alone(arch, variant)
    engine = case(arch, variant).engine({"one": 1.0})
    assert_close(engine.logits(tiny.tokens()), theirs)
    assert not torch.allclose(theirs, engine.detach()(tiny.tokens()).logits, atol=1e-3), "the adapter does nothing"


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_weight_0_is_the_base_to_the_last_bit(arch, variant, path):
    engine = case(arch, variant).engine({"one": 0.0, "two": 0.0})
    blended = engine.logits(tiny.tokens())
    bare = engine.detach()
    alone = engine.logits(tiny.tokens()) if path == "compiled" else bare(tiny.tokens()).logits
    assert torch.equal(blended, alone)


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_a_blend_is_the_base_plus_what_peft_merges_for_each_expert_times_its_weight(arch, variant, path):
    folder = base(arch)
    tied = json.loads((folder / "config.json").read_text()).get("tie_word_embeddings", arch != "llama")
    if variant == "lora_bias":
        pytest.skip("PEFT cannot merge a bias into layers without one")
    if tied and variant in ("embedding", "embedding_dora", "head", "saved"):
        pytest.skip("PEFT merges tied weights into both places")
    assert_close(mixed(arch, variant, path), summed(arch, variant))


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_the_order_of_experts_does_not_matter(arch, variant, path):
    turned = {"two": MIXED["two"], "one": MIXED["one"]}
    assert_close(case(arch, variant).engine(turned).logits(tiny.tokens()), mixed(arch, variant, path))


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_rows_of_a_batch_carry_blends_of_their_own(arch, variant):
    engine = case(arch, variant).engine(MIXED)
    rows = tiny.tokens(rows=3)
    gates = torch.tensor([[1.0, 0.0], [0.7, -0.4], [0.0, 2.0]])
    engine.set_gates(gates)
    together = engine.logits(rows)
    for row, own in enumerate(gates):
        engine.set_gates(own[None])
        assert_close(together[row], engine.logits(rows[row : row + 1])[0])


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_folding_computes_the_live_blend_and_unfolding_leaves_every_bit_as_it_was(arch, variant, path):
    engine = case(arch, variant).engine(MIXED)
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    engine.fold()
    assert_close(engine.logits(tiny.tokens()), mixed(arch, variant, path))
    engine.unfold()
    after = engine.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_detaching_leaves_the_base_as_transformers_loads_it(arch):
    engine = case(arch, "lora").engine(MIXED)
    engine.logits(tiny.tokens())
    ours, theirs = engine.detach().state_dict(), tiny.load(base(arch)).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_changed_weight_acts_at_once_and_is_undone_by_changing_it_back(arch):
    engine = case(arch, "lora").engine(MIXED)
    first = engine.logits(tiny.tokens())
    engine.set_weights(one=2.0)
    assert not torch.allclose(engine.logits(tiny.tokens()), first, atol=1e-2)
    engine.set_weights(one=MIXED["one"])
    assert torch.equal(engine.logits(tiny.tokens()), first)
