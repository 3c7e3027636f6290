"""`lmoe train` on a base and adapters of a Hub on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
import yaml
from safetensors.torch import load, save
from train.made import base, bytes_of, config, run
from train.test_resume import StoppedError, stopping_at

STAGES = [{"train": "experts", "steps": 1}, {"train": "gate", "steps": 2}]
OFTEN = {"save_every": 1, "eval_every": 1}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def changed(data: bytes) -> bytes:
    return save({name: tensor + 1 for name, tensor in load(data).items()})


def test_a_training_goes_on_with_the_commits_that_it_was_begun_with(served, tmp_path):
    tiny.save_adapter(base(), "lora", tmp_path / "adapter")
    shared = {"acme/base": files_of(base()), "acme/lora": files_of(tmp_path / "adapter")}
    commits = {name: served.add(name, files) for name, files in shared.items()}
    made = config(tmp_path, STAGES, experts=("sums", "words"), gate={}, trainer=OFTEN, earlier=tmp_path)
    experts = {name: {"adapter": "acme/lora", "data": f"{name}.jsonl"} for name in made.experts}
    made = type(made).model_validate(made.model_dump() | {"base": "acme/base", "experts": experts})
    whole = run(made, tmp_path, "whole")
    with pytest.raises(StoppedError):
        run(made, tmp_path, tell=stopping_at(3))
    for name, files in shared.items():
        served.commit(name, {file: changed(data) for file, data in files.items() if file.endswith(".safetensors")})
    out = run(made, tmp_path, resume=True)
    assert bytes_of(out) == bytes_of(whole)
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    assert recipe["base"] == f"hf://acme/base@{commits['acme/base']}"
    assert json.loads((out / "router" / "router.json").read_text())["base"]["name"] == recipe["base"]
