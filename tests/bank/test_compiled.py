"""A blend can be compiled as one graph, and its weights turn without compiling again."""

from __future__ import annotations

import pytest
import tiny
import torch
from laws.cases import MIXED, assert_close, case, short
from torch._dynamo.testing import CompileCounterWithBackend

from lmoe_cli.bank import bank, product
from lmoe_cli.bank.product import Products
from lmoe_cli.engine.build import start


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", ["dora", "saved"])
def test_a_compiled_blend_is_one_graph_that_computes_the_live_blend(variant):
    engine = case("qwen3", variant).engine(MIXED)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(engine.model, backend=counter, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        for weights in (MIXED, {"one": -0.3, "two": 1.2}, {"one": 0.0, "two": 1.0}, {"one": 2.0, "two": 0.0}):
            engine.set_weights(weights)
            assert_close(compiled(input_ids=tiny.tokens()).logits, engine.logits(tiny.tokens()))
    assert counter.frame_count == 1


def test_the_compiler_computes_the_product_that_siblings_share_once():
    engine = case("qwen3", "lora").engine(MIXED)
    products = []

    def count(graph, inputs):
        from torch._functorch.aot_autograd import aot_module_simplified

        def inner(lowered, inner_inputs):
            products.append(
                sum(
                    node.target in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
                    for node in lowered.graph.nodes
                )
            )
            return lowered

        return aot_module_simplified(graph, inputs, fw_compiler=inner)

    with torch.inference_mode():
        torch.compile(engine.model, backend=count, fullgraph=True)(input_ids=tiny.tokens())
    layers, linears, stacks, head = 2, 7, 4, 1
    assert products == [layers * (2 * linears + stacks) + head]


@pytest.mark.parametrize(
    ("dtype", "products", "called"),
    [
        ("float32", Products(product.onednn, product.onednn), {"lmoe::onednn_linear"}),
        ("bfloat16", Products(one=product.native), {"lmoe::native_linear"}),
    ],
)
def test_compiled_code_calls_the_kernels_that_were_chosen(monkeypatch, dtype, products, called):
    monkeypatch.setattr(bank, "choose_products", lambda _: products)
    monkeypatch.setattr(product, "ENOUGH", 0)
    loadout = short().loadout(MIXED)
    engine = start(loadout, device="cpu", dtype=dtype)
    token = tiny.tokens(1, 1)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(engine.model, backend=counter, fullgraph=True, dynamic=False)
    monkeypatch.setattr(bank, "choose_products", lambda _: Products())
    plain = start(loadout, device="cpu", dtype=dtype)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(input_ids=token).logits, plain.model(input_ids=token).logits)
        engine.set_weights({"one": 0.0, "two": 0.0})
        assert torch.equal(compiled(input_ids=token).logits, plain.detach()(input_ids=token).logits)
    names = {node.target.name() for node in counter.graphs[0].graph.nodes if hasattr(node.target, "name")}
    assert {name.removesuffix(".default") for name in names} >= called
