"""`lmoe route` as a script would call it: what it prints, the page it writes, and how it ends."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from click.testing import CliRunner
from commands import lmoe
from rich.cells import cell_len
from rich.text import Text

from lmoe_cli.chat import changed
from lmoe_cli.cli.interlinear import cell, lines
from lmoe_cli.cli.root import lmoe as command
from lmoe_cli.engine.build import load
from lmoe_cli.errors import InvalidFileError
from route.made import engine_of

TEXT = "A goblin, 2 axes."


def route(*words, cwd):
    return lmoe("route", *words, cwd=cwd)


def data(*words, cwd):
    done = route(*words, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["schema"], told["ok"]) == ("lmoe.route/1", True)
    return told["data"]


def test_the_document_has_the_keys_that_scripts_rely_on(folder, tmp_path):
    found = data(folder / "gate.yaml", TEXT, cwd=tmp_path)
    assert set(found) == {
        "router", "scope", "experts", "rest", "scores", "answer", "tokens", "layers", "places", "left_out", "without",
        "html",
    }  # fmt: skip
    assert (found["router"], found["scope"]) == ("gate", "token")
    assert [expert["letter"] for expert in found["experts"]] == ["W", "M", "H"]
    assert set(found["experts"][0]) == {"name", "letter", "share"}
    assert set(found["tokens"][0]) == {"id", "text", "part", "gates"}
    assert set(found["layers"][0]) == {"layer", "label", "gates", "shares"}
    assert set(found["places"][0]) == {"place", "layer", "gates", "shares"}
    assert found["answer"] is found["without"] is found["html"] is None


def test_what_a_token_tells_follows_the_options(folder, tmp_path):
    words = folder / "gate.yaml", TEXT
    assert set(data(*words, "--by", "layer", cwd=tmp_path)["tokens"][0]["layers"]) == {"0", "1"}
    by_site = data(*words, "--by", "site", "--without", "mage", "--generate", "3", cwd=tmp_path)
    assert set(by_site["tokens"][0]["places"]) == {place["place"] for place in by_site["places"]}
    assert {"logprob", "logprob_without", "change"} <= set(by_site["tokens"][0])
    assert by_site["without"]["tokens"] == sum(token["part"] == "answer" for token in by_site["tokens"]) == 3


def test_text_may_come_by_stdin(folder, tmp_path):
    done = lmoe("route", folder / "weighted.yaml", "--json", cwd=folder, text=f"{TEXT}\n")
    assert json.loads(done.stdout)["data"] == data(folder / "weighted.yaml", TEXT, cwd=tmp_path)
    empty = lmoe("route", folder / "weighted.yaml", cwd=folder, text="\n")
    assert (empty.returncode, empty.stdout) == (2, "")
    assert "prompt-empty" in empty.stderr


def test_under_each_token_stands_the_letter_of_the_expert_with_most_say(folder, tmp_path):
    found = data(folder / "gate.yaml", TEXT, "--raw", cwd=tmp_path)
    done = route(folder / "gate.yaml", TEXT, "--raw", cwd=tmp_path)
    text, under = done.stdout.splitlines()[:2]
    assert text == TEXT
    for letter, token in zip(under.ljust(len(text)), found["tokens"], strict=True):
        gates = token["gates"]
        best = max(gates, key=gates.get)
        share = gates[best] / max(1, sum(gates.values()))
        if token["text"] != " " and share > max(0.0, 1 - sum(gates.values())):
            assert letter == (best[0].upper() if share > 0.5 else best[0])
    assert "\x1b" not in done.stdout
    for expert in found["experts"]:
        assert f"{expert['share']:.0%}" in done.stdout


def test_by_layer_there_is_a_row_for_each(folder, tmp_path):
    out = route(folder / "gate.yaml", TEXT, "--raw", "--by", "layer", "--without", "mage", cwd=tmp_path).stdout
    first = out.splitlines()[:4]
    assert first[0].split() == TEXT.split()
    assert [line.split()[0] for line in first[1:3]] == ["0", "1"]
    assert first[3].startswith("without mage")


@pytest.mark.parametrize(
    ("kind", "said"), [("encoder", "once for the whole prompt"), ("static", "same for every token")]
)
def test_gates_that_are_the_same_are_one_bar_and_said_to_be(folder, tmp_path, kind, said):
    done = route(folder / f"{kind}.yaml", "a spell of fire", cwd=tmp_path)
    assert said in done.stderr
    bar = done.stdout.splitlines()[0]
    assert re.fullmatch("W*M*H*·*", bar)
    found = data(folder / f"{kind}.yaml", "a spell of fire", cwd=tmp_path)
    assert bar.count("M") == pytest.approx(found["experts"][1]["share"] * len(bar), abs=1.01)
    assert ("score" in done.stdout) == (kind == "encoder")


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("gate.yaml", "  "), 2, "prompt-empty"),
        (("gone.yaml", TEXT), 3, "not-found"),
        (("gate.yaml", TEXT, "--without", "mge"), 3, "did you mean 'mage'?"),
        (("gate.yaml", TEXT, "--answer", "x", "--generate", "3"), 2, "exclude each other"),
        (("gate.yaml", TEXT, "--answer", " "), 2, "prompt-empty"),
        (("gate.yaml", TEXT, "--generate", "0"), 2, "--generate"),
        (("gate.yaml", "x" * 200), 2, "context-full"),
        (("gate.yaml", "x" * 200, "--raw"), 2, "context-full"),
        (("gate.yaml", "x" * 100, "--answer", "y" * 100), 2, "context-full"),
        (("gate.yaml", TEXT, "--html", "gate.yaml"), 2, "output-exists"),
        (("gate.yaml", TEXT, "--by", "token"), 2, "--by"),
    ],
)
def test_mistakes_end_with_a_hint_and_the_right_code(folder, words, code, reason):
    before = sorted(path.name for path in folder.iterdir())
    done = route(*words, cwd=folder)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert reason in done.stderr
    assert "  hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == before


def test_chat_answers_without_an_expert(folder, tmp_path):
    words = ("--loadout", folder / "static.yaml", "--prompt", TEXT)
    done = lmoe("chat", *words, "--without", "mage", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)["data"]
    assert told["weights"] == {"warrior": 1.0, "mage": 0.0, "healer": 1.0}
    engine = load(folder / "weighted.yaml", device="cpu")
    engine.set_weights(mage=0.0)
    assert told["text"] == engine.generate(TEXT)
    refused = lmoe("chat", *words, "--without", "me", cwd=tmp_path)
    assert (refused.returncode, refused.stdout) == (3, "")


@pytest.mark.parametrize(
    "error",
    [
        InvalidFileError("logits-not-finite", "the model computes NaN or infinity", hint="smaller weights"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
    ],
)
def test_an_answer_that_cannot_be_compared_is_told_all_the_same(folder, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(changed, "compare", fail)
    words = ["chat", "--loadout", str(folder / "weighted.yaml"), "--prompt", TEXT, "--without", "mage", "--json"]
    document = json.loads(CliRunner().invoke(command, words).stdout)
    assert document["ok"]
    assert document["data"]["without"] is None
    assert document["data"]["text"]
    assert [item["code"] for item in document["findings"]] == ["change-unknown"]


@pytest.mark.parametrize("router", ["gate", "encoder", "static"])
def test_chat_tells_what_the_expert_would_have_changed_in_each_token(folder, tmp_path, router):
    words = ("--loadout", folder / f"{router}.yaml", "--prompt", TEXT)
    told = json.loads(lmoe("chat", *words, "--without", "mage", "--json", cwd=tmp_path).stdout)["data"]
    engine, other = engine_of(folder / f"{router}.yaml"), engine_of(folder / f"{router}.yaml", mage=0.0)
    assert told["text"] == other.generate(TEXT)
    changes = told["without"]["changes"]
    assert "".join(token["text"] for token in changes) == told["text"]
    prompt, said = engine.encode(TEXT), [token["id"] for token in changes]
    both = []
    for one in (engine, other):
        one.route(TEXT)
        logits = torch.log_softmax(one.logits(torch.tensor([[*prompt, *said]]))[0], -1)[len(prompt) - 1 : -1]
        both.append(logits.gather(1, torch.tensor(said)[:, None])[:, 0])
    expected = both[0] - both[1]
    assert expected.abs().max() > 0.01
    assert [token["logprob"] for token in changes] == pytest.approx(both[0].tolist(), abs=1e-3)
    assert [token["change"] for token in changes] == pytest.approx(expected.tolist(), abs=1e-3)
    assert told["without"]["mean_change"] == pytest.approx(float(expected.mean()), abs=1e-3)
    spoken = lmoe("chat", *words, "--without", "mage", cwd=tmp_path)
    assert spoken.stdout == f"{told['text']}\n"
    assert f"with mage, less those without: {told['without']['mean_change']:+.4f} nats per token" in spoken.stderr


# -- the page


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.tokens, self.words, self.open = set(), {}, [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= dict(attrs)
        if tag == "ruby":
            self.tokens.append({**dict(attrs), "text": ""})
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.words.append(text)
        if self.open[-1:] == ["ruby"]:
            self.tokens[-1]["text"] += text
        if self.open[-1:] == ["rt"]:
            self.tokens[-1]["letter"] = text


def test_the_page_is_whole_in_itself_and_holds_every_gate_by_layer(folder, tmp_path):
    words = folder / "gate.yaml", "A goblin\n<b>says</b> </script><script>alert(1)</script>"
    found = data(*words, "--html", "page.html", "--by", "layer", "--without", "mage", cwd=tmp_path)
    assert found["html"] == "page.html"
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert page.open == []
    assert not page.tags & {"link", "img", "iframe", "object", "video", "b"}
    assert not page.attributes.keys() & {"src", "href", "srcset", "onclick"}
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", text)
    assert "".join(token["text"] for token in page.tokens) == "".join(
        token["text"].replace("\n", "↵") for token in found["tokens"]
    )
    for shown, token in zip(page.tokens, found["tokens"], strict=True):
        assert shown["title"] == ", ".join(f"{name} {gate:.3f}" for name, gate in token["gates"].items())
        assert shown["letter"].upper() in set("WMH·")
    held = json.loads(next(word for word in page.words if word.startswith('{"names"')))
    for inside, token in zip(held["tokens"], found["tokens"], strict=True):
        assert (inside["text"], inside["change"]) == (token["text"], token["change"])
        for row, gates in zip(inside["layers"], token["layers"].values(), strict=True):
            assert row == pytest.approx(list(gates.values()), abs=0.0005001)


def test_the_page_runs_its_own_script_and_no_other(folder, tmp_path):
    import base64
    import hashlib

    assert route(folder / "weighted.yaml", TEXT, "--html", "page.html", cwd=tmp_path).returncode == 0
    text = (tmp_path / "page.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_a_page_is_replaced_only_when_forced(folder, tmp_path):
    (tmp_path / "page.html").write_text("mine")
    words = folder / "weighted.yaml", TEXT, "--html", "page.html"
    assert route(*words, cwd=tmp_path).returncode == 2
    assert (tmp_path / "page.html").read_text() == "mine"
    assert route(*words, "--force", cwd=tmp_path).returncode == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


# -- lines


def laid_out(tokens, width):
    found = lines([cell(text, [Text(mark)], "") for text, mark in tokens], width, [""])
    return [line.plain for line in found]


def test_letters_stand_under_the_first_letter_of_their_tokens_whatever_its_width():
    assert laid_out([("漢字", "W"), (" axe", "M"), ("s", "H")], 40) == ["漢字 axes", "W    M  H"]


def test_what_takes_no_column_moves_no_letter():
    assert laid_out([("e", "W"), ("\u0301", "M"), ("a", "H")], 40) == ["e\u0301a", "WH"]


def test_lines_break_before_words_and_after_line_breaks():
    tokens = [("gob", "W"), ("lin", "M"), (" axe", "H"), ("s\n", "W"), ("ab", "M")]
    assert laid_out(tokens, 8) == ["goblin", "W  M", "axes↵", "H  W", "ab", "M"]


def test_nothing_a_token_says_steers_the_terminal():
    (text, _) = laid_out([("\x1b[31m", "W")], 40)
    assert text == "\\x1b[31m"


def test_no_line_is_too_wide():
    tokens = [(f" word{number}", "W") for number in range(50)]
    for width in (8, 20, 79):
        found = laid_out(tokens, width)
        assert all(cell_len(line) <= width for line in found)
        assert "".join("".join(found[::2]).split()) == "".join(text.strip() for text, _ in tokens)
        assert "".join(found[1::2]).count("W") == 50
