"""The party that comes along: its gate is what its training config makes, and tells the classes apart."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

import lmoe_cli
from lmoe_cli.data.records import data_hash, read_records
from lmoe_cli.data.splits import of_split
from lmoe_cli.source import DEMO
from lmoe_cli.split_names import VALID
from lmoe_cli.train.config import as_data, read_config

RECIPES = Path(__file__).parents[2] / "recipes"
RECORDS = 6


@pytest.fixture(scope="module")
def config():
    return read_config(RECIPES / "train-party.yaml")


def test_the_gate_was_trained_by_the_committed_config_on_the_committed_data(config):
    told = json.loads((DEMO / "party" / "router.json").read_text())
    files = [data.train_files for expert in config.experts.values() for data in as_data(expert.data)]
    assert told["data"] == {name: data_hash(RECIPES / name) for name in itertools.chain(*files)}
    assert list(told["experts"]) == list(config.experts)
    assert told["settings"] == config.gate.settings.model_dump(mode="json")


def test_each_class_has_the_largest_say_in_its_own_unseen_scenes(config):
    engine = lmoe_cli.load(RECIPES / "party.yaml", device="cpu")
    names = [expert.name for expert in engine.loadout.experts]
    for name, expert in config.experts.items():
        (data,) = as_data(expert.data)
        records = of_split(read_records(RECIPES / data.train_files[0]), VALID)
        shares = torch.zeros(len(names))
        for record in itertools.islice(records, RECORDS):
            tokens = engine.tokenizer.apply_chat_template(list(record.messages))["input_ids"]
            with engine.router.watched() as seen:
                engine.logits(torch.tensor([tokens]))
            shares += torch.stack([torch.cat(gates, 1).mean((0, 1)) for gates in seen.values()]).mean(0)
        assert names[int(shares.argmax())] == name, (shares / RECORDS).tolist()
