"""Two processes train what one process trains with the same global batch, whole or with the base spread over them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from train.made import config, run

STAGES = [
    {"train": "experts", "steps": 2, "together": True, "clip": 0},
    {"train": "joint", "steps": 3, "balance": 0.3, "z": 0.1, "clip": 0},
]
GATE = {"activation": "softmax", "init": "arrow"}


def in_order(folder, **trainer):
    """A config whose rows are few enough to be one batch, so that no process sees others than one alone would."""
    return config(folder, STAGES, gate=GATE, trainer={"schedule": "constant", "warmup": 0, **trainer})


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [[line[key] for key in ("loss", "balance", "z") if key in line] for line in lines if "loss" in line]


@pytest.mark.parametrize("words", [{}, {"shard": True, "checkpointing": True}])
def test_two_processes_are_one(tmp_path, words):
    one = run(in_order(tmp_path, batch_size=54), tmp_path, "one")
    made = in_order(tmp_path, batch_size=27, **words)
    (tmp_path / "train.yaml").write_text(
        yaml.safe_dump(made.model_dump(mode="json", exclude_none=True), sort_keys=False)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "lmoe_cli"]
    command += ["train", "train.yaml", "--out", "two", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two"
    assert len(losses(one)) == 5
    for found, due in zip(losses(two), losses(one), strict=True):
        assert found == pytest.approx(due, rel=1e-4)
    for file in ("experts/sums/adapter_model.safetensors", "router/router.safetensors"):
        found, due = load_file(two / file), load_file(one / file)
        for name, tensor in due.items():
            torch.testing.assert_close(found[name], tensor, rtol=2e-2, atol=2e-3)
    assert not list(tmp_path.glob("*.work"))
