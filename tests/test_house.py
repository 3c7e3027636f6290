"""How the house is kept: light commands are light, one module writes, every code is explained."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

from lmoe_cli.codes import CODES, Code, parts, uses

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lmoe_cli"
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "peft", "numpy", "safetensors")
LIGHT = (
    "--version",
    "ls",
    "schema",
    "schema train",
    "inspect adapter demo:mage",
    "inspect base demo:adventurer",
    "inspect loadout recipes/battlemage.yaml",
    "check recipes/battlemage.yaml",
    "check recipes/party.yaml",
    "completion bash",
)
PROBE = """
import runpy, sys
for command in {commands!r}:
    sys.argv = ["lmoe", *command.split()]
    try:
        runpy.run_module("lmoe_cli", run_name="__main__")
    except SystemExit as leave:
        code = leave.code
    loaded = {{name.partition(".")[0] for name in sys.modules}}
    print("\\n@", command, "->", code, *sorted(loaded & set({names!r})))
"""


def loaded_by(*commands: str, names: tuple[str, ...] = HEAVY) -> dict[str, tuple[int, set[str]]]:
    """Of commands that run one after the other in a fresh interpreter: exit code, and which of some packages it, or one
    before it, loaded."""
    code = PROBE.format(commands=commands, names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    told = re.findall(r"^@ (.+) -> (\S+) ?(.*)$", done.stdout, re.MULTILINE)
    assert [command for command, *_ in told] == list(commands), done.stderr
    return {command: (int(exit_code), set(loaded.split())) for command, exit_code, loaded in told}


def test_light_commands_load_no_heavy_package():
    assert loaded_by(*LIGHT) == dict.fromkeys(LIGHT, (0, set()))


def test_help_of_every_command_loads_click_and_nothing_else():
    from lmoe_cli.cli.root import COMMANDS

    names = (*HEAVY, "rich", "pydantic", "yaml", "huggingface_hub", "prompt_toolkit")
    commands = [f"{name} --help" for name in COMMANDS]
    assert loaded_by(*commands, names=names) == dict.fromkeys(commands, (0, set()))


def test_an_answer_is_given_without_loading_peft():
    command = "chat --prompt Hi. --max-new-tokens 1"
    code, loaded = loaded_by(command)[command]
    assert (code, "peft" in loaded, "torch" in loaded) == (0, False, True)


def test_a_wrong_recipe_is_refused_before_anything_heavy_is_loaded(tmp_path):
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("base: demo:adventurer\nexperts: {mage: {adaptr: demo:mage}}\n")
    commands = (
        f"chat --loadout {recipe}",
        f"bake --out {tmp_path / 'out'} {recipe}",
        f"bench {recipe}",
        f"eval --data talk.jsonl {recipe}",
        f"fit --data talk.jsonl --out {tmp_path / 'new.yaml'} {recipe}",
        f"similarity --loadout {recipe}",
        f"route {recipe} Hello",
    )
    assert loaded_by(*commands) == dict.fromkeys(commands, (2, set()))


def test_every_command_is_listed_with_the_summary_its_own_help_begins_with():
    from click.testing import CliRunner

    from lmoe_cli.cli.inspect import KINDS
    from lmoe_cli.cli.root import COMMANDS, lmoe
    from lmoe_cli.cli.router import VERBS

    listed = {(name,): entry for name, entry in COMMANDS.items()}
    listed |= {("inspect", name): entry for name, entry in KINDS.items()}
    listed |= {("router", name): entry for name, entry in VERBS.items()}
    for words, entry in listed.items():
        result = CliRunner().invoke(lmoe, [*words, "--help"])
        assert result.exit_code == 0, result.output
        assert entry.summary in re.sub(r"\s+", " ", result.output), words


WRITERS = {
    "write_text",
    "write_bytes",
    "mkdir",
    "rename",
    "unlink",
    "rmdir",
    "touch",
    "makedirs",
    "removedirs",
    "rmtree",
}
WRITERS |= {"copyfile", "copy2", "copytree", "symlink_to", "hardlink_to", "mkstemp", "save_file", "chmod"}
WRITERS |= {"save_pretrained"}
OWNED_WRITERS = {("shutil", "copy"), ("shutil", "move"), ("os", "remove"), ("torch", "save")}


def writes(node: ast.Call) -> bool:
    """Whether a call makes, changes or removes a file."""
    if isinstance(node.func, ast.Name):
        owner, name = "", node.func.id
    elif isinstance(node.func, ast.Attribute):
        owner = node.func.value.id if isinstance(node.func.value, ast.Name) else ""
        name = node.func.attr
    else:
        return False
    if owner == "files":
        return False
    given = [*node.args[-1:], *(word.value for word in node.keywords if word.arg == "mode")]
    modes = [argument.value for argument in given if isinstance(argument, ast.Constant)]
    opens = name == "open" and any(isinstance(mode, str) and set(mode) & set("wax+") for mode in modes)
    replaces = (
        name == "replace" and bool(owner) and len(node.args) == 1 and not node.keywords
    )  # not str's, dataclasses'
    opens = opens or ((owner, name) == ("os", "open") and "O_CREAT" in ast.unparse(node))
    return name in WRITERS or (owner, name) in OWNED_WRITERS or opens or replaces


def test_only_one_module_writes():
    """But for links in a temporary folder, through which transformers sees the base's own files and no others."""
    allowed = {PACKAGE / "files.py", PACKAGE / "engine" / "base_model.py"}
    found = [
        f"{source.relative_to(ROOT)}:{node.lineno}"
        for source in SOURCES
        if source not in allowed
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Call) and writes(node)
    ]
    assert found == []


def test_what_the_last_test_looks_for_is_found():
    assert all(writes(ast.parse(text, mode="eval").body) for text in (
        "path.write_text(x)", "os.replace(a)", "open(p, 'wb')", "p.open('a')", "shutil.rmtree(p)", "save_file(t, p)",
        "open(p, mode='wb')", "p.open(mode='w')", "shutil.copy(a, b)", "shutil.move(a, b)", "os.remove(p)",
        "os.open(p, os.O_CREAT)", "model.save_pretrained(p)", "torch.save(x, p)",
    ))  # fmt: skip
    assert not any(writes(ast.parse(text, mode="eval").body) for text in (
        "text.replace('a', 'b')", "replace(self, a=1)", "open(p, 'rb')", "files.remove(p)", "weights.copy()",
        "found.remove(x)", "open(p, mode='rb')",
    ))  # fmt: skip


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
    unknown = {code: place for code, place in raised_codes().items() if code not in CODES}
    assert unknown == {}


def test_no_code_is_explained_twice():
    groups = [own for part in (parts, uses) for own in vars(part).values() if isinstance(own, dict)]
    keys = [code for own in groups for code in own if isinstance(own[code], Code)]
    assert len(keys) == len(set(keys)) == len(CODES)


def test_every_code_that_is_explained_is_raised_somewhere():
    text = "\n".join(source.read_text() for source in SOURCES if source.parent.name != "codes")
    assert [code for code in CODES if f'"{code}"' not in text] == []


def test_the_page_on_findings_is_made_from_the_codes():
    sys.path.insert(0, str(ROOT / "docs"))
    from findings_page import page

    assert (ROOT / "docs" / "findings.md").read_text() == page(), "run: python docs/findings_page.py"


def test_the_page_on_keys_is_made_from_the_schemas():
    sys.path.insert(0, str(ROOT / "docs"))
    from keys_page import page

    text = (ROOT / "docs" / "keys.md").read_text()
    assert text == page(), "run: python docs/keys_page.py"
    for file in ("loadout", "train"):
        definitions = json.loads((ROOT / "schemas" / f"{file}-v1.json").read_text())["definitions"]
        keys = {key for one in definitions.values() for key in one["properties"]}
        assert [key for key in keys if f"| `{key}` |" not in text] == []


def test_every_file_that_a_page_includes_is_there():
    """A directive that a formatter has changed is shown as it is, and one without its file as nothing."""
    docs, found, wrong = ROOT / "docs", [], []
    for page in sorted(docs.rglob("*.md")):
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if not re.match(r"\s*;?-+\s*8\s*<", line):
                continue
            told = re.fullmatch(r'\s*--8<-- "(.+)"', line)
            is_there = bool(told) and any((folder / told[1]).is_file() for folder in (docs, ROOT))
            (found if is_there else wrong).append(f"{page.relative_to(ROOT)}:{number}: {line}")
    assert wrong == []
    assert len(found) >= 6


def test_every_recipe_that_comes_along_is_told():
    page = (ROOT / "docs" / "recipes.md").read_text()
    assert [
        path.name for path in sorted((ROOT / "recipes").glob("*.yaml")) if f"`recipes/{path.name}`" not in page
    ] == []


def test_the_committed_schema_is_that_of_the_recipes():
    from lmoe_cli.loadout.schema import recipe_schema

    assert json.loads((ROOT / "schemas" / "loadout-v1.json").read_text()) == recipe_schema()


def test_the_committed_schema_is_that_of_training_configs():
    from lmoe_cli.train.config import train_schema

    assert json.loads((ROOT / "schemas" / "train-v1.json").read_text()) == train_schema()


def test_files_are_one_idea_each():
    long = {source: lines for source in SOURCES if (lines := len(source.read_text().splitlines())) > 320}
    assert long == {}


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
