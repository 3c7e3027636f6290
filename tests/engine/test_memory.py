"""Weights that are mapped from their files stay there while something else is computed with."""

from __future__ import annotations

import tiny
import torch
from laws.cases import MIXED, case
from safetensors import safe_open
from safetensors.torch import save_file

from lmoe_cli.engine import memory
from lmoe_cli.engine.build import start
from lmoe_cli.engine.memory import Mapped


def test_only_what_lies_in_a_file_is_held_by_one(tmp_path):
    save_file({"a": torch.randn(64, 64), "b": torch.randn(64, 64)}, tmp_path / "some.safetensors")
    with safe_open(tmp_path / "some.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in ("a", "b")}
    mapped = Mapped()
    assert all(mapped.holds(tensor) for tensor in stored.values())
    assert not mapped.holds(stored["a"].clone())
    assert not mapped.holds(torch.randn(1 << 22))
    assert not mapped.holds(stored["a"].T)
    assert not mapped.holds(stored["a"].to("meta"))


def test_where_the_system_tells_nothing_nothing_is_held(monkeypatch, tmp_path):
    save_file({"a": torch.randn(64, 64)}, tmp_path / "some.safetensors")
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "absent")
    with safe_open(tmp_path / "some.safetensors", "pt") as file:
        assert not Mapped().holds(file.get_tensor("a"))


def test_unfolding_gives_back_the_mapped_weights_themselves():
    engine = start(case("llama", "lora").loadout(MIXED), device="cpu", dtype="float32")
    places = {name: weight.data_ptr() for name, weight in engine.detach().named_parameters()}
    engine.attach()
    engine.fold()
    moved = {name for name, weight in engine.model.named_parameters() if weight.data_ptr() not in places.values()}
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in moved} == set(tiny.linears("llama"))
    engine.unfold()
    assert {name: weight.data_ptr() for name, weight in engine.detach().named_parameters()} == places
