"""Gates that do not change cost a step nothing, and a change of them is written where a captured graph reads."""

from __future__ import annotations

import time

import pytest
import tiny
import torch
from laws.cases import MIXED, case
from torch.utils._python_dispatch import TorchDispatchMode

LOOKS = {"_local_scalar_dense", "nonzero", "isfinite", "any", "index", "index_select", "repeat_interleave", "stack"}
"""Operators that read gates, on a GPU some of them by waiting for it, or that derive something from them."""


class Called(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def called(model, tokens):
    with torch.inference_mode(), Called() as seen:
        model(input_ids=tokens)
    return seen.names


@pytest.mark.parametrize("variant", ["lora", "dora", "lora_bias"])
@pytest.mark.parametrize("tokens", [tiny.tokens(1, 1), tiny.tokens(2, 7)])
def test_a_step_does_not_look_at_gates_that_were_looked_at(variant, tokens):
    engine = case("qwen3", variant).engine(MIXED)
    base = called(engine.detach(), tokens)
    engine.attach()
    for weights in (MIXED, {"one": 0.25, "two": -1.0}):
        engine.set_weights(weights)
        engine.logits(tokens)
        assert not (called(engine.model, tokens) - base) & LOOKS


def test_a_turn_writes_into_the_memory_that_is_read():
    engine = case("qwen3", "lora").engine(MIXED)
    gates = engine.bank.gates
    places = {key: kept.data_ptr() for key, kept in gates._owned.items()}
    values = gates.values.data_ptr()
    engine.set_weights({"one": 0.25, "two": -1.0})
    assert gates.values.data_ptr() == values
    assert {key: kept.data_ptr() for key, kept in gates._owned.items()} == places
    key, kept = next(iter(gates._owned.items()))
    assert torch.equal(kept[0], torch.tensor([0.25, -1.0])[gates._owners[key]])


def test_a_turn_takes_no_longer_than_a_millisecond():
    engine = case("qwen3", "lora").engine(MIXED)
    times = []
    for number in range(50):
        started = time.perf_counter()
        engine.set_weights(one=number / 50)
        times.append(time.perf_counter() - started)
    assert min(times) < 1e-3
