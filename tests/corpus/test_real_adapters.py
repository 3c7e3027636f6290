"""Adapters and configs that nobody on this project wrote, against what an independent reader found in them."""

from __future__ import annotations

import ast
import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from lmoe_cli.adapter.adapter import PICKLE
from lmoe_cli.adapter.config import SUPPORTED, ForeignAdapterError, parse_config
from lmoe_cli.adapter.converted import converted_folder
from lmoe_cli.adapter.names import place
from lmoe_cli.adapter.soundness import inspect_adapter
from lmoe_cli.adapter.summary import summary
from lmoe_cli.checkpoint.pickled import convert
from lmoe_cli.errors import LmoeError
from lmoe_cli.source import open_source


def rows(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def number(text: str) -> float | None:
    return float(text) if text else None


def test_every_real_config_is_read_or_refused_with_the_reason(corpus):
    table = rows(corpus / "configs" / "index.csv")
    outcomes: Counter[str] = Counter()
    for row in table:
        data = (corpus / "configs" / row["file"]).read_bytes()
        try:
            config = parse_config(data, row["file"])
        except ForeignAdapterError as error:
            assert row["dialect"] in ("mlx", "adapter-hub")
            outcomes[error.code] += 1
            continue
        except LmoeError as error:
            assert row["readable"] != "ok", error.message
            outcomes[error.code] += 1
            continue
        assert config.peft_type == (row["peft_type"] or "LORA")
        assert (config.base or "") == row["base"]
        assert (config.task_type or "") == row["task_type"]
        if config.peft_type == "LORA":
            assert (config.r, config.default_alpha) == (number(row["r"]), number(row["alpha"]))
        outcomes["supported" if config.peft_type in SUPPORTED else "named"] += 1
    assert sum(outcomes.values()) == len(table) >= 173
    assert outcomes["lfs-pointer"] == 1
    assert outcomes["supported"] > 100


@pytest.fixture
def real(corpus) -> list[tuple[dict[str, str], Path]]:
    found = [(row, corpus / "adapters" / row["name"]) for row in rows(corpus / "adapters" / "index.csv")]
    assert len(found) == 15
    return found


def test_inspect_finds_in_every_real_adapter_what_is_there(real):
    for row, folder in real:
        if row["weights_file"] == PICKLE:
            before = summary(inspect_adapter(open_source(str(folder))))
            assert (before["format"], before["supported"]) == ("pickle", False)
            convert(folder / PICKLE, converted_folder(folder / PICKLE), "adapter_model.safetensors")
        adapter = inspect_adapter(open_source(str(folder)))
        facts = summary(adapter)
        json.dumps(facts, allow_nan=False)
        assert facts["parameters"] == int(row["params"]), row["name"]
        assert facts["tensors"] == int(row["tensors"])
        assert facts["dtypes"] == ast.literal_eval(row["dtypes"])
        ranks = ast.literal_eval(row["ranks_in_tensors"])
        assert (facts["rank"]["min"], facts["rank"]["max"]) == (min(ranks, default=None), max(ranks, default=None)) or (
            adapter.parts and not ranks  # embeddings, which the other reader did not look at
        )
        assert (facts["peft_type"] or "(no config)") == row["peft_type"].replace("(no peft_type)", "(no config)")
        if adapter.config:
            assert facts["base"] == (row["base"] or None)
        lora = Counter(
            found.module.rpartition(".")[2]
            for name in adapter.stored
            if (found := place(name)) and found.role == "lora_A"
        )
        if adapter.parts:
            assert lora == ast.literal_eval(row["modules"])
            assert facts["modules"] == len(adapter.parts)


def test_what_lmoe_can_run_of_them(real):
    verdicts = {row["name"]: inspect_adapter(open_source(str(folder))) for row, folder in real}
    assert {name for name, adapter in verdicts.items() if adapter.is_supported} == {
        "0112LY_logo-gemma-lora__adapter",
        "BK7195_deltacompression-poc__adapter",
        "chetanreddyv_ChessGPT__model",
        "chetanreddyv_ChessGPT__model_penalized",
        "guilhermmeabreu_lab_08",
    }
    reasons = {name: [item.code for item in adapter.findings] for name, adapter in verdicts.items()}
    assert all(codes for name, codes in reasons.items() if not verdicts[name].is_supported)
    assert reasons["Rajpreet2206_LLM-FineTune-Scratch"] == ["config-missing"]
    assert reasons["ml-explore_mlx-lm__test_dpo_adapters"] == ["foreign-adapter"]
    assert reasons["ollama_ollama__convert_testdata_adapters_discollama"] == ["foreign-adapter"]
