"""How the house is kept: light commands are light, one module writes, every code is explained."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmoe_cli.codes import CODES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lmoe_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "peft", "numpy", "safetensors")
PROBE = """
import runpy, sys
sys.argv = ["lmoe", *{arguments!r}]
try:
    runpy.run_module("lmoe_cli", run_name="__main__")
except SystemExit as leave:
    code = leave.code
loaded = {{name.partition(".")[0] for name in sys.modules}}
print("\\n@", code, *sorted(loaded & set({names!r})))
"""


def loaded_by(*arguments: str, names: tuple[str, ...] = HEAVY) -> tuple[int, set[str]]:
    """Exit code of a command in a fresh interpreter, and which of some packages it loaded."""
    code = PROBE.format(arguments=arguments, names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    told = re.search(r"^@ (\S+) ?(.*)$", done.stdout, re.MULTILINE)
    assert told, done.stderr
    return int(told[1]), set(told[2].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("--version",),
        ("ls",),
        ("schema",),
        ("inspect", "adapter", "demo:mage"),
        ("inspect", "base", "demo:adventurer"),
        ("inspect", "loadout", "recipes/battlemage.yaml"),
        ("check", "recipes/battlemage.yaml"),
        ("completion", "bash"),
    ],
)
def test_a_light_command_loads_no_heavy_package(arguments):
    assert loaded_by(*arguments) == (0, set())


@pytest.mark.parametrize("command", ["chat", "bake", "bench", "pull", "rm", "init", "inspect"])
def test_help_of_every_command_loads_click_and_nothing_else(command):
    names = (*HEAVY, "rich", "pydantic", "yaml", "huggingface_hub", "prompt_toolkit")
    assert loaded_by(command, "--help", names=names) == (0, set())


def test_a_wrong_recipe_is_refused_before_anything_heavy_is_loaded(tmp_path):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("base: demo:adventurer\nexperts: {mage: {adaptr: demo:mage}}\n")
    for command in (("chat", "--loadout"), ("bake", "--out", str(tmp_path / "out")), ("bench",)):
        assert loaded_by(*command, str(recipe)) == (2, set())


def test_every_command_is_listed_with_the_summary_its_own_help_begins_with():
    from click.testing import CliRunner

    from lmoe_cli.cli.inspect import KINDS
    from lmoe_cli.cli.main import COMMANDS, lmoe

    listed = {(name,): entry for name, entry in COMMANDS.items()}
    listed |= {("inspect", name): entry for name, entry in KINDS.items()}
    for words, entry in listed.items():
        result = CliRunner().invoke(lmoe, [*words, "--help"])
        assert result.exit_code == 0, result.output
        assert entry.summary in re.sub(r"\s+", " ", result.output), words


def test_only_one_module_writes():
    """Calls that make, change or remove files stand in `files.py` alone."""
    writers = {
        "write_text",
        "write_bytes",
        "mkdir",
        "rename",
        "replace",
        "unlink",
        "rmdir",
        "touch",
        "makedirs",
        "rmtree",
    }
    writers |= {"copyfile", "copy2", "move", "copytree", "symlink_to", "hardlink_to", "truncate", "mkstemp"}
    modules = {"os", "shutil", "path", "tempfile", "Path"}
    found = []
    for source in SOURCES:
        if source == PACKAGE / "files.py":
            continue
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            owner = node.func.value if isinstance(node.func, ast.Attribute) else None
            of_files = isinstance(owner, ast.Name) and owner.id == "files"
            on_text = name == "replace" and len(node.args) == 2  # of str, dataclasses and tensors
            if name in writers and not of_files and not on_text and name not in ("replace",):
                found.append(f"{source.relative_to(ROOT)}:{node.lineno}: {name}")
            mode = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            if name == "open" and any(isinstance(text, str) and set(text) & set("wax+") for text in mode[-1:]):
                found.append(f"{source.relative_to(ROOT)}:{node.lineno}: open for writing")
    allowed = {"lmoe_cli/engine/base_model.py"}  # links in a temporary folder, so that transformers sees only the base
    assert [place for place in found if place.partition(":")[0] not in allowed] == []
    assert modules


def raised_codes() -> dict[str, str]:
    """Every code that the package raises or finds, with a place."""
    found: dict[str, str] = {}
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name.endswith("Error") or name in ("finding", "say", "_broken", "__init__"):
                first = node.args[0]
                if (
                    isinstance(first, ast.Constant)
                    and isinstance(first.value, str)
                    and re.fullmatch(r"[a-z-]+", first.value)
                ):
                    found[first.value] = f"{source.relative_to(ROOT)}:{node.lineno}"
    return found


def test_every_code_that_is_raised_is_explained():
    unknown = {code: place for code, place in raised_codes().items() if "-" in code and code not in CODES}
    assert unknown == {}


def test_every_code_that_is_explained_is_raised_somewhere():
    text = "\n".join(source.read_text() for source in SOURCES if source.name != "codes.py")
    assert [code for code in CODES if f'"{code}"' not in text] == []


def test_the_page_on_findings_is_made_from_the_codes():
    sys.path.insert(0, str(ROOT / "docs"))
    from findings_page import page

    assert (ROOT / "docs" / "findings.md").read_text() == page(), "run: python docs/findings_page.py"


def test_the_committed_schema_is_that_of_the_recipes():
    from lmoe_cli.loadout.schema import recipe_schema

    assert json.loads((ROOT / "schemas" / "loadout-v1.json").read_text()) == recipe_schema()


def test_files_are_one_idea_each():
    long = {source: lines for source in SOURCES if (lines := len(source.read_text().splitlines())) > 320}
    assert long == {}
