"""A tokenizer or chat template that an adapter brings is compared by what it does, not by how it is written."""

from __future__ import annotations

import json
import shutil

import pytest
from laws.cases import case
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from lmoe_cli.check import check
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
VOCABULARY = {"a": 0, "b": 1, "ab": 2, "c": 3}


def tokenizer(vocabulary=VOCABULARY, **stages):
    """A tokenizer as the tokenizers library makes it."""
    made = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for name, stage in stages.items():
        setattr(made, name, stage)
    return made


@pytest.fixture
def told(tmp_path):
    """What a check tells of tokenizer and template, with these files beside base and adapter."""
    own = case("llama", "lora")
    shutil.copytree(own.base, tmp_path / "base")
    shutil.copytree(own.one, tmp_path / "one")

    def codes(base, adapter):
        for folder, files in (("base", base), ("one", adapter)):
            for name, text in files.items():
                (tmp_path / folder / name).write_text(text)
        experts = {"one": {"adapter": str(tmp_path / "one")}}
        loadout = resolve(Recipe.model_validate({"base": str(tmp_path / "base"), "experts": experts}), "a test")
        found = check(loadout).findings
        return {item.code: item.message for item in found if item.code in ("tokenizer-differs", "template-differs")}

    return codes


def added():
    made = tokenizer()
    made.add_special_tokens([AddedToken("<|tool|>")])
    return made


@pytest.mark.parametrize(
    ("other", "stage"),
    [
        (tokenizer({"b": 0, "a": 1, "ab": 2, "c": 3}), "model"),
        (tokenizer(normalizer=normalizers.Lowercase()), "normalizer"),
        (added(), "added_tokens"),
    ],
)
def test_a_tokenizer_that_gives_other_ids_is_told(told, other, stage):
    text = tokenizer().to_str()
    assert stage in told({"tokenizer.json": text}, {"tokenizer.json": other.to_str()})["tokenizer-differs"]


def older(text):
    """The same tokenizer as versions before 0.20 wrote it: merges as text, unset keys left out."""
    data = json.loads(text)
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    data["model"] = {key: value for key, value in data["model"].items() if value not in (None, False) or key == "vocab"}
    return json.dumps(data)


def trained():
    made = tokenizer()
    made.enable_truncation(512)
    made.enable_padding()
    return made.to_str()


@pytest.mark.parametrize(
    "text", [json.dumps(json.loads(tokenizer().to_str()), indent=1), older(tokenizer().to_str()), trained()]
)
def test_the_same_tokenizer_written_otherwise_is_not_told(told, text):
    own = tokenizer()
    assert Tokenizer.from_str(text).encode("ab c").ids[:2] == own.encode("ab c").ids
    assert text != own.to_str()
    assert not told({"tokenizer.json": own.to_str()}, {"tokenizer.json": text})


@pytest.mark.parametrize(
    "settings",
    [{"chat_template": "X" + TEMPLATE}, {"chat_template": [{"name": "default", "template": "X" + TEMPLATE}]}],
)
def test_another_template_inside_the_tokenizers_settings_is_told(told, settings):
    base = {"tokenizer_config.json": json.dumps({"chat_template": TEMPLATE})}
    assert "template-differs" in told(base, {"tokenizer_config.json": json.dumps(settings)})


def test_one_template_in_two_places_is_the_same(told):
    base = {"tokenizer_config.json": json.dumps({"chat_template": TEMPLATE})}
    assert not told(base, {"chat_template.jinja": TEMPLATE + "\n"})


def test_a_template_where_the_base_has_none_is_told(told):
    assert "template-differs" in told({}, {"chat_template.jinja": TEMPLATE})


def test_damaged_files_that_are_not_used_stop_nothing(told):
    whole = {"tokenizer.json": tokenizer().to_str(), "tokenizer_config.json": "{}"}
    assert set(told(whole, {"tokenizer.json": "{", "tokenizer_config.json": "["})) == {"tokenizer-differs"}
