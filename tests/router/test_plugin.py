"""A package that brings routers: its settings are read like ours, its classes run like ours, and what is wrong is said.

The package is the one of the docs, `docs/plugin`, installed into a folder of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import tiny
import torch
from click.testing import CliRunner
from laws.cases import assert_close
from router.made import NAMES, loadout_of, logits_by_hand

import lmoe_cli
from lmoe_cli.bake.model import bake_model
from lmoe_cli.check import check
from lmoe_cli.cli.root import lmoe
from lmoe_cli.engine.build import start
from lmoe_cli.errors import UsageError
from lmoe_cli.evaluate.variants import Stage, plan
from lmoe_cli.findings import RefusedError
from lmoe_cli.loadout import routers
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.parse import read_recipe
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.loadout.schema import recipe_schema
from lmoe_cli.loadout.write import recipe_text
from lmoe_cli.router import registry

EXAMPLE = Path(__file__).parents[2] / "docs" / "plugin"
SHORT, LONG = "Open the door.", "The door is locked and the key is lost and nobody knows where it may be."


def install(folder, points=None, name="plain-routers", code=EXAMPLE):
    """What pip leaves behind: the code, and beside it the distribution's entry points."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    points = points or project["entry-points"][routers.GROUP]
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    lines = [f"{point} = {value}" for point, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{routers.GROUP}]", *lines, ""]))
    for path in code.glob("*/*.py"):
        (folder / path.parent.name).mkdir(exist_ok=True)
        (folder / path.parent.name / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def use(monkeypatch):
    """Put a folder of packages where Python looks for some."""

    def on(folder):
        monkeypatch.syspath_prepend(str(folder))
        routers.plugins.cache_clear()

    yield on
    monkeypatch.undo()
    routers.plugins.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("plain_routers", "damaged", "halving")]:
        del sys.modules[name]


@pytest.fixture
def installed(tmp_path, use):
    use(install(tmp_path / "packages"))


def recipe(**router):
    experts = {name: {"adapter": f"demo:{name}"} for name in ("warrior", "mage", "healer")}
    return Recipe.model_validate({"base": "demo:adventurer", "experts": experts, "router": router})


LENGTH = {"type": "length", "short": "warrior", "long": "mage"}


def refused(tmp_path, router):
    path = tmp_path / "mix.yaml"
    path.write_text(f"base: demo:adventurer\nexperts:\n  mage: {{adapter: demo:mage}}\nrouter:\n{router}")
    with pytest.raises(RefusedError) as caught:
        read_recipe(path)
    assert caught.value.exit_code == 2
    return [(found.message.removeprefix(f"{path}:"), found.hint) for found in caught.value.findings]


# -- the recipe


def test_a_recipe_names_the_router_of_a_package_and_reads_as_it_was_written(installed, tmp_path):
    path = tmp_path / "mix.yaml"
    written = recipe(**LENGTH, words=3)
    path.write_text(recipe_text(written))
    read = read_recipe(path)
    assert type(read.router).__module__ == "plain_routers.settings"
    assert (read.router.words, read.router.scope) == (3, "prompt")
    assert read == written
    assert recipe(**LENGTH).router.words == 12


def test_without_the_package_its_type_is_unknown_and_the_known_ones_are_named(tmp_path):
    ((message, hint),) = refused(tmp_path, "  type: length\n")
    assert message.startswith("5:3: router cannot be 'length'")
    assert hint == "one of static, weighted, encoder, arrow, gate"


def test_a_type_spelled_wrong_is_told_what_was_meant(installed, tmp_path):
    ((message, hint),) = refused(tmp_path, "  type: lenght\n")
    assert message.startswith("5:3: router cannot be 'lenght'")
    assert hint == "did you mean 'length'?"


def test_what_is_wrong_with_its_own_keys_stands_with_line_and_column(installed, tmp_path):
    found = refused(tmp_path, "  type: length\n  shrot: mage\n  long: mage\n  words: 0\n")
    assert found == [
        ("4:1: router needs 'short'", "known keys: long, short, type, words"),
        ("6:3: router has no key 'shrot'", "did you mean 'short'?"),
        ("8:10: router.words: input should be greater than or equal to 1, got 0", ""),
    ]


def test_the_schema_knows_its_settings_where_it_is_installed(installed):
    schema = recipe_schema()
    jsonschema.Draft7Validator.check_schema(schema)
    data = recipe(**LENGTH).model_dump(mode="json")
    jsonschema.validate(data, schema)
    for wrong in ({"type": "length", "short": "a"}, {**LENGTH, "words": "many"}, {**LENGTH, "shrot": "x"}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**data, "router": wrong}, schema)
    jsonschema.validate({**data, "router": {"type": "elsewhere", "key": 1}}, schema)


def test_the_schema_takes_every_router_of_ours_and_no_wrong_key_of_them():
    schema, data = recipe_schema(), {"base": "demo:adventurer", "experts": {}}
    for router in ({"type": "arrow"}, {"type": "gate", "artefact": "x"}, {"type": "encoder", "top_k": 1}):
        jsonschema.validate({**data, "router": router}, schema)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**data, "router": {**router, "tau": 1}}, schema)


def test_a_type_of_ours_cannot_be_replaced(tmp_path, use):
    use(install(tmp_path / "packages", {"arrow": "plain_routers.settings:LoudnessRouter"}))
    assert recipe(type="arrow").router.implementation == "lmoe_cli.router.arrow:ArrowRouter"


# -- check


def test_check_says_what_the_router_finds(installed):
    assert check(resolve(recipe(**LENGTH), "mix.yaml")).ok
    report = check(resolve(recipe(**{**LENGTH, "long": "wizard"}), "mix.yaml"))
    (found,) = [item for item in report.findings if item.severity == "error"]
    assert (found.code, found.message) == ("expert-unknown", "the router names 'wizard'")
    assert found.hint == "experts: healer, mage, warrior"


def test_light_commands_stay_light_with_a_package_installed(tmp_path):
    packages = install(tmp_path / "packages")
    (tmp_path / "mix.yaml").write_text(
        "base: demo:adventurer\nexperts: {warrior: {adapter: demo:warrior}, mage: {adapter: demo:mage}}\n"
        "router: {type: length, short: warrior, long: mage}\n"
    )
    script = (
        f"import sys; sys.path.insert(0, {str(packages)!r})\nfrom lmoe_cli.cli.root import run\n"
        "code = run(sys.argv[1:])\n"
        "print('@', code, 'plain_routers.settings' in sys.modules, "
        "sorted({'torch', 'transformers', 'numpy', 'plain_routers.length'} & set(sys.modules)))\n"
    )
    for words in (("check", "mix.yaml", "--json"), ("inspect", "loadout", "mix.yaml"), ("schema",)):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout.splitlines()[-1] == "@ 0 True []", done.stderr


# -- an engine


def test_a_router_of_prompts_sends_each_to_its_expert(installed):
    engine = lmoe_cli.load(recipe(**LENGTH), device="cpu", dtype="float32")
    alone = {}
    for name in ("warrior", "mage"):
        other = lmoe_cli.load(recipe(type="weighted"), device="cpu", dtype="float32")
        other.set_weights({one: float(one == name) for one in other.weights})
        alone[name] = [other.generate(text, temperature=0, max_new_tokens=12) for text in (SHORT, LONG)]
    assert engine.generate(SHORT, temperature=0, max_new_tokens=12) == alone["warrior"][0] != alone["mage"][0]
    assert engine.generate(LONG, temperature=0, max_new_tokens=12) == alone["mage"][1] != alone["warrior"][1]


def test_a_router_of_tokens_computes_what_its_formula_says(installed):
    loadout = loadout_of({"type": "loudness", "most": 0.8})
    engine = start(loadout, device="cpu", dtype="float32")
    expected = logits_by_hand(
        loadout,
        tiny.tokens(),
        lambda module, x: 0.8 * torch.tanh(x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5).expand(*x.shape[:-1], 4),
    )
    assert_close(engine.logits(tiny.tokens()), expected)
    engine.set_weights(dict.fromkeys(NAMES, 0.0))
    assert torch.equal(engine.logits(tiny.tokens()), engine.detach()(tiny.tokens()).logits)


HALVING = {
    "halving/__init__.py": "",
    "halving/settings.py": """
from typing import Literal
from lmoe_cli.loadout.routers import RouterSettings

class Halving(RouterSettings):
    scope = "fixed"
    implementation = "halving.router:Halving"
    type: Literal["halving"]
""",
    "halving/router.py": """
from lmoe_cli.router.static import StaticRouter

class Halving(StaticRouter):
    def gates(self):
        return super().gates() / 2
""",
}


def test_gates_that_a_package_makes_of_the_weights_are_folded_and_not_baked_as_the_weights(tmp_path, use):
    for name, text in HALVING.items():
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text(text)
    use(install(tmp_path / "packages", {"halving": "halving.settings:Halving"}, "halving", tmp_path / "code"))
    own = loadout_of({"type": "halving"})
    engine = start(own, device="cpu", dtype="float32")
    halves = loadout_of({"type": "weighted"}, **{name: {"weight": 0.5} for name in NAMES})
    due = start(halves, device="cpu", dtype="float32").logits(tiny.tokens())
    stage, variants = Stage(engine, torch.float32), {one.name: one for one in plan(own, without=[NAMES[1]], seed=None)}
    less = {name: {"weight": 0.5 * (name != NAMES[1])} for name in NAMES}
    without = start(loadout_of({"type": "weighted"}, **less), device="cpu", dtype="float32").logits(tiny.tokens())
    for name, expected in (("recipe", due), (f"without {NAMES[1]}", without), ("recipe", due)):
        assert_close(stage.take(variants[name]).logits(tiny.tokens()), expected)
    assert_close(engine.logits(tiny.tokens()), due)
    engine.fold()
    assert_close(engine.logits(tiny.tokens()), due)
    with pytest.raises(UsageError) as caught:
        bake_model(own, tmp_path / "out")
    assert caught.value.code == "router-dynamic"


# -- packages that are broken


DAMAGED = {
    "damaged/__init__.py": "",
    "damaged/raises.py": "raise RuntimeError('no {luck} today')",
    "damaged/settings.py": """
from typing import Literal
from lmoe_cli.loadout.routers import RouterSettings

class NoScope(RouterSettings):
    implementation = "damaged.routers:Some"
    type: Literal["noscope"]

class NoPlace(RouterSettings):
    scope = "token"
    type: Literal["noplace"]

class Gone(RouterSettings):
    scope = "token"
    implementation = "damaged.gone:Some"
    type: Literal["gone"] = "gone"

class Other(RouterSettings):
    scope = "prompt"
    implementation = "lmoe_cli.router.arrow:ArrowRouter"
    type: Literal["other"]

class Nothing:
    pass
""",
}
POINTS = {"raises": "damaged.raises:X", "absent": "damaged.settings:Absent", "nothing": "damaged.settings:Nothing"}
POINTS |= {"noscope": "damaged.settings:NoScope", "noplace": "damaged.settings:NoPlace"}
POINTS |= {"gone": "damaged.settings:Gone", "other": "damaged.settings:Other"}


@pytest.fixture
def damaged(tmp_path, use):
    for name, text in DAMAGED.items():
        (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "code" / name).write_text(text)
    use(install(tmp_path / "packages", POINTS, "damaged-routers", tmp_path / "code"))


@pytest.mark.parametrize(
    ("type_", "reason"),
    [
        ("raises", "damaged.raises:X cannot be imported: RuntimeError: no {luck} today"),
        ("absent", "damaged.settings:Absent cannot be imported: AttributeError"),
        ("nothing", "damaged.settings:Nothing is no subclass of RouterSettings"),
        ("noscope", "damaged.settings:NoScope has no 'scope' out of fixed, prompt, token"),
        ("noplace", "damaged.settings:NoPlace has no 'implementation' such as 'package.module:Class'"),
    ],
)
def test_settings_that_are_none_are_told_with_the_package_that_brings_them(damaged, tmp_path, type_, reason):
    ((message, hint),) = refused(tmp_path, f"  type: {type_}\n")
    assert message.startswith(f"5:3: router: the router '{type_}' of the package damaged-routers is broken: {reason}")
    assert hint == "update the package damaged-routers, or use another router"
    recipe_schema()


@pytest.mark.parametrize(
    ("type_", "reason"),
    [
        ("gone", "damaged.gone:Some cannot be imported: ModuleNotFoundError"),
        ("other", "lmoe_cli.router.arrow:ArrowRouter is for routers of scope 'prompt' and no PromptRouter"),
    ],
)
def test_a_class_that_is_none_is_told_when_it_is_loaded(damaged, type_, reason):
    with pytest.raises(UsageError) as caught:
        registry.load(recipe(type=type_).router)
    assert caught.value.code == "router-broken"
    assert reason in caught.value.message


def test_a_type_with_a_default_is_written_all_the_same(damaged, tmp_path):
    (tmp_path / "mix.yaml").write_text(recipe_text(recipe(type="gone")))
    assert read_recipe(tmp_path / "mix.yaml") == recipe(type="gone")


def test_a_broken_package_spoils_no_other_recipe(damaged, tmp_path):
    (tmp_path / "mix.yaml").write_text(recipe_text(recipe(type="arrow")))
    done = CliRunner().invoke(lmoe, ["check", str(tmp_path / "mix.yaml"), "--json"])
    assert json.loads(done.stdout)["ok"], done.output
