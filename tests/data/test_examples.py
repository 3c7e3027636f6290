"""What the assistant says is learned, and nothing else, whatever the template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import lmoe_cli
from data.made import ids, said, tiny_tokenizer, written
from lmoe_cli.data.examples import Encoder
from lmoe_cli.data.records import read_records
from lmoe_cli.errors import InvalidFileError

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<answer>"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}"
    "{% else %}<user>{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
THINKING = (  # as Qwen3's: the last answer alone is written with its thoughts
    "{% for m in messages %}{% if m.role == 'assistant' %}<answer>"
    "{% if loop.last %}()\n{% endif %}{{ m.content }}</s>\n"
    "{% else %}<user>{{ m.content }}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)


def encoded(tokenizer, tmp_path, *entries, **settings):
    encoder = Encoder(tokenizer, settings.pop("limit", 1000), **settings)
    return encoder, list(encoder.examples(read_records(written(tmp_path / "data.jsonl", *entries))))


def learned(example):
    return [token for token, is_learned in zip(example.tokens, example.learned, strict=True) if is_learned]


@pytest.fixture(scope="session")
def adventurer():
    return AutoTokenizer.from_pretrained(Path(lmoe_cli.__file__).parent / "demo" / "adventurer")


def test_a_marked_template_teaches_what_transformers_masks(adventurer, corpus, tmp_path):
    found = list(read_records(corpus / "data" / "shakespeare.jsonl"))[:40]
    encoder = Encoder(adventurer, 10_000)
    for record in found:
        example = encoder.encode(record)
        theirs = adventurer.apply_chat_template(
            list(record.messages), return_dict=True, return_assistant_tokens_mask=True
        )
        assert example.tokens == theirs["input_ids"]
        assert example.learned == [bool(one) for one in theirs["assistant_masks"]]
        assert example.where == record.where
        # And by hand: the answer and the mark that ends it.
        answer = adventurer(record.messages[-1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        assert learned(example) == answer


def test_without_marks_the_turns_after_their_prompts_are_learned(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    talk = {"messages": [{"role": "system", "content": "so"}, *said("hi", "yes", "who", "me")["messages"]]}
    _, (example,) = encoded(tokenizer, tmp_path, talk)
    parts = ["<system>", "so", "</s>", "<user>", "hi", "</s>", "<answer>", "yes", "</s>"]
    parts += ["<user>", "who", "</s>", "<answer>", "me", "</s>"]
    assert example.tokens == ids(tokenizer, *parts)
    assert learned(example) == ids(tokenizer, "yes", "</s>", "me", "</s>")
    assert example.learned.index(True) == len(ids(tokenizer, *parts[:7]))


def test_marks_and_no_marks_agree_on_the_same_conversation(tmp_path):
    talks = [said("hi", "yes"), said("a", "b", "c", "d", "e", "f"), said("no answer", "here", "last")]
    plain = encoded(tiny_tokenizer(tmp_path, MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")),
                    tmp_path, *talks)[1]  # fmt: skip
    assert encoded(tiny_tokenizer(tmp_path, MARKED), tmp_path, *talks)[1] == plain


@pytest.mark.parametrize(
    "template", [MARKED, MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", ""), None]
)
def test_a_message_of_weight_0_is_read_and_not_learned(tmp_path, template):
    talk = said("hi", "yes", "who", "me", "so", "it is")
    talk["messages"][3]["weight"] = 0
    talk["messages"][5]["weight"] = 1
    tokenizer = tiny_tokenizer(tmp_path, template, plain=template is None)
    _, (example,) = encoded(tokenizer, tmp_path, talk)
    end = "</s>"
    due = ["yes", end, "it is", end] if template else ["yes", "it is", end]
    assert learned(example) == ids(tokenizer, *due)
    _, (whole,) = encoded(tokenizer, tmp_path, said("hi", "yes", "who", "me", "so", "it is"))
    assert example.tokens == whole.tokens


def test_marks_that_do_not_part_the_turns_cannot_tell_which_is_of_weight_0(tmp_path):
    everything = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    talk = said("hi", "yes", "who", "me")
    talk["messages"][1]["weight"] = 0
    with pytest.raises(InvalidFileError) as caught:
        encoded(tiny_tokenizer(tmp_path, everything), tmp_path, talk)
    assert caught.value.code == "template-no-mask"


def test_a_template_that_leaves_out_earlier_thoughts_is_followed(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, THINKING)
    _, (example,) = encoded(tokenizer, tmp_path, said("hi", "yes", "who", "me"))
    assert learned(example) == ids(tokenizer, "yes", "</s>", "()\nme", "</s>", "\n")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<system>{% endif %}",
        "{% for m in messages[::-1] %}<user>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<user>{% endif %}",
        THINKING.replace("</s>", ""),
    ],
)
def test_a_template_whose_turns_cannot_be_told_apart_is_refused(tmp_path, template):
    tokenizer = tiny_tokenizer(tmp_path, template)
    with pytest.raises(InvalidFileError) as caught:
        encoded(tokenizer, tmp_path, said("hi", "yes", "who", "me"))
    assert caught.value.code == "template-no-mask"
    assert "data.jsonl:1" in caught.value.message


def test_a_conversation_that_the_assistant_begins_needs_marks(tmp_path):
    with pytest.raises(InvalidFileError) as caught:
        encoded(tiny_tokenizer(tmp_path), tmp_path, said("hi", "yes", first="assistant"))
    assert caught.value.code == "template-no-mask"
    tokenizer = tiny_tokenizer(tmp_path, MARKED)
    _, (example,) = encoded(tokenizer, tmp_path, said("hi", "yes", first="assistant"))
    assert learned(example) == ids(tokenizer, "hi", "</s>")


def test_a_template_that_fails_is_refused_with_the_line(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, "{{ raise_exception('no system') if messages[0].role == 'system' }}" + MARKED)
    talk = {"messages": [{"role": "system", "content": "so"}, *said("hi", "yes")["messages"]]}
    with pytest.raises(InvalidFileError) as caught:
        encoded(tokenizer, tmp_path, said("hi", "yes"), talk)
    assert caught.value.code == "template-refused"
    assert "data.jsonl:2: the chat template fails: no system" in caught.value.message


def test_of_a_text_every_token_is_learned_and_the_end_once(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    _, (one, two) = encoded(tokenizer, tmp_path, {"text": "abc"}, {"text": "abc</s>"})
    assert one.tokens == two.tokens == ids(tokenizer, "abc", "</s>")
    assert one.learned == [True] * 4


def test_a_text_begins_as_the_tokenizer_begins_one(corpus, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(corpus / "base_models" / "stories260K")
    _, (example,) = encoded(tokenizer, tmp_path, {"text": "Once upon a time"})
    assert example.tokens == [*tokenizer("Once upon a time")["input_ids"], tokenizer.eos_token_id]


def test_without_a_template_the_prompt_is_the_one_that_an_answer_is_asked_by(tmp_path):
    from lmoe_cli.engine.prompt import prompt_tokens

    tokenizer = tiny_tokenizer(tmp_path, plain=True)
    talk = {"messages": [{"role": "system", "content": "so "}, *said("hi ", "yes")["messages"]]}
    _, (example,) = encoded(tokenizer, tmp_path, talk)
    prompt = prompt_tokens(tokenizer, talk["messages"][:2], 1000, 1000)
    assert example.tokens == prompt + ids(tokenizer, "yes", "</s>")
    assert example.learned == [False] * len(prompt) + [True] * 4


def test_without_a_template_what_the_user_says_last_is_not_learned(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path, plain=True)
    _, (example,) = encoded(tokenizer, tmp_path, said("hi", "yes", "so"))
    assert learned(example) == ids(tokenizer, "yes")


def test_what_is_too_long_is_cut_or_left_out_or_refused_and_counted(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    entries = [said("hi", "yes"), said("hi", "a long answer"), said("a question of more than ten", "yes")]
    cut, examples = encoded(tokenizer, tmp_path, *entries, limit=10)
    assert [len(example.tokens) for example in examples] == [9, 10]
    assert learned(examples[1]) == ids(tokenizer, "a lon")
    assert (cut.tally.records, cut.tally.examples, cut.tally.truncated, cut.tally.unlearned) == (3, 2, 1, 1)
    assert (cut.tally.tokens, cut.tally.learned) == (19, 4 + 5)
    assert cut.tally.told() == "1 of 3 records cut off at the limit; 1 of 3 left out: nothing to predict in the limit"

    left, examples = encoded(tokenizer, tmp_path, *entries, limit=10, too_long="skip")
    assert (len(examples), left.tally.skipped) == (1, 2)
    assert left.tally.told() == "2 of 3 records left out, longer than the limit"

    with pytest.raises(InvalidFileError) as caught:
        encoded(tokenizer, tmp_path, *entries, limit=10, too_long="error")
    assert caught.value.code == "data-too-long"
    assert "data.jsonl:2: 19 tokens, at most 10" in caught.value.message


def test_tokens_that_the_base_does_not_know_are_refused(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path)
    with pytest.raises(InvalidFileError) as caught:
        encoded(tokenizer, tmp_path, {"text": "ab"}, vocabulary=len(ids(tokenizer, "<s>")) + 6)
    assert caught.value.code == "tokenizer-broken"


def test_a_template_is_tried_again_only_for_what_is_larger_than_before(tmp_path, monkeypatch):
    from lmoe_cli.data import masks

    tried = []
    monkeypatch.setattr(masks, "try_template", lambda _, messages, __: tried.append(json.dumps(messages)))
    talks = [said("hi", "yes"), said("hi", "no"), said("hello", "yes"), said("a", "b", "c", "d"), said("a", "b")]
    encoded(tiny_tokenizer(tmp_path), tmp_path, *talks)
    assert len(tried) == 3
