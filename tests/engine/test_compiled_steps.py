"""A compiled conversation says what an ordinary one says."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import tiny
import torch
from laws.cases import MIXED, case, short

from lmoe_cli.engine import compiled
from lmoe_cli.engine.build import start
from lmoe_cli.engine.cache import KeyValues
from lmoe_cli.errors import UsageError


@pytest.fixture
def compilations(monkeypatch):
    """How often something was compiled, as far as to a graph of torch's operators; machine code has a test below."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield lambda: counter.frame_count
    torch._dynamo.reset()


def text(length, seed=3):
    return tiny.tokens(1, length, seed)[0].tolist()


@pytest.mark.parametrize("arch", ["llama", "gemma3_text"])
def test_a_conversation_that_grows_shrinks_and_turns_gives_the_logits_of_an_ordinary_one(arch, compilations):
    engine = start(case(arch, "lora").loadout(MIXED), device="cpu", dtype="float32", compiles=True)
    values, plain = engine.key_values(), KeyValues(engine.model)
    whole = text(60)
    talks = [whole[:10], *(whole[:length] for length in range(11, 16)), whole[:30], whole[:31], [*whole[:20], 5, 6]]
    for tokens in [*talks, whole[:5], whole[:6]]:
        torch.testing.assert_close(values.logits(tokens, "one"), plain.logits(tokens, "one"), rtol=1e-4, atol=1e-4)
        assert values.reused <= len(tokens) - 1
    engine.set_weights({"one": -0.5, "two": 1.0})
    for tokens in (whole[:12], whole[:13]):
        torch.testing.assert_close(values.logits(tokens, "two"), plain.logits(tokens, "two"), rtol=1e-4, atol=1e-4)
    assert compilations() == 1


def test_keys_and_values_that_attention_keeps_are_used_again(compilations):
    engine = start(short().loadout(MIXED), device="cpu", dtype="float32", compiles=True)
    values = engine.key_values()
    whole, reused = text(40), []
    for tokens in (whole[:10], whole[:11], whole[:30], [*whole[:20], 5]):
        values.logits(tokens, "blend")
        reused.append(values.reused)
    assert reused == [0, 10, 11, 20]


def test_more_room_is_made_when_it_is_needed(compilations, monkeypatch):
    monkeypatch.setattr(compiled, "ROOM", 8)
    engine = start(short().loadout(MIXED), device="cpu", dtype="float32", compiles=True)
    values, plain = engine.key_values(), KeyValues(engine.model)
    whole = text(40)
    for length in range(5, 14):
        expected = plain.logits(whole[:length], "blend")
        torch.testing.assert_close(values.logits(whole[:length], "blend"), expected, rtol=1e-4, atol=1e-4)
    assert compilations() == 2  # for 8 and 32 tokens


def test_what_an_interrupted_step_leaves_behind_is_not_used(compilations, monkeypatch):
    engine = start(short().loadout(MIXED), device="cpu", dtype="float32", compiles=True)
    values, whole = engine.key_values(), text(20)
    values.logits(whole[:10], "blend")
    step = values._step

    def interrupted(**words):
        step(**words)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(values, "_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            values.logits(whole[:11], "blend")
    expected = KeyValues(engine.model).logits(whole[:12], "blend")
    torch.testing.assert_close(values.logits(whole[:12], "blend"), expected, rtol=1e-4, atol=1e-4)


def test_an_architecture_that_is_no_single_graph_is_refused(monkeypatch):
    loadout = case("llama", "lora").loadout(MIXED)
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_can_compile_fullgraph", False)
    with pytest.raises(UsageError, match="LlamaForCausalLM as one graph") as caught:
        start(loadout, device="cpu", dtype="float32", compiles=True)
    assert caught.value.code == "compile-unsupported"


def test_a_machine_without_a_compiler_is_told(monkeypatch):
    def fail(*_):
        raise RuntimeError("no C++ compiler here")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=fail))
    engine = start(short().loadout(MIXED), device="cpu", dtype="float32", compiles=True)
    values, whole = engine.key_values(), text(11)
    values.logits(whole[:10], "blend")
    with pytest.raises(UsageError, match="no C\\+\\+ compiler here") as caught:
        values.logits(whole, "blend")
    assert caught.value.code == "compile-failed"
    torch._dynamo.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="machine code of the CPU needs a C++ compiler")
def test_machine_code_gives_the_same_answer():
    torch._dynamo.reset()
    engine = start(short().loadout(MIXED), device="cpu", dtype="float32", compiles=True)
    values, plain, whole = engine.key_values(), KeyValues(engine.model), text(14)
    assert isinstance(values, compiled.CompiledKeyValues)
    for length in range(10, 15):
        expected = plain.logits(whole[:length], "blend")
        torch.testing.assert_close(values.logits(whole[:length], "blend"), expected, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()
