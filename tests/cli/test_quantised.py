"""Commands on a base that is stored quantised."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import tiny_quantised
import torch
from cli.test_commands import document
from commands import lmoe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    base = tiny.save_base("llama", folder / "base", **tiny_quantised.WIDE)
    tiny.save_base("llama", folder / "other", seed=1, **tiny_quantised.WIDE)
    tiny.save_adapter(base, "lora", folder / "one")
    tiny_quantised.quantised(base, "nf4", torch.bfloat16).save_pretrained(folder / "packed")
    (folder / "mix.yaml").write_text("base: ./packed\nexperts: {one: {adapter: ./one, weight: 0.7}}\n")
    return folder


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_a_packed_base_is_baked_from_what_it_stands_for(place):
    done = lmoe("bake", "mix.yaml", "--out", "out", "--base-weights", "dequantized", "--verify", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "the model that ran quantised, up to one rounding" in " ".join(done.stderr.split())
    assert "verified on" in done.stderr
    assert {tensor.dtype for tensor in tiny_quantised.tensors(place / "out").values()} == {torch.bfloat16}
    report = json.loads((place / "out" / "bake-report.json").read_text())
    assert report["base_weights"]["choice"] == "dequantized"
    assert report["base_weights"]["meaning"] in done.stderr
    assert document(lmoe("check", "--base", "out", "--json", cwd=place), "check")


def test_a_packed_base_is_baked_from_the_model_it_was_made_from(place):
    words = ("--base-weights", "original", "--original", "./base", "--verify", "--json")
    done = lmoe("bake", "mix.yaml", "--out", "out", *words, cwd=place)
    report = document(done, "bake")["data"]["report"]
    assert report["verify"]["ok"]
    assert report["base"]["ref"] == "./base"
    assert len(report["base_weights"]["distance"]["tensors"]) == 14
    assert "not the model that ran quantised" in done.stderr
    assert f"{report['base_weights']['distance']['worst']:.2%}" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        ((), 1, "'--base-weights dequantized' bakes what these weights stand for"),
        (("--base-weights", "original"), 2, "--original REF"),
        (("--base-weights", "original", "--original", "./other"), 1, "is not what ./packed was made from"),
        (("--base-weights", "original", "--original", "demo:adventurer"), 1, "is a qwen3, not a llama"),
        (("--base-weights", "original", "--original", "./nowhere"), 3, "no such folder"),
        (("--base-weights", "original", "--original", "./one"), 3, "no model here"),
        (("--base-weights", "original", "--original", "./packed"), 1, "stored quantised itself"),
        (("--base-weights", "dequantized", "--method", "ties", "--verify"), 2, "no live blend"),
    ],
)
def test_mistakes_about_a_packed_base_are_told_with_the_next_step(place, words, code, reason):
    done = lmoe("bake", "mix.yaml", "--out", "out", *words, cwd=place)
    assert done.returncode == code, done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert not (place / "out").exists()


def test_the_name_that_a_config_claims_is_told_and_not_used(place):
    config = json.loads((place / "packed" / "config.json").read_text())
    (place / "packed" / "config.json").write_text(json.dumps({**config, "_name_or_path": "./base"}))
    done = lmoe("bake", "mix.yaml", "--out", "out", "--base-weights", "original", cwd=place)
    assert done.returncode == 2
    assert "its config names ./base" in done.stderr
    assert not (place / "out").exists()


def test_a_damaged_packed_base_is_named(place):
    from safetensors.torch import save_file

    tensors = tiny_quantised.tensors(place / "packed")
    name = "model.layers.0.mlp.up_proj.weight.absmax"
    save_file({**tensors, name: tensors[name][:3].clone()}, place / "packed" / "model.safetensors")
    done = lmoe("bake", "mix.yaml", "--out", "out", "--base-weights", "dequantized", cwd=place)
    assert done.returncode == 2
    assert "error[packing-invalid]" in done.stderr
    assert name in done.stderr


def test_nothing_is_written_over_the_packed_base_either(place):
    (place / "packed" / "bake-report.json").write_text("{}")  # as if lmoe had baked it
    words = ("--base-weights", "original", "--original", "./base", "--force")
    done = lmoe("bake", "mix.yaml", "--out", "packed", *words, cwd=place)
    assert done.returncode == 2
    assert "error[output-is-input]" in done.stderr
    assert (place / "packed" / "model.safetensors").exists()


@pytest.mark.parametrize("words", [("mix.yaml",), ("--base", "base", "--expert", "one=./one", "--quantize", "int8")])
def test_a_quantised_base_is_measured_with_and_without_experts_and_not_folded(place, words):
    settings = ("--rounds", "2", "--steps", "2", "--json")
    found = document(lmoe("bench", *words, *settings, cwd=place), "bench")["data"]
    assert [row["variant"] for row in found["rows"]] == ["base", "bare", "blend"]
    whole = sum(tensor.nbytes for tensor in tiny_quantised.tensors(place / "base").values())
    assert found["step_bytes"] < 0.7 * whole


def test_what_is_stored_quantised_is_not_quantised_again(place):
    done = lmoe("bench", "mix.yaml", "--quantize", "nf4", cwd=place)
    assert done.returncode == 2
    assert "stored quantised" in done.stderr
