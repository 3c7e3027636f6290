"""`lmoe similarity` as a script would call it: exit codes, JSON, and the page it writes."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser

import pytest
from commands import lmoe
from laws.cases import case

from tests.similarity.adapters import module, random, write

PAIR = {
    "first", "second", "shared", "cosine", "cosine_shared",
    "overlap_input", "overlap_output", "chance_input", "chance_output",
}  # fmt: skip
MEASURES = {"matrices", "norms", "pairs"}


def similarity(*words, cwd):
    return lmoe("similarity", *words, cwd=cwd)


@pytest.fixture
def place(tmp_path):
    """A folder with a base, two adapters, one of them DoRA, and a recipe that names them."""
    own = case("qwen3", "dora")
    for name, folder in (("base", own.base), ("one", own.one), ("two", own.two)):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "mix.yaml").write_text(
        "base: ./base\nexperts:\n  one: {adapter: ./one, weight: 0.5}\n  two: {adapter: ./two}\n"
    )
    (tmp_path / "alone.yaml").write_text("base: ./base\nexperts:\n  one: {adapter: ./one}\n")
    write(tmp_path / "narrow", {module(): random()})
    return tmp_path


def data(*words, cwd):
    done = similarity(*words, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["schema"], told["ok"]) == ("lmoe.similarity/1", True)
    return told["data"], told["findings"]


def test_the_document_has_the_keys_that_scripts_rely_on(place):
    found, findings = data("one", "other=two", cwd=place)
    assert set(found) == {"adapters", "base", "overall", "kinds", "layers", "matrices", "html"}
    assert list(found["adapters"]) == ["one", "other"]
    assert set(found["adapters"]["one"]) == {
        "ref", "revision", "base", "peft_type", "rank", "variants", "modules", "norm",
    }  # fmt: skip
    assert set(found["overall"]) == MEASURES
    assert [set(group) - MEASURES for group in (found["kinds"][0], found["layers"][0], found["matrices"][0])] == [
        {"kind"}, {"layer"}, {"module", "shape"},
    ]  # fmt: skip
    assert all(set(pair) == PAIR for group in found["matrices"] for pair in group["pairs"])
    assert [group["layer"] for group in found["layers"]] == [0, 1]
    assert {group["kind"] for group in found["kinds"]} >= {"q_proj", "down_proj"}
    assert (found["base"], found["html"]) == (None, None)
    assert {item["code"] for item in findings} >= {"delta-partial"}


def test_a_recipe_and_a_base_in_words_give_the_same_whole_deltas(place):
    by_recipe, findings = data("--loadout", "mix.yaml", cwd=place)
    by_words, _ = data("one", "two", "--base", "base", cwd=place)
    assert by_recipe["overall"] == by_words["overall"]
    assert not [item for item in findings if item["code"] == "delta-partial"]
    without, _ = data("one", "two", cwd=place)
    assert without["overall"]["norms"]["one"] != pytest.approx(by_recipe["overall"]["norms"]["one"], rel=1e-3)
    assert without["overall"]["norms"]["two"] == pytest.approx(by_recipe["overall"]["norms"]["two"], rel=1e-6)


def test_a_person_is_shown_the_same_numbers(place):
    found, _ = data("one", "two", cwd=place)
    done = similarity("one", "two", cwd=place)
    assert done.returncode == 0
    assert f"{found['overall']['pairs'][0]['cosine']:.3g}" in done.stdout
    assert f"{found['layers'][1]['norms']['two']:.3g}" in done.stdout
    assert "warning[delta-partial]: one: of 14 modules only s B A is compared" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        ((), 2, "0 adapters to compare, two at least"),
        (("one",), 2, "1 adapters to compare, two at least"),
        (("--loadout", "alone.yaml"), 2, "1 experts to compare, two at least"),
        (("--loadout", "mix.yaml", "one"), 2, "--loadout excludes REF"),
        (("one", "two", "--accept-base", "acme/x"), 2, "goes with --base"),
        (("a=one", "a=two"), 2, "two adapters are called a"),
        (("one", "absent"), 3, "no such folder"),
        (("one", "base"), 3, "no adapter here"),
        (("one", "nobody/nothing"), 5, "offline"),
        (("one", "narrow"), 1, "of different bases: 1 of 1 shapes differ"),
        (("one", "narrow", "--base", "base"), 1, "shape-mismatch"),
        (("one", "two", "--html", "mix.yaml"), 2, "exists already"),
        (("one", "two", "--html", "base", "--force"), 2, "is a folder"),
        (("one", "two", "--html", "mix.yaml/x.html"), 2, "cannot write"),
    ],
)
def test_mistakes_end_with_one_line_a_hint_and_the_right_code(place, words, code, reason):
    before = sorted(path.name for path in place.iterdir())
    done = similarity(*words, cwd=place)
    assert done.returncode == code, done.stderr
    assert reason in done.stderr
    assert "  hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_mistake_is_told_in_json_too(place):
    done = similarity("one", "narrow", "--json", cwd=place)
    told = json.loads(done.stdout)
    assert (done.returncode, told["ok"], told["data"]) == (1, False, None)
    assert "shapes-differ" in [item["code"] for item in told["findings"]]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = set(), {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= dict(attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)


def test_the_page_is_whole_in_itself_and_holds_the_numbers(place):
    found, _ = data("one", "two", "--html", "page.html", cwd=place)
    assert found["html"] == "page.html"
    text = (place / "page.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"script", "link", "img", "iframe", "object", "video"}
    assert not page.attributes.keys() & {"src", "href", "srcset"}
    assert not re.search(r"https?://|url\(|@import", text)
    assert f"{found['overall']['pairs'][0]['cosine']:.3g}" in page.words
    assert f"{found['layers'][0]['pairs'][0]['overlap_input']:.3g}" in page.words
    assert any("delta-partial" in word for word in page.words)


def test_a_page_is_replaced_only_when_forced(place):
    (place / "page.html").write_text("mine")
    assert similarity("one", "two", "--html", "page.html", cwd=place).returncode == 2
    assert (place / "page.html").read_text() == "mine"
    assert similarity("one", "two", "--html", "page.html", "--force", cwd=place).returncode == 0
    assert (place / "page.html").read_text().startswith("<!doctype html>")


def test_names_of_strangers_are_text_on_the_page(place):
    nasty = "<script>alert(1)</script>"
    config = json.loads((place / "one" / "adapter_config.json").read_text())
    (place / "one" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": nasty}))
    assert (
        similarity("one", f"{nasty}=two", "--html", "page.html", cwd=place).returncode != 0
    )  # a path, which is not there
    assert similarity("one", "<b>x<b>=two", "--html", "page.html", cwd=place).returncode == 0
    page = Page((place / "page.html").read_text())
    assert not page.tags & {"script", "b"}
    assert nasty in page.words
    assert "<b>x<b>" in page.words
