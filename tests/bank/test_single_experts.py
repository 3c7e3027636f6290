"""What adapters may do to single experts of a mixture, against the formulas on the matrices themselves."""

from __future__ import annotations

import json
import warnings

import peft
import pytest
import tiny
import torch
from laws.cases import assert_close, base, case
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lmoe_cli.bake.model import bake_model
from lmoe_cli.bank import load as loading
from lmoe_cli.check import check
from lmoe_cli.engine.build import start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

LEAVES = {"w1": (32, 48), "w3": (32, 48), "w2": (48, 32)}
"""Of a tiny mixtral: d_in and d_out."""


def loadout_of(folder, adapter, weight=1.0, router="weighted"):
    experts = {"one": {"adapter": str(adapter), "weight": weight}}
    recipe = {"base": str(folder), "experts": experts, "router": {"type": router}}
    return resolve(Recipe.model_validate(recipe), "a test")


def write_adapter(folder, tensors, **config):
    folder.mkdir(parents=True, exist_ok=True)
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"task_type": "CAUSAL_LM", **config}))
    return folder


def is_computed(loadout, expected, tmp_path):
    """Live, folded and baked."""
    engine = start(loadout, device="cpu", dtype="float32")
    assert_close(engine.logits(tiny.tokens()), expected)
    engine.fold()
    assert_close(engine.logits(tiny.tokens()), expected)
    bake_model(loadout, tmp_path / "baked")
    with torch.no_grad():
        assert_close(tiny.load(tmp_path / "baked")(tiny.tokens()).logits, expected)


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_row_and_column_scales_reach_single_experts(kind, tmp_path):
    """Of adapters in the names of transformers 4: DoRA (arXiv 2402.09353, eq. 5), and IA3 (arXiv 2205.05638)."""
    torch.manual_seed(2)
    by_hand, tensors, weight = tiny.load(base("mixtral")), {}, 0.5
    for layer in range(2):
        experts = by_hand.model.layers[layer].mlp.experts
        for number in range(4):
            for leaf, (d_in, d_out) in LEAVES.items():
                name = f"model.layers.{layer}.block_sparse_moe.experts.{number}.{leaf}"
                whole = experts.down_proj if leaf == "w2" else experts.gate_up_proj
                rows = slice(48, 96) if leaf == "w3" else slice(0, d_out)
                matrix = whole.detach()[number, rows]
                if kind == "ia3":
                    scale = 1 + 0.3 * torch.randn((1, d_in) if leaf == "w2" else (d_out, 1))
                    tensors[f"{name}.ia3_l"] = scale
                    changed = matrix * scale
                else:
                    a, b = torch.randn(4, d_in) * 0.2, torch.randn(d_out, 4) * 0.2
                    changed = matrix + 1.5 * b @ a
                    length = matrix.norm(dim=1) * (1 + 0.2 * torch.randn(d_out)).abs()
                    changed = changed * (length / changed.norm(dim=1))[:, None]
                    tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
                    tensors[f"{name}.lora_magnitude_vector"] = length
                with torch.no_grad():
                    whole[number, rows] += weight * (changed - matrix)
    targets = {"target_modules": list(LEAVES)}
    lora = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_dora": True, **targets}
    config = {"peft_type": "IA3", "feedforward_modules": ["w2"], **targets} if kind == "ia3" else lora
    adapter = write_adapter(tmp_path / kind, tensors, **config)
    with torch.no_grad():
        expected = by_hand(tiny.tokens()).logits
    is_computed(loadout_of(base("mixtral"), adapter, weight), expected, tmp_path)


def test_biases_of_single_experts_are_refused_by_name(tmp_path):
    name = "model.layers.0.block_sparse_moe.experts.0.w1"
    tensors = {f"{name}.lora_A.weight": torch.ones(4, 32), f"{name}.lora_B.weight": torch.ones(48, 4)}
    tensors[f"{name}.lora_B.bias"] = torch.ones(48)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_bias": True, "target_modules": ["w1"]}
    report = check(loadout_of(base("mixtral"), write_adapter(tmp_path / "biased", tensors, **config)))
    (told,) = [item for item in report.findings if item.severity == "error"]
    assert told.code == "experts-unsupported"
    assert "experts.0.w1" in told.message


@pytest.fixture(scope="module")
def without_gates(tmp_path_factory):
    """A base whose experts have no gate projection."""
    torch.manual_seed(0)
    small = {key: value for key, value in tiny.LLAMA.items() if key != "num_hidden_layers"}
    config = AutoConfig.for_model(
        "nemotron_h", **small, head_dim=8, layers_block_type=["moe", "full_attention"], n_routed_experts=4,
        num_experts_per_tok=2, moe_intermediate_size=24, moe_shared_expert_intermediate_size=24, mamba_num_heads=4,
        mamba_head_dim=8, ssm_state_size=8, n_groups=1, use_mamba_kernels=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("without-gates")
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    model.save_pretrained(folder)
    return folder


def test_single_experts_without_a_gate_projection(without_gates, tmp_path):
    torch.manual_seed(1)
    by_hand, tensors = tiny.load(without_gates), {}
    experts = by_hand.model.layers[0].mixer.experts
    for number in range(4):
        for leaf in ("up_proj", "down_proj"):
            matrix = getattr(experts, leaf)
            a, b = torch.randn(3, matrix.shape[2]) * 0.3, torch.randn(matrix.shape[1], 3) * 0.3
            with torch.no_grad():
                matrix[number] += 2.0 * b @ a
            name = f"backbone.layers.0.mixer.experts.{number}.{leaf}"
            tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["up_proj", "down_proj"]}
    with torch.no_grad():
        expected = by_hand(tiny.tokens()).logits
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    is_computed(loadout_of(without_gates, adapter), expected, tmp_path)


def test_fused_experts_without_a_gate_projection_are_as_in_peft(without_gates, tmp_path):
    names = ["experts.up_proj", "experts.down_proj"]
    lora = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=names, **lora)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny.load(without_gates), config).eval()
    theirs.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        expected = theirs(tiny.tokens()).logits
    is_computed(loadout_of(without_gates, tmp_path / "adapter"), expected, tmp_path)


def test_stacked_experts_are_read_once(monkeypatch):
    """Not once for each of them."""
    own, read = case("qwen3_moe", "experts"), []
    reads = loading.ExpertWeights._read

    def watched(self, stored):
        read.append(stored.name)
        return reads(self, stored)

    monkeypatch.setattr(loading.ExpertWeights, "_read", watched)
    own.engine({"one": 1.0})
    assert any("experts" in name for name in read)
    assert len(read) == len(set(read))


def test_check_tells_where_a_token_router_does_not_decide():
    own = case("qwen3_moe", "gate")
    recipe = {"base": str(own.base), "experts": {"one": {"adapter": str(own.one)}}, "router": {"type": "arrow"}}
    report = check(resolve(Recipe.model_validate(recipe), "a test"))
    (told,) = [item for item in report.findings if item.code == "routed-in-part"]
    assert "mlp.gate" in told.message


def test_rows_turn_the_gates_of_a_token_router_on_single_experts_too(tmp_path):
    """A mixture's experts read tokens one after the other; rows that turn an expert off are as without it."""
    own = case("mixtral", "experts")
    experts = {"one": {"adapter": str(own.one)}, "two": {"adapter": str(own.two)}}
    recipe = {"base": str(own.base), "experts": experts, "router": {"type": "arrow", "top_k": 2}}
    engine = start(resolve(Recipe.model_validate(recipe), "a test"), device="cpu", dtype="float32")
    due = []
    for row, weights in enumerate(([1.0, 0.0], [0.0, 1.0])):
        engine.set_gates(weights)
        due.append(engine.logits(tiny.tokens())[row])
    engine.set_gates([[1.0, 0.0], [0.0, 1.0]])
    assert_close(engine.logits(tiny.tokens()), torch.stack(due))
