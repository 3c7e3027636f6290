"""What may be done to an engine, in which state."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import peft
import pytest
import tiny
import torch
from laws.cases import assert_close, base, case

import lmoe_cli.demo
from lmoe_cli.engine.build import start
from lmoe_cli.engine.prompt import prompt_tokens
from lmoe_cli.errors import InvalidFileError, LmoeError, UsageError
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe


def test_a_folded_blend_takes_no_gates():
    engine = case("llama", "lora").engine({"one": 0.6})
    engine.fold()
    with pytest.raises(UsageError) as told:
        engine.set_gates([[0.0]])
    assert told.value.code == "folded"


def test_gates_do_not_turn_while_a_token_is_computed():
    engine = case("llama", "lora").engine({"one": 0.6})
    turning = threading.Thread(target=engine.set_gates, args=([[0.0]],))
    with engine.still() as blend:
        turning.start()
        turning.join(0.2)
        assert engine.blend == blend
    turning.join()
    assert engine.blend != blend


def test_keys_and_values_of_the_base_are_not_used_again_once_it_is_folded():
    engine = case("llama", "lora").engine({"one": 0.7})
    values, tokens = engine.key_values(), tiny.tokens()[0].tolist()
    engine.detach()
    with engine.still() as blend:
        values.logits(tokens, blend)
    engine.fold()
    with engine.still() as blend:
        found = values.logits([*tokens, 1], blend)
        assert torch.equal(found, engine.key_values().logits([*tokens, 1], blend))


def test_folding_folds_the_weights_also_where_rows_had_gates_of_their_own():
    engine = case("llama", "lora").engine({"one": 0.6})
    expected = engine.logits(tiny.tokens())
    engine.set_gates([[0.0], [1.0]])
    engine.fold()
    assert_close(engine.logits(tiny.tokens()), expected)
    assert_close(engine.logits(tiny.tokens(rows=3)[:1]), engine.model(tiny.tokens(rows=3)[:1]).logits)


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("folded", [True, False])
def test_a_base_left_alone_for_a_while_is_afterwards_as_it_was_before(attached, folded):
    engine = case("llama", "lora").engine({"one": 0.6})
    if not attached:
        engine.detach()
    if folded:
        engine.fold()
    with torch.no_grad():
        before = engine.model(tiny.tokens()).logits
        with engine.alone() as alone:
            assert torch.equal(alone(tiny.tokens()).logits, tiny.load(base("llama"))(tiny.tokens()).logits)
        assert engine.is_folded == folded
        assert torch.equal(engine.model(tiny.tokens()).logits, before)


@pytest.fixture(scope="module")
def on_positions(tmp_path_factory):
    """An adapter on embeddings that are looked up once for all rows of a batch."""
    folder = tmp_path_factory.mktemp("positions")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["wpe"], init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(tiny.load(base("gpt2")), config).save_pretrained(folder)
    return folder


def test_rows_carry_blends_of_their_own_where_an_input_is_shared_by_all_of_them(on_positions):
    experts = {"one": {"adapter": str(on_positions)}}
    engine = start(resolve(Recipe.model_validate({"base": str(base("gpt2")), "experts": experts}), "a test"))
    engine.set_gates([[1.0], [0.0]])
    ours = engine.logits(tiny.tokens())
    with torch.no_grad():
        assert_close(ours[0], tiny.peft_model(base("gpt2"), on_positions)(tiny.tokens()).logits[0])
        assert_close(ours[1], tiny.load(base("gpt2"))(tiny.tokens()).logits[1])


@pytest.mark.parametrize(("arch", "variant"), [("llama", "lora"), ("llama", "saved_norm"), ("mixtral", "experts")])
@pytest.mark.parametrize("rows", [1, 4, 3])
def test_a_batch_of_another_size_than_the_gates_is_refused(arch, variant, rows):
    engine = case(arch, variant).engine({"one": 1.0})
    engine.set_gates([[1.0], [0.0]])
    with pytest.raises(ValueError, match="rows of gates"):
        engine.logits(tiny.tokens(rows=rows))
    if variant != "experts":  # those of a mixture see tokens without their rows
        with pytest.raises(ValueError, match="rows of gates"):
            engine.model(tiny.tokens(rows=rows))


def test_an_answer_is_refused_while_rows_have_gates_of_their_own():
    engine = case("llama", "lora").engine({"one": 1.0})
    engine.set_gates([[1.0], [0.0]])
    with pytest.raises(ValueError, match="rows of gates"):
        engine.stream("Hello")


@pytest.mark.parametrize(
    "wrong",
    [
        {"attention_bias": None}, {"head_dim": 0}, {"num_attention_heads": 0}, {"pad_token_id": 9999999},
        {"vocab_size": 0}, {"num_hidden_layers": 10**6}, {"rms_norm_eps": float("nan")},
        {"hidden_act": "nonsense"}, {"layer_types": []}, {"hidden_size": 33}, {"tie_word_embeddings": "x"},
    ],
)  # fmt: skip
def test_a_wrong_config_of_a_base_is_told_and_is_no_bug(tmp_path, wrong):
    shutil.copytree(Path(lmoe_cli.demo.__file__).parent / "adventurer", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    recipe = Recipe.model_validate({"base": str(tmp_path / "base"), "experts": {}})
    with pytest.raises(LmoeError):
        start(resolve(recipe, "a test"), device="cpu").generate("hi", temperature=0, max_new_tokens=2)


def test_a_tokenizer_of_another_model_is_told(tmp_path):
    class Tokenizer:
        chat_template = None

        def __call__(self, text):
            return {"input_ids": [1, 500]}

    with pytest.raises(InvalidFileError, match="token 500, and the base knows 96"):
        prompt_tokens(Tokenizer(), [{"role": "user", "content": "hi"}], 100, 96)
