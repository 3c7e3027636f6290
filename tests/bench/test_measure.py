"""What a bench measures is what runs."""

from __future__ import annotations

import gc
import logging
import time
from dataclasses import replace
from functools import partial

import pytest
import tiny
import tiny_quantised
import torch
from laws.cases import case
from safetensors.torch import load_file

from bench.small import SMALL
from lmoe_cli.bank.bank import Bank
from lmoe_cli.bench import variants
from lmoe_cli.bench.measure import WARM_UP, measure, step_bytes
from lmoe_cli.bench.shapes import SHAPES
from lmoe_cli.bench.synthetic import KINDS, fill, quantize, synthetic_bank, synthetic_model
from lmoe_cli.bench.work import Decode, Prefill
from lmoe_cli.engine.build import start
from lmoe_cli.errors import UsageError


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", SMALL)
    return synthetic_model("small", None, torch.float32, torch.device("cpu"))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_synthetic_model_is_what_transformers_makes_of_its_weights(model):
    from transformers import Qwen3ForCausalLM

    theirs = Qwen3ForCausalLM(model.config).eval()
    theirs.load_state_dict(model.state_dict())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, theirs(ids).logits)


def test_every_variant_leaves_the_base_as_it_was(model):
    bank = synthetic_bank(model, 3, 4, torch.float32)
    before = state(model)
    for variant in (
        variants.blend(model, bank),
        variants.folded(model, bank, fill),
        variants.peft(model, variants.random_adapters(2, 4)),
    ):
        variant.enter()
        variant.leave()
        after = model.state_dict()
        assert before.keys() == after.keys(), variant.name
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), variant.name


def test_folded_and_blended_compute_the_same(model):
    bank = synthetic_bank(model, 3, 4, torch.float32)
    ids = torch.arange(12)[None]
    logits = []
    for variant in (variants.base(), variants.blend(model, bank), variants.folded(model, bank, fill)):
        variant.enter()
        with torch.no_grad():
            logits.append(model(ids).logits)
        variant.leave()
    torch.testing.assert_close(logits[1], logits[2], rtol=1e-3, atol=1e-4)
    assert not torch.allclose(logits[0], logits[1], atol=1e-3)


def test_a_bench_gives_rows_and_tokens_the_gates_it_says(model):
    bank = synthetic_bank(model, 5, 4, torch.float32)
    seen = []
    real = bank.gates.set
    bank.gates.set = lambda values: (seen.append(values), real(values))
    of_tokens = {(3, 6, 5), (3, 1, 5)}
    ways = (
        (variants.Gating(), {(3, 5)}),
        (variants.Gating(2), of_tokens),
        (variants.Gating(of_tokens=True), of_tokens),
    )
    for gating, expected in ways:
        seen.clear()
        variant = variants.blend(model, bank, gating)
        variant.enter()
        Decode(3, 6, 2).seconds(model, variant.prepare)
        variant.leave()
        assert {tuple(values.shape) for values in seen} == expected
        if gating.top:
            assert all((values != 0).sum(-1).eq(2).all() for values in seen)
        else:
            assert not torch.equal(seen[0][0], seen[0][1])
    assert variants.blend(model, bank, variants.Gating(2)).size == bank.size * 2 // 5


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_every_kind_compute_what_their_deltas_add_to_the_base(model, kind):
    bank = synthetic_bank(model, 3, 4, torch.float32, kind)
    name = "model.layers.0.self_attn.v_proj"
    layer = bank.modules[name]
    x = torch.randn(2, 5, 64)
    y = layer.base(x)
    start, stop = layer.shared.bounds[layer.member]
    expected = y + x @ ((layer.b.matrix / 3) @ layer.shared.a[start:stop]).T
    if kind in ("dora", "all"):
        expected = expected + y * layer.row.stack.sum(0) / 3
    if kind in ("bias", "all"):
        expected = expected + layer.shift.stack.sum(0) / 3
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    ranks = {rank for _, rank in layer.shared.layout}
    assert ranks == ({2, 4, 6} if kind in ("mixed", "all") else {4})


def test_a_prompt_is_measured_with_the_share_of_arithmetic(model):
    bank = synthetic_bank(model, 2, 4, torch.float32)
    rows = measure(model, [variants.base(), variants.blend(model, bank)], Prefill(2, 16), 3)
    weights = sum(
        module.weight.nbytes
        for name, module in model.named_modules()
        if ".layers." in name and hasattr(module, "weight")
    )
    weights += model.model.norm.weight.nbytes
    assert rows[1].byte_limit == pytest.approx(weights / (weights + bank.size), abs=1e-3)
    assert rows[0].ms_per_token * 16 / 1e3 == pytest.approx(2 * 16 / rows[0].tokens_per_s, rel=0.02)


def test_what_is_compiled_is_what_is_measured_and_the_base_is_left_as_it_was(model, monkeypatch):
    monkeypatch.setattr(
        torch,
        "compile",
        lambda forward, **_: lambda **words: calls.append(words["input_ids"].shape) or forward(**words),
    )
    calls = []
    forward = model.forward
    rows = measure(model, [variants.compiled(model, variants.base())], Decode(2, 4, 3, is_static=True), 2)
    assert rows[0].ratio_to_base == 1.0
    assert calls == [torch.Size([2, 1])] * 3 * (2 + WARM_UP)
    assert model.forward == forward


def test_steps_with_a_norm_that_experts_change_are_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    engine = case("llama", "saved_norm").engine({"one": 0.5, "two": 0.5})
    ways = [variants.base(), variants.of_engine(engine, 2)]
    model = engine.detach()
    rows = measure(model, [variants.compiled(model, way) for way in ways], Decode(1, 4, 3, is_static=True), 1)
    assert [row.experts for row in rows] == [0, 2]
    torch._dynamo.reset()


def test_a_planted_slowdown_of_a_fifth_is_seen(model):
    def slow(variant, seconds):
        def enter():
            model.register_forward_pre_hook(lambda *_: time.sleep(seconds))

        def leave():
            model._forward_pre_hooks.clear()

        return variants.Variant(variant, enter=enter, leave=leave)

    def is_seen():
        rows = measure(model, [slow("base", 0.04), slow("same", 0.04), slow("slower", 0.05)], Decode(1, 4, 4), 5)
        return rows[1].ratio_to_base == pytest.approx(1.0, abs=0.08) and 0.74 < rows[2].ratio_to_base < 0.9

    assert any(is_seen() for _ in range(4))  # the machine may be busy with something else for a while


def test_bytes_of_a_step_are_those_of_the_weights_it_reads(model):
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert step_bytes(model) == total  # tied: the embedding is read as the head
    bank = synthetic_bank(model, 3, 4, torch.float32)
    per_layer = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
    assert bank.size >= 3 * 2 * 4 * 4 * sum(d_in + d_out for d_in, d_out in per_layer)
    assert bank.size < 1.2 * 3 * 2 * 4 * 4 * sum(d_in + d_out for d_in, d_out in per_layer)


def test_the_banks_of_a_recipe_together_hold_less_than_three_times_its_experts(tmp_path):
    loadout = case("llama", "lora").loadout({"one": 0.5})
    (expert,) = loadout.experts
    experts = tuple(replace(expert, name=f"expert{number}") for number in range(9))
    engine = start(replace(loadout, experts=experts), device="cpu", dtype="float32")
    engine.detach()
    found = [variants.of_engine(engine, number) for number in variants.counts(9)]
    assert [variant.experts for variant in found] == [1, 2, 4, 8, 9]
    stored = sum(
        tensor.nbytes for tensor in load_file(expert.adapter.source.require("adapter_model.safetensors")).values()
    )
    banks = [item for item in gc.get_objects() if type(item) is Bank]  # isinstance() would ask dead weak references
    held = sum(bank.size for bank in banks if bank.names[0] == "expert0")
    assert 9 * stored <= held < 3 * 9 * stored


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested", "int8"])
def test_bytes_of_a_quantised_base_are_those_of_its_weights_and_scales_as_they_are_stored(kind, tmp_path):
    base = tiny.save_base("llama", tmp_path / "base", **tiny_quantised.WIDE)
    packed = tiny_quantised.quantised(base, kind)
    packed.save_pretrained(tmp_path / "packed")
    sizes = {name: tensor.nbytes for name, tensor in tiny_quantised.tensors(tmp_path / "packed").items()}
    told = ("quant_map", "quant_state.bitsandbytes__nf4", "weight_format", "embed_tokens.weight")
    tables = 14 * 256 * 4 if kind == "nf4-nested" else 0  # of packed scales, read with them
    read = sum(size for name, size in sizes.items() if not name.endswith(told))
    assert step_bytes(packed) == read + tables
    assert step_bytes(packed) < 0.6 * step_bytes(tiny.load(base))


@pytest.fixture
def remarks():
    """What bitsandbytes warns of, as in a fresh interpreter."""
    logger, handler, told = logging.getLogger("bitsandbytes"), logging.Handler(), []
    handler.emit = lambda record: told.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield told
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_synthetic_model_is_quantised_as_transformers_does_it(monkeypatch, remarks, kind, tmp_path):
    from transformers import AutoModelForCausalLM

    monkeypatch.setitem(SHAPES, "small", {**SMALL, "intermediate_size": 128})
    model = synthetic_model("small", None, torch.float32, torch.device("cpu"))
    model.save_pretrained(tmp_path)
    config = tiny_quantised.settings(kind)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    quantize(model, kind, torch.float32)
    kinds = {name: type(module) for name, module in theirs.named_modules()}
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    ours, expected = model.state_dict(), theirs.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in expected.items())
    bank = synthetic_bank(model, 3, 4, torch.float32)
    rows = measure(model, [variants.base(), variants.blend(model, bank)], Decode(1, 4, 2), 2)
    assert rows[1].byte_limit == pytest.approx(step_bytes(model) / (step_bytes(model) + bank.size), abs=1e-3)
    assert not any("inputs will be cast" in remark for remark in remarks)  # it does so at every product of 8 bit


def test_a_model_that_keeps_no_keys_and_values_is_refused():
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=32, state_size=4, num_hidden_layers=1)).eval()
    with pytest.raises(UsageError) as told:
        measure(model, [variants.base()], Decode(1, 4, 1), 2)
    assert told.value.code == "cache-missing"


def test_a_model_whose_layers_keep_different_things_is_measured():
    (row,) = measure(tiny.model("gemma3_text"), [variants.base()], Decode(2, 4, 1), 2)
    assert row.ratio_to_base == 1.0


def test_a_model_that_reads_more_than_text_is_measured_by_the_part_that_does(tmp_path):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {**tiny.ARCHITECTURES["gemma3_text"], "pad_token_id": 0}
    seen = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = Gemma3Config(text_config=text, vision_config={**seen, "image_size": 32, "patch_size": 16})
    (row,) = measure(Gemma3ForConditionalGeneration(config).eval(), [variants.base()], Decode(1, 4, 1), 2)
    assert row.ratio_to_base == 1.0
