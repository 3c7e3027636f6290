"""Adapters that others trained, and a base that others trained, from check to chat to files."""

from __future__ import annotations

import json
import shutil
import warnings
from itertools import islice
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import lmoe_cli
from lmoe_cli.bake.adapter import bake_adapter
from lmoe_cli.bake.model import bake_model
from lmoe_cli.check import check
from lmoe_cli.cli.root import lmoe
from lmoe_cli.engine.build import start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

STEPS, BATCH, LENGTH = 40, 8, 96
pytestmark = pytest.mark.xdist_group("real blends")  # trained once, by one worker


def said(*words: object, code: int = 0) -> dict:
    """The data of a command's JSON document."""
    result = CliRunner().invoke(lmoe, [*map(str, words), "--json"], standalone_mode=False)
    assert result.exception is None, result.exception
    return json.loads(result.stdout)["data"]


# -- two adapters for GPT-2, on a base of its shape


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A random GPT-2 of the real width and depth, with little else."""
    shape = {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": 32}
    return tiny.save_base("gpt2", tmp_path_factory.mktemp("bases") / "stranger", **shape)


def chess(gpt2: Path, corpus: Path, one: float, two: float, accept_base: tuple[str, ...] = ()) -> Recipe:
    folders = {"plain": "chetanreddyv_ChessGPT__model", "penalized": "chetanreddyv_ChessGPT__model_penalized"}
    weights = {"plain": one, "penalized": two}
    experts = {
        name: {"adapter": str(corpus / "adapters" / folder), "weight": weights[name], "accept_base": list(accept_base)}
        for name, folder in folders.items()
    }
    return Recipe.model_validate({"base": str(gpt2), "experts": experts})


def assert_same(found: torch.Tensor, due: torch.Tensor) -> None:
    """Equal within 1e-3 of their norm.

    Twelve random layers carry a float32 rounding that far; either adapter changes the logits by more than half of it.
    """
    assert (found - due).norm() < 1e-3 * due.norm()


def test_chess_adapters_on_a_stranger_of_the_same_shape_need_their_base_accepted_by_name(gpt2, corpus, tmp_path):
    stranger = tmp_path / "stranger"
    shutil.copytree(gpt2, stranger)
    config = json.loads((stranger / "config.json").read_text())
    (stranger / "config.json").write_text(json.dumps(config | {"_name_or_path": "somebody/else"}))
    refused = check(resolve(chess(stranger, corpus, 1, 0), "a test"))
    assert {(item.code, item.where) for item in refused.findings if item.severity == "error"} == {
        ("base-mismatch", "plain"),
        ("base-mismatch", "penalized"),
    }
    assert check(resolve(chess(stranger, corpus, 1, 0, accept_base=("gpt2",)), "a test")).ok


def test_two_chess_adapters_blend_and_bake_as_worked_by_hand(gpt2, corpus, tmp_path):
    recipe = chess(gpt2, corpus, 0.7, 0.4, accept_base=("gpt2",))
    loadout = resolve(recipe, "a test")
    live = start(loadout, device="cpu", dtype="float32").logits(tiny.tokens())

    model = tiny.load(gpt2)
    for weight, name in ((0.7, "ChessGPT__model"), (0.4, "ChessGPT__model_penalized")):
        found = load_file(corpus / "adapters" / f"chetanreddyv_{name}" / "adapter_model.safetensors")
        for layer, block in enumerate(model.transformer.h):
            stem = f"base_model.model.transformer.h.{layer}.attn.c_attn"
            a, b = found[f"{stem}.lora_A.weight"], found[f"{stem}.lora_B.weight"]
            block.attn.c_attn.weight.data += weight * 32 / 8 * (b @ a).T  # Conv1D is stored transposed
    with torch.no_grad():
        by_hand = model(tiny.tokens()).logits
        assert_same(live, by_hand)
        bake_model(loadout, tmp_path / "baked")
        assert_same(tiny.load(tmp_path / "baked")(tiny.tokens()).logits, by_hand)
        bake_adapter(loadout, tmp_path / "blend")
        theirs = tiny.peft_model(gpt2, tmp_path / "blend")(tiny.tokens()).logits
        assert_same(theirs, by_hand)


def test_one_chess_adapter_alone_is_that_adapter_in_peft(gpt2, corpus):
    live = start(resolve(chess(gpt2, corpus, 1, 0, accept_base=("gpt2",)), "a test"), device="cpu", dtype="float32")
    theirs = tiny.peft_model(gpt2, corpus / "adapters" / "chetanreddyv_ChessGPT__model")
    with torch.no_grad():
        assert_same(live.logits(tiny.tokens()), theirs(tiny.tokens()).logits)


# -- a Llama that was really trained, and adapters trained on it


def batch(corpus: Path, domain: str, split: str, tokenizer) -> torch.Tensor:
    """Token ids of answers of one domain, (BATCH * n, LENGTH)."""
    with (corpus / "data" / f"{domain}.jsonl").open() as file:
        rows = (json.loads(line) for line in file)
        texts = [row["messages"][-1]["content"] for row in islice((r for r in rows if r["split"] == split), 200)]
    ids = tokenizer("\n".join(texts), return_tensors="pt").input_ids[0]
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


def loss(model: torch.nn.Module, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory) -> dict[str, Path]:
    """Two adapters on stories260K: one of SQL, rank-stabilised, one of Shakespeare with DoRA and another rank."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = corpus / "base_models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = {}
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for domain, settings in (("sql", {"r": 8, "use_rslora": True}), ("shakespeare", {"r": 4, "use_dora": True})):
        torch.manual_seed(0)
        config = peft.LoraConfig(lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", **settings)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
        ids = batch(corpus, domain, "train", tokenizer)
        before = loss(model, ids[:BATCH])
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for step in range(STEPS):
            rows = ids[torch.arange(step * BATCH, (step + 1) * BATCH) % len(ids)]
            model(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        assert loss(model, ids[:BATCH]) < before - 0.3
        found[domain] = tmp_path_factory.mktemp("trained") / domain
        model.save_pretrained(found[domain])
    return found


def test_trained_adapters_do_in_the_blend_what_they_do_in_peft(corpus, trained):
    from transformers import AutoTokenizer

    base = corpus / "base_models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(base)
    experts = {name: {"adapter": str(folder)} for name, folder in trained.items()}
    engine = lmoe_cli.load(
        Recipe.model_validate({"base": str(base), "experts": experts}), device="cpu", dtype="float32"
    )
    valid = {domain: batch(corpus, domain, "valid", tokenizer)[:BATCH] for domain in trained}
    engine.set_weights(sql=0, shakespeare=0)
    without = {domain: loss(engine.model, ids) for domain, ids in valid.items()}
    for domain, folder in trained.items():
        engine.set_weights(**{name: float(name == domain) for name in trained})
        alone = loss(engine.model, valid[domain])
        assert alone == pytest.approx(loss(tiny.peft_model(base, folder), valid[domain]), abs=1e-4)
        assert alone < without[domain] - 0.2
    engine.set_weights(sql=0.5, shakespeare=0.5)
    assert all(loss(engine.model, ids) < without[domain] for domain, ids in valid.items())


def test_trained_adapters_go_through_every_command(corpus, trained, tmp_path):
    base = corpus / "base_models" / "stories260K"
    blend = ["--base", base, *(word for name in trained for word in ("--expert", f"{name}={trained[name]}:0.6"))]
    assert said("check", *blend)["recipes"][0]["ok"]
    ask = ["--prompt", "Once upon a time", "--temperature", 0, "--max-new-tokens", 24, "--dtype", "float32"]
    live = said("chat", *blend, *ask)
    assert live["weights"] == {"sql": 0.6, "shakespeare": 0.6}
    assert said("bake", *blend, "--out", tmp_path / "baked", "--verify")["report"]["verify"]["ok"]
    assert said("chat", "--base", tmp_path / "baked", *ask)["text"] == live["text"] != ""
    alone = said("chat", "--base", base, *ask)
    assert alone["text"] != live["text"]
    said("bake", *blend, "--as", "adapter", "--out", tmp_path / "blend")
    one = said("chat", "--base", base, "--expert", f"blend={tmp_path / 'blend'}", *ask)
    assert one["text"] == live["text"]
