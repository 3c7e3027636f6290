"""In 16 bits, where the processor has no instructions for them, prompts are computed in float32, matrix by matrix."""

from __future__ import annotations

import pytest
import tiny
import torch
from laws.cases import CASES, EACH, MIXED, Case, case
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode
from train.made import base as base_with_tokenizer
from transformers import AutoModelForCausalLM

from lmoe_cli.engine import build, widened
from lmoe_cli.engine.build import start
from lmoe_cli.engine.device import choose_dtype
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

PROMPT, FEW = tiny.tokens(1, 12), tiny.tokens(1, 7)
CPU = torch.device("cpu")
ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm.default, ATEN.addmm.default, ATEN.addmm_.default, ATEN.linear.default, ATEN.matmul.default}


class Products(TorchDispatchMode):
    """Notes in which dtypes matrices are multiplied, attention aside."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, function, types, arguments=(), words=None):
        if function in PRODUCTS:
            self.dtypes.add(arguments[0].dtype)
        return function(*arguments, **(words or {}))


@pytest.fixture(autouse=True)
def _without_instructions(monkeypatch):
    monkeypatch.setattr(widened, "has_instructions", lambda: False)


def engine_of(arch="llama", variant="lora", weights=MIXED, dtype="bfloat16"):
    return start(case(arch, variant).loadout(weights), device="cpu", dtype=dtype)


def multiplied_in(compute):
    with Products() as products:
        compute()
    return products.dtypes


@pytest.mark.parametrize(
    ("arch", "variant"), [("llama", "lora"), ("llama", "dora"), ("gpt2", "lora"), ("falcon", "lora"), ("opt", "saved")]
)
def test_a_prompt_is_multiplied_in_float32_and_few_tokens_as_they_are(arch, variant):
    engine = engine_of(arch, variant)
    assert multiplied_in(lambda: engine.logits(PROMPT)) == {torch.float32}
    assert multiplied_in(lambda: engine.logits(FEW)) == {torch.bfloat16}


@pytest.mark.parametrize(("arch", "variant"), [one for one in CASES if one.values in EACH])
def test_it_is_as_near_to_float32_as_what_is_multiplied_in_16_bits(arch, variant, monkeypatch):
    exact = engine_of(arch, variant, dtype="float32").logits(PROMPT)
    found = engine_of(arch, variant).logits(PROMPT)
    monkeypatch.setattr(widened, "has_instructions", lambda: True)
    plain = engine_of(arch, variant).logits(PROMPT)
    assert found.dtype == plain.dtype == torch.bfloat16
    assert (found - exact).norm() < 1.2 * (plain - exact).norm()


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Sums of so many products that another order of them is seen in 16 bits."""
    folder = tmp_path_factory.mktemp("wide")
    base = tiny.save_base("llama", folder / "base", hidden_size=256, intermediate_size=512)
    one, two = (tiny.save_adapter(base, "lora", folder / name, seed=seed) for seed, name in enumerate(MIXED))
    return Case(base, one, two)


def test_the_base_is_computed_as_in_transformers_to_the_last_bit(wide):
    engine = start(wide.loadout({"one": 0.0, "two": 0.0}), device="cpu", dtype="bfloat16")
    theirs = AutoModelForCausalLM.from_pretrained(wide.base, dtype=torch.bfloat16)
    with torch.inference_mode():
        due = theirs(input_ids=PROMPT).logits
        with widened.Widened():
            assert not torch.equal(theirs(input_ids=PROMPT).logits, due)
        assert torch.equal(engine.logits(PROMPT), due)
        engine.fold()
        assert torch.equal(engine.logits(PROMPT), due)
        engine.unfold()
        engine.set_weights(MIXED)
        assert not torch.equal(engine.logits(PROMPT), due)
        assert torch.equal(engine.detach()(input_ids=PROMPT).logits, due)
    engine.attach()
    assert multiplied_in(lambda: engine.logits(PROMPT)) == {torch.float32}


def test_a_conversation_computes_its_prompt_in_float32_and_its_steps_as_they_are():
    values, tokens = engine_of().key_values(), PROMPT[0].tolist()
    assert multiplied_in(lambda: values.logits(tokens, "blend")) == {torch.float32, torch.bfloat16}  # the head's one
    assert multiplied_in(lambda: values.logits([*tokens, 5], "blend")) == {torch.bfloat16}


def test_prompts_of_a_base_without_experts_and_texts_that_are_embedded_are_multiplied_in_float32():
    recipe = Recipe.model_validate({"base": str(base_with_tokenizer()), "experts": {}})
    engine = start(resolve(recipe, "a test"), device="cpu", dtype="bfloat16")
    assert multiplied_in(lambda: engine.logits(PROMPT)) == {torch.float32}
    engine.detach()
    assert multiplied_in(lambda: engine.logits(PROMPT)) == {torch.bfloat16}
    assert multiplied_in(lambda: engine.embed("add 3 and 4, then say what it is")) == {torch.float32}


def test_prompts_of_a_folded_blend_are_multiplied_in_float32():
    engine = engine_of()
    engine.fold()
    assert multiplied_in(lambda: engine.logits(PROMPT)) == {torch.float32}
    engine.unfold()
    engine.set_weights(one=0.0, two=0.0)
    assert multiplied_in(lambda: engine.logits(PROMPT)) == {torch.bfloat16}


def test_a_prompt_that_is_interrupted_leaves_nothing_behind():
    engine = engine_of()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = engine.model.lm_head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.logits(PROMPT)
    hook.remove()
    assert not _get_current_function_mode_stack()
    assert multiplied_in(lambda: engine.logits(FEW)) == {torch.bfloat16}


def test_with_instructions_everything_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(widened, "has_instructions", lambda: True)
    assert multiplied_in(lambda: engine_of().logits(PROMPT)) == {torch.bfloat16}


@pytest.mark.parametrize("knows", [True, False])
def test_a_large_base_answers_as_it_is_stored_and_is_trained_where_that_is_quick(knows, monkeypatch):
    monkeypatch.setattr("lmoe_cli.engine.device.has_instructions", lambda: knows)
    size, quick = 1 << 30, torch.bfloat16 if knows else torch.float32
    assert choose_dtype(None, "bfloat16", size, CPU, answers=True) is torch.bfloat16
    assert choose_dtype(None, "bfloat16", size, CPU) is quick
    assert choose_dtype(None, "float16", size, CPU, answers=True) is quick
    assert choose_dtype(None, "float32", size, CPU, answers=True) is torch.float32
    assert choose_dtype(None, "bfloat16", 1 << 20, CPU, answers=True) is torch.float32
    assert choose_dtype("float32", "bfloat16", size, CPU, answers=True) is torch.float32


@pytest.mark.parametrize(("arch", "quantize", "answers"), [("llama", None, True), ("qwen3_moe", None, False)])
def test_packed_and_grouped_products_are_not_counted_on(arch, quantize, answers, monkeypatch):
    asked = []
    monkeypatch.setattr(build, "choose_dtype", lambda *_, answers: asked.append(answers) or torch.float32)
    start(case(arch, "lora").loadout(MIXED), device="cpu", quantize=quantize)
    assert asked == [answers]


def test_products_with_named_arguments_are_let_alone():
    x, w = torch.randn(9, 4).bfloat16(), torch.randn(5, 4).bfloat16()
    y = torch.zeros(9, 5, dtype=torch.bfloat16)
    with widened.Widened():
        torch.mm(x, w.T, out=y)
        assert torch.equal(torch.nn.functional.linear(input=x, weight=w), y)
    assert y.any()


@pytest.mark.parametrize("multiply", [torch.matmul, torch.Tensor.matmul, lambda x, w: x @ w, torch.mm])
def test_any_product_of_many_vectors_is_rounded_once(multiply):
    x, w = torch.randn(9, 300).bfloat16(), torch.randn(300, 5).bfloat16()
    with widened.Widened():
        found = multiply(x, w)
    assert found.dtype == torch.bfloat16
    exact = x.double() @ w.double()
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5).all()
