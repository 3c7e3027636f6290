"""Every law of a running blend holds on every path that computes it."""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path

import pytest
import torch
from kernels import on_cpu

from laws import cases
from lmoe_cli.bank import bank, product, shared
from lmoe_cli.bank.gates import Gates
from lmoe_cli.engine import build, compiled
from lmoe_cli.engine.base_model import load_model
from lmoe_cli.engine.engine import Engine
from lmoe_cli.errors import UsageError

LIVE = ("test_blend", "test_mixture", "test_generation")
"""Modules whose laws are about what runs."""
PATHS = ("usual", "quickest", "native", "fused", "compiled")
FEW = {
    "quickest": cases.EACH,
    "native": cases.EACH,
    "fused": {("llama", "lora"), ("llama", "dora"), ("llama", "lora_bias"), ("qwen3", "patterns"), ("gpt2", "lora")},
    "compiled": {("llama", "dora")},
}
"""What is asked of each path but the usual one, without `--every`: the interpreter of kernels and the compiler take
seconds for each."""
ONE = "test_one_expert_at_weight_1_is_that_adapter_in_peft"
ROWS = "test_rows_of_a_batch_carry_blends_of_their_own"
ONCE = {*(("llama", variant) for variant in ("head", "ia3", "saved_norm")), ("gpt2", "lora"), ("qwen3_moe", "gate")}
"""What is asked of compiled steps by one law alone; conversations of llama and gemma have tests of their own."""
LONG = {
    "test_greedy_answers_are_those_of_transformers",
    "test_sampled_answers_are_those_of_transformers_with_the_same_seed",
    "test_a_cache_that_is_reused_rewound_or_outlived_gives_the_logits_of_a_fresh_one",
}
"""Not asked of kernels without `--every`: the interpreter takes up to a minute for each."""


def pytest_generate_tests(metafunc):
    if metafunc.module.__name__.rpartition(".")[2] in LIVE:
        metafunc.parametrize("path", PATHS, indirect=True)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("every"):
        items[:] = [item for item in items if item.path.parent != Path(__file__).parent or _is_asked_for(item)]


def _is_asked_for(item):
    words = item.callspec.params if hasattr(item, "callspec") else {}
    if words.get("arch") in cases.ALIKE and words.get("variant", "lora") != "lora":
        return False
    if item.path.stem not in LIVE:
        return True
    path, law = words["path"], item.originalname
    kind = words.get("arch", "llama"), words.get("variant", "lora")
    if path == "fused" and (law in LONG or (law in (ONE, ROWS) and kind != ("llama", "lora"))):
        return False
    if path == "compiled":
        if item.path.stem == "test_generation":
            return "settings" not in words and kind[0] == "llama"
        return law == ONE if kind in ONCE else kind in FEW[path] and law != ROWS
    return path == "usual" or kind in FEW[path]


@pytest.fixture(autouse=True)
def _bases_are_read_once(monkeypatch):
    def load(base, *, dtype, device, **words):
        is_ours = cases.ROOT in base.source.path.parents and dtype == torch.float32 and not any(words.values())
        if not is_ours:
            return load_model(base, dtype=dtype, device=device, **words)
        return cases.fresh(base.source.path).requires_grad_(False)

    monkeypatch.setattr(build, "load_model", load)


@pytest.fixture
def path(request, monkeypatch):
    """The usual kernels and all experts at once; those of large models and each expert that acts by itself; torch's
    own; those for CUDA devices, interpreted; or steps that torch's compiler made."""
    if request.param == "native":
        monkeypatch.setattr(bank, "choose_products", lambda _: product.Products(product.native, product.native))
    if request.param == "quickest":
        monkeypatch.setattr(product, "ENOUGH", 0)
        monkeypatch.setattr(bank, "choose_products", lambda _: product.Products(product.onednn, product.onednn))
        monkeypatch.setattr(shared, "is_worth", lambda *_: True)
        monkeypatch.setattr(Gates, "are_sparse", True)
    if request.param == "fused":
        on_cpu(monkeypatch)
    if request.param == "compiled":
        torch._dynamo.reset()
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        monkeypatch.setattr(Engine, "logits", by_compiled_steps)
        monkeypatch.setattr(Engine, "key_values", compiled_key_values)
    return request.param


def skip_what_is_refused(engine):
    try:
        compiled.require_traceable(engine.bank)
    except UsageError as error:
        pytest.skip(str(error))


def compiled_key_values(engine, *, keep=False):
    skip_what_is_refused(engine)
    return compiled.CompiledKeyValues(engine.model, compiled.compiled_step(engine.model), keep=keep)


@torch.inference_mode()
def by_compiled_steps(engine, tokens):
    """Logits of every position: the first token as a prompt, and one compiled step for each that follows."""
    skip_what_is_refused(engine)
    with engine.still():
        engine._require_rows(len(tokens))
        cache = compiled._empty_cache(engine.model, 16)
        step = compiled.compiled_step(engine.model)
        forwards = [engine.model, *[step] * (tokens.shape[1] - 1)]
        takes_places = "position_ids" in inspect.signature(engine.model.forward).parameters
        found = []
        for place, forward in enumerate(forwards):
            ids = tokens[:, place : place + 1]
            words = {"position_ids": torch.full_like(ids, place)} if takes_places and place else {}
            found.append(forward(input_ids=ids, past_key_values=cache, use_cache=True, **words).logits)
        return torch.cat(found, 1)
