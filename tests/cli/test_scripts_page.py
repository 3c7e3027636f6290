"""The page for scripts names the keys that commands print, all of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from commands import lmoe

PAGE = (Path(__file__).parents[2] / "docs" / "scripts.md").read_text()
RECIPE = Path(__file__).parents[2] / "recipes" / "battlemage.yaml"


def named(title, column="data"):
    """Keys in the first column of the table under a title."""
    section = PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    table = section.partition(f"| `{column}` | is |\n")[2].partition("\n\n")[0]
    cells = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    return {key for cell in cells for key in cell.split(", ")}


def told(*words, cwd):
    done = lmoe(*words, "--json", cwd=cwd)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == {"schema", "ok", "data", "findings"}
    return document["data"]


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("lmoe inspect adapter", ("inspect", "adapter", "demo:mage")),
        ("lmoe inspect base", ("inspect", "base", "demo:adventurer")),
        ("lmoe inspect loadout", ("inspect", "loadout", RECIPE)),
        ("lmoe init", ("init", "new.yaml", "--from", "demo:mage", "--base", "demo:adventurer")),
        ("lmoe ls", ("ls",)),
        ("lmoe chat", ("chat", "--prompt", "Who are you?", "--max-new-tokens", "3", "--without", "mage")),
        ("lmoe bench", ("bench", RECIPE, "--rounds", "2", "--steps", "1", "--context", "2")),
    ],
)
def test_a_command_tells_what_the_page_says(tmp_path, title, words):
    assert set(told(*words, cwd=tmp_path)) == named(title)


def test_a_check_tells_what_the_page_says(tmp_path):
    (recipe,) = told("check", RECIPE, cwd=tmp_path)["recipes"]
    assert set(recipe) == named("lmoe check", "recipe")
    for key, value in (("memory", recipe["memory"]), ("pairs", recipe["pairs"][0])):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{key}` |"))
        assert [name for name in value if f"{name}" not in row] == []


def test_a_bake_tells_what_the_page_says(tmp_path):
    data = told("bake", RECIPE, "--out", "out", "--verify", cwd=tmp_path)
    assert set(data) == named("lmoe bake")
    assert set(data["report"]) == named("lmoe bake", "bake-report.json")
    row = next(line for line in PAGE.splitlines() if line.startswith("| `experts` | name → `ref"))
    assert [key for key in data["report"]["experts"]["mage"] if key not in row] == []
    row = next(line for line in PAGE.splitlines() if line.startswith("| `verify` |"))
    assert [key for key in data["report"]["verify"] if key not in row] == []
