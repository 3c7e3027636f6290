"""What an adapter holds per module agrees with PEFT, for every kind of adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny

from lmoe_cli.adapter.adapter import Adapter, read_adapter
from lmoe_cli.source import open_source

CASES = [
    *[("llama", variant) for variant in tiny.VARIANTS if variant not in ("experts", "gate")],
    *[("gpt2", variant) for variant in ("lora", "dora", "embedding", "bias", "saved_norm", "ia3", "vera")],
    *[("qwen3_moe", variant) for variant in ("experts", "gate", "head")],
    *[("mixtral", variant) for variant in ("experts", "gate")],
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {arch: tiny.save_base(arch, tmp_path_factory.mktemp(arch)) for arch in {arch for arch, _ in CASES}}


def peft_layers(base: Path, folder: Path) -> dict[str, object]:
    """Module, or parameter of a module, as lmoe names it → PEFT's layer."""
    found: dict[str, object] = {}
    for name, layer in tiny.peft_model(base, folder).named_modules():
        if not hasattr(layer, "base_layer"):
            continue
        module = name.removeprefix("base_model.model.").replace(".base_layer", "")
        parameter = getattr(layer, "parameter_name", "weight")
        found[module if parameter == "weight" else f"{module}.{parameter}"] = layer
    return found


@pytest.mark.parametrize(("arch", "variant"), CASES)
def test_every_tensor_has_a_place_and_every_module_the_rank_and_scaling_of_peft(bases, tmp_path, arch, variant):
    folder = tiny.save_adapter(bases[arch], variant, tmp_path / "adapter")
    adapter = read_adapter(open_source(str(folder)))
    placed = [tensor.name for part in adapter.parts.values() for tensor in part.tensors.values()]
    assert sorted(placed + [tensor.name for tensor in adapter.shared.values()]) == sorted(adapter.stored)
    layers = peft_layers(bases[arch], folder)
    adapted = {module: part for module, part in adapter.parts.items() if part.kind != "saved"}
    assert set(adapted) == set(layers)
    for module, part in adapted.items():
        layer = layers[module]
        if part.kind == "ia3":
            continue
        assert part.rank == layer.r["default"]
        if part.kind != "vera":
            assert part.scaling == pytest.approx(layer.scaling["default"], rel=1e-12)
        if part.kind in ("lora", "loha", "lokr"):
            assert part.experts == getattr(layer, "num_experts", 1)
            assert part.shape == (layer.out_features, layer.in_features)


def changed(adapter: Adapter, tmp_path: Path, **changes: object) -> Adapter:
    """The same weights under another config."""
    folder = tmp_path / "changed"
    folder.mkdir()
    config = json.loads((adapter.source.path / "adapter_config.json").read_text()) | changes
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = "adapter_model.safetensors"
    (folder / weights).write_bytes((adapter.source.path / weights).read_bytes())
    return read_adapter(open_source(str(folder)))


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha_pattern": {"q_proj": 3, "layers.1.self_attn.q_proj": 5, "v.proj": 7}},
        {"alpha_pattern": {"layers.1.self_attn.q_proj": 5, "q_proj": 3}},
        {"alpha_pattern": {r".*\.1\..*(q|v)_proj": 2.5, "^model.layers.0.mlp.up_proj": 4}, "use_rslora": True},
        {"alpha_pattern": {"proj": 9, "self_attn": 9, "o_proj$": 1}, "lora_alpha": 0},
        {"lora_alpha": -3.5},
    ],
)
def test_alpha_patterns_scale_the_modules_that_peft_scales(bases, tmp_path, changes):
    original = read_adapter(open_source(str(tiny.save_adapter(bases["llama"], "lora", tmp_path / "adapter"))))
    adapter = changed(original, tmp_path, **changes)
    theirs = {
        name: layer.scaling["default"] for name, layer in peft_layers(bases["llama"], adapter.source.path).items()
    }
    assert {module: part.scaling for module, part in adapter.parts.items()} == pytest.approx(theirs)


@pytest.mark.parametrize(
    "keys", [("r",), ("lora_alpha",), ("r", "lora_alpha"), ("use_rslora", "rank_pattern", "alpha_pattern")]
)
def test_a_missing_key_has_the_value_that_peft_gives_it(bases, tmp_path, keys):
    original = read_adapter(open_source(str(tiny.save_adapter(bases["llama"], "lora", tmp_path / "adapter", rank=8))))
    config = json.loads((original.source.path / "adapter_config.json").read_text())
    path = original.source.path / "adapter_config.json"
    path.write_text(json.dumps({key: value for key, value in config.items() if key not in keys}))
    adapter = read_adapter(open_source(str(original.source.path)))
    theirs = {
        name: layer.scaling["default"] for name, layer in peft_layers(bases["llama"], adapter.source.path).items()
    }
    assert {module: part.scaling for module, part in adapter.parts.items()} == pytest.approx(theirs)


def test_patterns_name_fused_parameters_as_peft_does(bases, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=["mlp.gate.weight", "experts.down_proj", "experts.gate_up_proj"],
        rank_pattern={"gate.weight": 2, r"0.*experts\.down_proj": 3},
        alpha_pattern={"mlp.gate": 100, "gate.weight": 5, "down_proj": 7},
    )
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases["qwen3_moe"]), config).save_pretrained(tmp_path)
    adapter = read_adapter(open_source(str(tmp_path)))
    layers = peft_layers(bases["qwen3_moe"], tmp_path)
    theirs = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    assert {module: (part.rank, part.scaling) for module, part in adapter.parts.items()} == theirs
