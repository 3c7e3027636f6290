"""On a CUDA device a blend decodes by kernels of its own, and computes what it computes without them.

Where there is no such device Triton's interpreter runs them on the CPU's tensors.
"""

from __future__ import annotations

import pytest
import tiny
import torch
from kernels import on_cpu
from laws.cases import MIXED, assert_close, case, short
from torch._dynamo.testing import CompileCounterWithBackend

from lmoe_cli.bank.fused import launch, ops
from lmoe_cli.engine.build import start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe


@pytest.fixture
def calls(monkeypatch):
    """Which kernels ran."""
    found = []
    for name in ("grouped", "grouped_chosen", "behind"):
        real = getattr(ops, name)
        monkeypatch.setattr(ops, name, lambda *words, name=name, real=real: found.append(name) or real(*words))
    return found


@pytest.fixture
def by_kernels(monkeypatch):
    on_cpu(monkeypatch)


def without_kernels(logits, tokens):
    """Logits by torch's own operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "is_available", lambda _: False)
        return logits(tokens)


@pytest.mark.parametrize(
    ("arch", "variant", "kernel"),
    [
        ("llama", "lora", "grouped"),
        ("qwen3", "patterns", "grouped"),
        ("llama", "dora", "behind"),
        ("llama", "lora_bias", "grouped"),
        ("gpt2", "lora", "behind"),
    ],
)
def test_the_kernels_compute_the_live_blend(by_kernels, calls, monkeypatch, arch, variant, kernel):
    engine = case(arch, variant).engine(MIXED)
    tokens = tiny.tokens(1, 2)
    found = engine.logits(tokens)
    assert set(calls) == {kernel}
    monkeypatch.setattr(launch, "is_available", lambda _: False)
    assert_close(found, case(arch, variant).engine(MIXED).logits(tokens))


def test_siblings_are_computed_in_one_call(by_kernels, calls):
    case("llama", "lora").engine(MIXED).logits(tiny.tokens(1, 1))
    layers, groups = 2, 4
    assert calls == ["grouped"] * layers * groups


def test_long_prompts_and_gradients_go_without_the_kernels(by_kernels, calls):
    engine = case("llama", "lora").engine(MIXED)
    engine.logits(tiny.tokens(2, 17))
    engine.model(input_ids=tiny.tokens(1, 2))
    assert calls == []


def test_rows_carry_blends_of_their_own(by_kernels, calls):
    engine = case("llama", "lora").engine(MIXED)
    engine.set_gates([[1.0, 0.0], [0.7, -0.4]])
    together = engine.logits(tiny.tokens(2, 2))
    assert calls
    for row, weights in enumerate([{"one": 1.0, "two": 0.0}, MIXED]):
        engine.set_weights(weights)
        assert_close(together[row], engine.logits(tiny.tokens(2, 2)[row : row + 1])[0])


def test_weight_0_is_the_base_to_the_last_bit_and_runs_no_kernel_of_ours(by_kernels, calls):
    engine = case("llama", "lora").engine({"one": 0.0, "two": 0.0})
    blended = engine.logits(tiny.tokens(1, 2))
    assert torch.equal(blended, engine.detach()(tiny.tokens(1, 2)).logits)
    assert calls == []


@pytest.mark.parametrize("shape", [(1, 1), (1, 2)])
def test_few_experts_per_token_are_read_alone(by_kernels, calls, monkeypatch, shape):
    own = case("llama", "lora")
    experts = {f"e{number}": {"adapter": str(own.one if number % 2 else own.two)} for number in range(6)}
    loadout = resolve(Recipe.model_validate({"base": str(own.base), "experts": experts}), "a test")
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(*shape, 6, generator=generator)
    gates = torch.zeros_like(values).scatter(-1, values.topk(2, dim=-1).indices, 0.6)
    if shape[1] > 1:
        gates[0, 0, :] = 0.0  # a token that meets no expert
    found = []
    for is_possible in (True, False):
        monkeypatch.setattr(launch, "is_available", lambda _, way=is_possible: way)
        engine = start(loadout, device="cpu", dtype="float32")
        engine.set_gates(gates + 0.0)
        found.append(engine.logits(tiny.tokens(*shape)))
    assert set(calls) == {"grouped_chosen"}
    assert_close(found[0], found[1])


def test_gates_of_other_tokens_are_refused(by_kernels):
    engine = case("llama", "lora").engine(MIXED)
    engine.set_gates(torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match="1 x 3 tokens"):
        engine.logits(tiny.tokens(1, 2))


def test_compiled_code_calls_the_kernels(by_kernels):
    torch._dynamo.reset()
    engine = short().engine(MIXED)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if "lmoe" in str(node.target))
        return graph

    with torch.inference_mode():
        compiled = torch.compile(engine.model, backend=backend, fullgraph=True)
        for weights in (MIXED, {"one": 0.2, "two": 0.9}):
            engine.set_weights(weights)
            found = compiled(input_ids=tiny.tokens(1, 2)).logits
            assert_close(found, without_kernels(engine.logits, tiny.tokens(1, 2)))
    assert len(seen) == 4
    torch._dynamo.reset()


def test_compiled_code_takes_gates_that_each_token_brings(by_kernels):
    torch._dynamo.reset()
    engine = short().engine(MIXED)
    token = tiny.tokens(1, 1)
    counter = CompileCounterWithBackend("eager")
    with torch.inference_mode():
        compiled = torch.compile(engine.model, backend=counter, fullgraph=True)
        for gates in ([0.7, -0.4], [0.0, 1.3], [2.0, 0.0]):
            engine.set_gates(torch.tensor(gates)[None, None])
            found = compiled(input_ids=token).logits
            engine.set_weights(dict(zip(MIXED, gates, strict=True)))
            assert_close(found, without_kernels(engine.logits, token))
    assert counter.frame_count == 1
    torch._dynamo.reset()
