"""Gates of tokens: each token meets its own blend, experts whose gate is zero cost nothing, gradients reach the gates.

The oracle is the base of transformers with hooks that add, token by token, what the formula says, from the tensors as
PEFT saved them.
"""

from __future__ import annotations

import re

import pytest
import tiny
import torch
from laws.cases import assert_close, case
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_cli.bank import shared, sparse
from lmoe_cli.bank.delta import Delta, Term
from lmoe_cli.bank.gates import Gates
from lmoe_cli.bank.linear import BlendedLinear
from lmoe_cli.bank.product import Products
from lmoe_cli.bank.shared import Latest, SharedInput
from lmoe_cli.engine.build import start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

COUNT = 5


@pytest.fixture(scope="module")
def loadout(tmp_path_factory):
    """Five experts of different ranks; one of them knows only some modules."""
    base = case("llama", "lora").base
    root = tmp_path_factory.mktemp("experts")
    experts = {}
    for number in range(COUNT):
        variant = "embedding" if number == 3 else "lora"
        folder = tiny.save_adapter(base, variant, root / f"e{number}", seed=number, rank=2 + number)
        experts[f"e{number}"] = {"adapter": str(folder)}
    return resolve(Recipe.model_validate({"base": str(base), "experts": experts}), "a test")


def by_hand(loadout, gates, tokens):
    """Logits where every linear layer adds g_te s B_e A_e x_t, and the embedding its rows."""
    model = tiny.load(loadout.base.source.path)
    for number, expert in enumerate(loadout.experts):
        scale = 6 / (2 + number)
        stored = load_file(expert.adapter.source.require("adapter_model.safetensors"))
        for key, a in stored.items():
            if found := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key):
                b = stored[key.replace("lora_A", "lora_B")]
                own = gates[..., number, None] * scale

                def add(module, inputs, output, a=a, b=b, own=own):
                    return output + own * (inputs[0] @ a.T @ b.T)

                model.get_submodule(found[1]).register_forward_hook(add)
            elif found := re.fullmatch(r"base_model\.model\.(.+)\.lora_embedding_A", key):
                b = stored[key.replace("embedding_A", "embedding_B")]
                own = gates[..., number, None] * scale

                def look_up(module, inputs, output, a=a, b=b, own=own):
                    return output + own * (a.T[inputs[0]] @ b.T)

                model.get_submodule(found[1]).register_forward_hook(look_up)
    return model(tokens).logits


def choose(shape, kept, seed=0):
    """Random gates of which ``kept`` per token are not zero."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, COUNT, generator=generator)
    chosen = torch.rand(*shape, COUNT, generator=generator).topk(kept, dim=-1).indices
    return torch.zeros_like(values).scatter(-1, chosen, values.gather(-1, chosen))


@pytest.fixture(params=["dense", "sparse", "rule"])
def way(request, monkeypatch):
    if request.param != "rule":
        monkeypatch.setattr(shared, "is_worth", lambda *_: request.param == "sparse")
    return request.param


@pytest.mark.parametrize("kept", [1, 2, COUNT])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 9), (2, 7)])
def test_each_token_meets_the_blend_of_its_own_gates(loadout, way, shape, kept):
    engine = start(loadout, device="cpu", dtype="float32")
    gates, tokens = choose(shape, kept), tiny.tokens(*shape)
    engine.set_gates(gates)
    with torch.no_grad():
        assert_close(engine.logits(tokens), by_hand(loadout, gates, tokens))


def test_gates_that_are_the_same_for_all_tokens_are_those_of_the_batch(loadout, way):
    engine = start(loadout, device="cpu", dtype="float32")
    engine.set_gates([[0.5, 0.0, -1.0, 0.0, 0.3]])
    batch = engine.logits(tiny.tokens())
    engine.set_gates(engine.bank.gates.values.expand(2, 7, COUNT).clone())
    assert_close(engine.logits(tiny.tokens()), batch)


def test_gradients_reach_gates_and_inputs_alike_on_both_ways(loadout, monkeypatch):
    found = {}
    for way in ("dense", "sparse"):
        monkeypatch.setattr(shared, "is_worth", lambda *_, way=way: way == "sparse")
        engine = start(loadout, device="cpu", dtype="float32")
        gates = choose((2, 7), 2).requires_grad_()
        engine.bank.gates.set(gates)
        embedded = engine.model.get_input_embeddings()(tiny.tokens()).detach().requires_grad_()
        output = engine.model(inputs_embeds=embedded).logits
        (output * torch.sin(torch.arange(output.numel()).view_as(output))).sum().backward()
        found[way] = gates.grad, embedded.grad
    chosen = choose((2, 7), 2) != 0
    torch.testing.assert_close(found["sparse"][0][chosen], found["dense"][0][chosen], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["sparse"][1], found["dense"][1], rtol=1e-3, atol=1e-3)
    assert found["sparse"][0][chosen].abs().min() > 0


def test_gates_may_be_trained_step_by_step(loadout):
    engine = start(loadout, device="cpu", dtype="float32")
    gates = torch.full((2, 7, COUNT), 0.1, requires_grad=True)
    target = tiny.tokens()
    losses = []
    for _ in range(4):
        engine.bank.gates.set(gates)
        logits = engine.model(input_ids=target).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())
        (slope,) = torch.autograd.grad(loss, gates)
        gates = (gates - 0.2 * slope).detach().requires_grad_()
        losses.append(float(loss))
    assert losses[-1] < losses[0]


def test_tokens_that_no_gates_were_given_for_are_refused(loadout):
    engine = start(loadout, device="cpu", dtype="float32")
    engine.set_gates(choose((2, 7), 2))
    with pytest.raises(ValueError, match="2 x 7 tokens"):
        engine.logits(tiny.tokens(2, 6))


@pytest.mark.parametrize(
    "wrong", [torch.ones(1, 1, 1, COUNT), torch.ones(2, COUNT + 1), torch.full((COUNT,), torch.nan)]
)
def test_gates_of_another_shape_or_that_are_no_numbers_are_refused_and_change_nothing(loadout, wrong):
    engine = start(loadout, device="cpu", dtype="float32")
    before = engine.logits(tiny.tokens())
    with pytest.raises(ValueError, match=f"{COUNT} finite numbers"):
        engine.set_gates(wrong)
    assert torch.equal(engine.logits(tiny.tokens()), before)


class Watch(TorchDispatchMode):
    """Notes the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [item for item in (out if isinstance(out, tuple | list) else [out]) if isinstance(item, torch.Tensor)]
        self.largest = max([self.largest, *(item.numel() for item in made)])
        return out


def test_memory_of_the_sparse_way_does_not_grow_with_the_experts_that_rest(monkeypatch):
    count, rank, width, tokens = 64, 8, 16, 1024
    gates = Gates(count)
    terms = [Term(number, Delta(torch.randn(rank, width), torch.randn(width, rank))) for number in range(count)]
    stack = SharedInput(gates, Latest(), [terms], torch.float32, torch.device("cpu"), Products())
    layer = BlendedLinear(
        torch.nn.Linear(width, width), terms, gates, stack, 0, torch.float32, torch.device("cpu"), Products()
    )
    values = torch.zeros(1, tokens, count)
    values[:, :, :2] = 0.5
    x = torch.randn(1, tokens, width)
    largest, found = {}, {}
    for is_sparse in (True, False):
        monkeypatch.setattr(shared, "is_worth", lambda *_, way=is_sparse: way)
        with torch.inference_mode(), Watch() as watch:
            gates.set(values)
            found[is_sparse] = layer(x)
        largest[is_sparse] = watch.largest
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-4)
    assert largest[True] == tokens * count  # the gates themselves
    assert largest[False] == tokens * count * rank


def test_rows_of_a_stack_have_the_gates_of_a_step_after_those_of_a_prompt():
    gates, owner = Gates(2), torch.tensor([0, 0, 1])
    prompt = torch.rand(1, 5, 2)
    gates.set(prompt)
    assert torch.equal(gates.coefficients("stack", owner, torch.float64), prompt[..., owner].double())
    gates.set([0.5, 2.0])
    kept = gates._owned["stack", torch.float64]  # where compiled code looks for it, which cannot make it
    assert gates.coefficients("stack", owner, torch.float64) is kept
    gates.set([1.0, 3.0])
    assert kept.tolist() == [[1.0, 1.0, 3.0]]


def test_the_rule_takes_few_of_many_experts_alone_and_most_of_them_together():
    gates = Gates(64)
    terms = [Term(number, Delta(torch.zeros(16, 1024), torch.zeros(2048, 16))) for number in range(64)]
    members = (sparse.Member.of(terms, 0),)
    x = torch.zeros(1, 1, 1024)
    gates.set(torch.eye(64)[:1, None])
    assert sparse.is_worth(gates, x, members)
    gates.set(torch.ones(1, 1, 64))
    assert not sparse.is_worth(gates, x, members)


def test_an_expert_that_names_a_module_twice_acts_twice(monkeypatch):
    monkeypatch.setattr(shared, "is_worth", lambda *_: True)
    gates = Gates(2)
    terms = [Term(number, Delta(torch.randn(2, 8), torch.randn(4, 2))) for number in (0, 1, 1)]
    place = torch.float32, torch.device("cpu"), Products()
    layer = BlendedLinear(torch.nn.Linear(8, 4), terms, gates, SharedInput(gates, Latest(), [terms], *place), 0, *place)
    gates.set([0.0, 0.5])
    x = torch.randn(1, 3, 8)
    added = sum(x @ term.delta.a.T @ term.delta.b.T for term in terms[1:])
    torch.testing.assert_close(layer(x), layer.base(x) + 0.5 * added, rtol=1e-4, atol=1e-5)


def test_an_expert_more_or_less_changes_what_is_read(loadout, monkeypatch):
    """The gates change from token to token, and with them the experts that are taken."""
    monkeypatch.setattr(shared, "is_worth", lambda *_: True)
    engine = start(loadout, device="cpu", dtype="float32")
    for kept in (1, 3, 2, COUNT, 1):
        gates = choose((1, 1), kept, seed=kept)
        engine.set_gates(gates)
        with torch.no_grad():
            assert_close(engine.logits(tiny.tokens(1, 1)), by_hand(loadout, gates, tiny.tokens(1, 1)))
