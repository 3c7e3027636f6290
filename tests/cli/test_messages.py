"""What commands say of inputs that are far too long, far too many, or meant to steer a terminal."""

from __future__ import annotations

import json

import pytest

from lmoe_cli.cli.output import Output
from lmoe_cli.cli.root import run
from tests.adapter import made

BLEND = "base: demo:adventurer\nexperts:\n  mage: {{adapter: demo:mage, weight: {weight}}}\n{more}"
LONG = "x" * 100_000
RECIPES = {
    "version": BLEND.format(weight=1, more=f"version: {LONG}\n"),
    "name": BLEND.format(weight=1, more=f"name: {LONG}\n"),
    "words": BLEND.format(weight=1, more=f"name: {'ab cd ' * 20_000}\n"),
    "weight": BLEND.format(weight=LONG, more=""),
    "tag": BLEND.format(weight=1, more=f"name: !{LONG} x\n"),
    "key": BLEND.format(weight=1, more=f"? {'k' * 500_000}\n: x\n"),
    "twice": BLEND.format(weight=1, more=f"? {'k' * 400_000}\n: x\n" * 2),
    "many": BLEND.format(weight=1, more="".join(f"k{number}: 1\n" for number in range(1_500))),
    "control": 'base: "\\0\\e[2J\\x9b"\nexperts: {}\n',
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_wrong_recipe_is_told_in_a_few_lines_without_control_characters(name, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text(RECIPES[name])
    assert run(["check", "wrong.yaml"]) in (2, 3)
    out, err = capfd.readouterr()
    assert "error[" in err
    assert len(out) + len(err) < 4000
    assert all(character.isprintable() or character == "\n" for character in out + err)


def test_people_are_told_twenty_findings_and_how_many_more_there_are(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text(RECIPES["many"])
    assert run(["check", "wrong.yaml"]) == 2
    err = capfd.readouterr().err
    assert err.count("error[recipe-invalid]") == 20
    assert "and 1480 more; --json tells all" in err
    assert run(["check", "wrong.yaml", "--json"]) == 2
    assert len(json.loads(capfd.readouterr().out)["findings"]) == 1_500


def test_no_output_holds_control_characters_that_came_with_a_value(capfd):
    evil = "evil\x1b[2J\x9b31m"
    for out in (Output("inspect"), Output("inspect", as_json=True)):
        out.say(evil)
        out.facts(evil, [("base", evil), ("modules", [evil])])
        out.table(evil, ["name"], [[evil]])
        out.finish({"base": evil})
        output = "".join(capfd.readouterr())
        assert "evil" in output
        assert not set(output) & {"\x1b", "\x9b"}


def test_people_are_told_the_twenty_pairs_that_matter_most(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made.write(tmp_path / "base", made.base())
    made.write(tmp_path / "one", made.adapter())
    experts = "".join(f"  e{number}: {{adapter: ./one}}\n" for number in range(12))
    (tmp_path / "many.yaml").write_text(f"base: ./base\nexperts:\n{experts}")
    assert run(["check", "many.yaml"]) == 0
    told = capfd.readouterr()
    assert told.out.count(" + e") == 20
    assert "and 46 more pairs; --json tells all" in told.err
    assert run(["check", "many.yaml", "--json"]) == 0
    assert len(json.loads(capfd.readouterr().out)["data"]["recipes"][0]["pairs"]) == 66
