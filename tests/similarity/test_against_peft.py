"""Every kind of adapter against dense deltas: what PEFT merges in float64, less the base."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product

import pytest
import tiny
import tiny_quantised
import torch
from laws.cases import case

from lmoe_cli.adapter.names import layer_of
from lmoe_cli.loadout.loadout import Loadout, resolve
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.similarity.compare import compare
from lmoe_cli.similarity.plan import by_name, on_base
from lmoe_cli.similarity.report import report

WITHOUT_BASE = ("lora", "rslora", "patterns", "embedding", "head", "loha", "lokr", "bias")
WITH_BASE = (*WITHOUT_BASE, "dora", "embedding_dora", "ia3", "vera", "saved", "saved_norm")
CASES = [
    *((arch, variant, False) for arch, variant in product(["llama"], WITHOUT_BASE)),
    *((arch, variant, True) for arch, variant in product(["llama"], WITH_BASE)),
    ("opt", "lora_bias", False), ("gpt2", "lora", False), ("gpt2", "lora", True), ("gpt2", "dora", True),
    ("gpt2", "ia3", True),
    ("gpt2", "embedding_dora", True), ("qwen3", "head", True), ("qwen3_moe", "experts", False),
    ("qwen3_moe", "experts", True), ("mixtral", "experts", True), ("qwen3_moe", "gate", False),
]  # fmt: skip
TIED = {("gpt2", "embedding_dora"): "lm_head.weight", ("qwen3", "head"): "model.embed_tokens.weight"}
"""Where an adapter changes the embedding or the head, and both are one tensor: what it does not mean."""


@dataclass
class Dense:
    """Deltas formed whole, by parameter."""

    one: dict[str, torch.Tensor]
    two: dict[str, torch.Tensor]

    def inner(self, first, second, layer="all"):
        deltas = getattr(self, first), getattr(self, second)
        names = [name for name in deltas[0] if layer == "all" or layer_of(name) == layer]
        return sum(float((deltas[0][name] * deltas[1][name]).sum()) for name in names)

    def cosine(self, layer="all"):
        return self.inner("one", "two", layer) / self.norm("one", layer) / self.norm("two", layer)

    def norm(self, name, layer="all"):
        return self.inner(name, name, layer) ** 0.5


def dense(arch, variant) -> Dense:
    own = case(arch, variant)
    return merged(tiny.load(own.base), own.one, own.two)


def merged(base, *adapters) -> Dense:
    """What PEFT merges into a model in float64, less the model."""
    import peft

    before = {name: tensor.double() for name, tensor in base.state_dict().items()}
    deltas = []
    for adapter in adapters:
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), adapter).double()
        after = model.merge_and_unload().state_dict()
        deltas.append({name: after[name] - tensor for name, tensor in before.items() if not name.endswith("bias")})
    return Dense(*deltas)


def found(arch, variant, *, with_base: bool):
    loadout: Loadout = case(arch, variant).loadout({"one": 1.0, "two": 1.0})
    plan = (on_base(loadout) if with_base else by_name(loadout.experts)).fetched()
    return plan, report(plan, compare(plan))


@pytest.mark.parametrize(("arch", "variant", "with_base"), CASES)
def test_norms_and_cosines_are_those_of_the_dense_deltas(arch, variant, with_base):
    whole = dense(arch, variant)
    if (arch, variant) in TIED:  # merged into one tensor, which stands under two names
        whole.one.pop(TIED[arch, variant])
    _, ours = found(arch, variant, with_base=with_base)
    assert ours["overall"]["norms"] == {name: pytest.approx(whole.norm(name), rel=2e-5) for name in ("one", "two")}
    assert ours["overall"]["pairs"][0]["cosine"] == pytest.approx(whole.cosine(), abs=1e-6)
    for group in ours["layers"]:
        for name in ("one", "two"):
            assert (group["norms"][name] or 0.0) == pytest.approx(whole.norm(name, group["layer"]), rel=2e-5)
        if group["pairs"][0]["cosine"] is not None:
            assert group["pairs"][0]["cosine"] == pytest.approx(whole.cosine(group["layer"]), abs=1e-6)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("with_base", [True, False])
def test_overlaps_are_those_of_singular_vectors_of_the_dense_deltas(arch, with_base):
    whole = dense(arch, "lora")
    _, ours = found(arch, "lora", with_base=with_base)
    for group in ours["matrices"]:
        (name,) = [name for name in whole.one if name.endswith(f"{group['module']}.weight")]
        sides = []
        for deltas, rank in ((whole.one, 4), (whole.two, 3)):
            matrix = deltas[name].T if arch == "gpt2" else deltas[name]  # Conv1D stores (d_in, d_out)
            u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
            sides.append((vh[:rank].T, u[:, :rank]))
        for side, one, two in zip(("input", "output"), *sides, strict=True):
            expected = float((one.T @ two).square().sum()) / 3
            assert group["pairs"][0][f"overlap_{side}"] == pytest.approx(expected, abs=1e-6)


def test_of_dora_without_a_base_the_low_rank_part_is_compared_and_that_is_said():
    own = case("llama", "dora")
    plan, ours = found("llama", "dora", with_base=False)
    assert [item.where for item in plan.findings if item.code == "delta-partial"] == ["one"]
    model = tiny.peft_model(own.base, own.one).double()
    squares = 0.0
    for module in model.modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            squares += float((module.scaling["default"] * b @ a).square().sum())
    assert ours["overall"]["norms"]["one"] == pytest.approx(squares**0.5, rel=1e-6)
    with_base, _ = found("llama", "dora", with_base=True)
    assert not [item for item in with_base.findings if item.code == "delta-partial"]


@pytest.mark.parametrize(("variant", "code", "severity"), [
    ("ia3", "nothing-to-compare", "error"),
    ("vera", "nothing-to-compare", "error"),
    ("saved", "delta-skipped", "warning"),
    ("saved_norm", "delta-skipped", "warning"),
    ("lora_bias", "biases-apart", "note"),
    ("bias", "biases-apart", "note"),
])  # fmt: skip
def test_what_needs_the_base_is_named_where_it_is_not_given(variant, code, severity):
    from lmoe_cli.findings import RefusedError

    try:
        findings = found("llama", variant, with_base=False)[0].findings
    except RefusedError as refused:
        findings = refused.findings
    (item,) = [item for item in findings if item.code == code]
    assert (item.where, item.severity) == ("one", severity)


def test_on_a_packed_base_deltas_are_those_on_what_its_weights_stand_for(tmp_path):
    base = tiny.save_base("llama", tmp_path / "base", **tiny_quantised.WIDE)
    experts = {}
    for name, variant, seed in (("one", "dora", 1), ("two", "lora", 2)):
        experts[name] = {"adapter": str(tiny.save_adapter(base, variant, tmp_path / name, seed=seed))}
    packed = tmp_path / "packed"
    tiny_quantised.quantised(base, "nf4").save_pretrained(packed)
    whole = merged(tiny_quantised.dense(base, packed), tmp_path / "one", tmp_path / "two")
    recipe = Recipe.model_validate({"base": str(packed), "experts": experts})
    plan = on_base(resolve(recipe, "a test")).fetched()
    overall = report(plan, compare(plan))["overall"]
    assert overall["norms"] == {name: pytest.approx(whole.norm(name), rel=2e-5) for name in experts}
    assert overall["pairs"][0]["cosine"] == pytest.approx(whole.cosine(), abs=1e-6)


def test_weights_of_a_recipe_do_not_count():
    loadout = case("llama", "dora").loadout({"one": 0.0, "two": -3.0})
    plain = case("llama", "dora").loadout({"one": 1.0, "two": 1.0})
    ours = [report(plan, compare(plan)) for plan in (on_base(loadout), on_base(plain))]
    assert ours[0] == ours[1]
