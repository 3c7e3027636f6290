"""The commands as a script would call them: exit codes, JSON, and what stands where afterwards."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import pytest
import tiny
import torch
from commands import lmoe
from laws.cases import case

from lmoe_cli.cli import params
from lmoe_cli.cli.bake import METHODS
from lmoe_cli.cli.root import run
from lmoe_cli.loadout.recipe import Dtype, Method

ENVELOPE = {"schema", "ok", "data", "findings"}


def document(done, command, code=0):
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == ENVELOPE
    assert found["schema"] == f"lmoe.{command}/1"
    assert found["ok"] is (code == 0)
    return found


def all_of(terminal):
    """What is written to a terminal until its other side is closed."""
    seen = b""
    with contextlib.suppress(OSError):  # which is how that is told
        while piece := os.read(terminal, 4096):
            seen += piece
    return seen


@pytest.fixture
def place(tmp_path):
    """A folder with a base, two adapters and a recipe that names them."""
    own = case("qwen3", "lora")
    for name, folder in (("base", own.base), ("one", own.one), ("two", own.two)):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / "mix.yaml").write_text(
        "base: ./base\nexperts:\n  one: {adapter: ./one, weight: 0.5}\n  two: {adapter: ./two, weight: -0.25}\n"
    )
    return tmp_path


def test_a_recipe_goes_from_check_to_baked_files(place):
    found = document(lmoe("check", "mix.yaml", "--json", cwd=place), "check")
    assert found["data"]["recipes"][0]["ok"]
    found = document(lmoe("bake", "mix.yaml", "--out", "out", "--verify", "--json", cwd=place), "bake")
    assert found["data"]["report"]["verify"]["ok"]
    blended = case("qwen3", "lora").engine({"one": 0.5, "two": -0.25}).logits(tiny.tokens())
    with torch.no_grad():
        torch.testing.assert_close(tiny.load(place / "out")(tiny.tokens()).logits, blended, rtol=1e-4, atol=1e-4)
    again = lmoe("bake", "mix.yaml", "--out", "out", cwd=place)
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert lmoe("bake", "mix.yaml", "--out", "out", "--force", cwd=place).returncode == 0


def test_a_recipe_finds_its_folders_wherever_it_is_called_from(place, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert lmoe("check", place / "mix.yaml", cwd=elsewhere).returncode == 0


def test_a_blend_can_be_said_on_the_command_line(place):
    words = ("--base", "base", "--expert", "one=./one:0.5", "--expert", "two=./two:-0.25")
    assert lmoe("check", *words, cwd=place).returncode == 0
    done = lmoe("bake", *words, "--out", "out", "--as", "adapter", "--rank", "2", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "relative error" in done.stdout
    assert "%" in done.stdout
    assert (place / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "code", "reason"),
    [
        (("bake", "mix.yaml"), 2, "Missing option"),
        (("bake", "absent.yaml", "--out", "out"), 3, "no such recipe"),
        (("bake", "mix.yaml", "--base", "base", "--out", "out"), 2, "exclude each other"),
        (("bake", "--base", "base", "--expert", "one", "--out", "out"), 2, "not NAME=REF"),
        (("bake", "--base", "base", "--expert", "1x=./one", "--out", "out"), 2, "string should match"),
        (("bake", "--expert", "one=./one", "--out", "out"), 2, "needs a --base"),
        (("bake", "mix.yaml", "--rank", "3", "--out", "out"), 2, "--as adapter"),
        (("bake", "mix.yaml", "--shard-size", "tiny", "--out", "out"), 2, "not a size"),
        (("bake", "mix.yaml", "--method", "ties", "--verify", "--out", "out"), 2, "no live blend"),
        (("bake", "mix.yaml", "--base-weights", "dequantized", "--out", "out"), 2, "not stored quantised"),
        (
            ("bake", "mix.yaml", "--base-weights", "original", "--original", "base", "--out", "out"),
            2,
            "nothing to choose",
        ),
        (("bake", "mix.yaml", "--base-weights", "halved", "--out", "out"), 2, "'original', 'dequantized'"),
        (("bake", "mix.yaml", "--original", "base", "--out", "out"), 2, "goes with --base-weights original"),
        (("bake", "mix.yaml", "--as", "adapter", "--base-weights", "dequantized", "--out", "out"), 2, "--as model"),
        (("bake", "mix.yaml", "--out", "mix.yaml"), 2, "exists"),
        (("bake", "mix.yaml", "--out", "mix.yaml/out"), 2, "cannot write"),
        (("check",), 2, "no recipe"),
        (("check", "base"), 2, "is a folder"),
        (("check", "x" * 300 + ".yaml"), 2, "cannot read"),
        (("check", "mix.yaml", "--accept-base", "other"), 2, "goes with --base and --expert"),
        (("check", "--base", "one", "--expert", "x=./base"), 3, "no model here"),
        (("check", "--base", "nobody/nothing", "--expert", "x=./one"), 5, "offline"),
        (("bench", "mix.yaml", "--synthetic", "qwen3-0.6b"), 2, "excludes"),
        (("bench", "--base", "base", "--top", "1"), 2, "need experts"),
        (("bench", "--synthetic", "qwen3-0.6b", "--layers", "99"), 2, "28 layers"),
        (("bench", "--synthetic", "qwen3-0.6b", "--device", "moon"), 2, "no device"),
        (("inspect", "base", "one"), 3, "no model here"),
        (("inspect", "adapter", "base"), 3, "no adapter here"),
        (("inspect", "adapter", "mix.yaml"), 2, "a file, not a folder"),
        (("inspect", "adapter", "demo:rogue"), 3, "no such demo"),
        (("inspect", "adapter", "../../etc/x"), 3, "no such folder"),
        (("inspect", "adapter", "org/name@../../x"), 2, "cannot be a revision"),
    ],
)
def test_mistakes_end_with_one_line_a_hint_and_the_right_code(place, words, code, reason):
    done = lmoe(*words, cwd=place)
    assert done.returncode == code, done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "" or words[0] == "check"  # whose verdict is its result
    assert not (place / "out").exists()
    told = document(lmoe(*words, "--json", cwd=place), words[0], code)
    assert told["findings"]
    assert all(item["severity"] in ("error", "warning", "note") for item in told["findings"])


def test_parts_that_do_not_fit_stop_every_command_alike(place):
    config = place / "one" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"init_lora_weights": "pissa"}))
    for words in (("check", "mix.yaml"), ("bake", "mix.yaml", "--out", "out"), ("bench", "mix.yaml")):
        done = lmoe(*words, cwd=place)
        assert done.returncode == 1, words
        assert "error[init-changes-base]" in done.stderr
    assert not (place / "out").exists()


def test_a_weight_that_is_not_finite_names_its_tensor(place):
    from safetensors.torch import load_file, save_file

    path = place / "one" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path)
    for words in (("bake", "mix.yaml", "--out", "out"), ("bench", "mix.yaml")):
        done = lmoe(*words, cwd=place)
        assert done.returncode == 2
        assert name in done.stderr
    assert not (place / "out").exists()


def test_the_bar_is_gone_before_a_comparison_is_told(place, monkeypatch):
    ours, theirs = pty.openpty()
    monkeypatch.chdir(place)
    for name, value in {"TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(all_of, ours)
        with open(theirs, "w") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", terminal)
            patch.setattr(sys, "stderr", terminal)
            code = run(["bake", "mix.yaml", "--out", "out", "--verify"])
        seen = reading.result(60)
    assert code == 0, seen
    before, after = seen.split(b"comparing with the live blend", 1)
    assert before.endswith(b"\x1b[2K")  # the line was cleared
    assert b"baking" in before
    assert b"baking" not in after


def test_annotations_point_at_the_line(place):
    (place / "bad.yaml").write_text("base: ./base\nexperts:\n  one: {adapter: ./one, wieght: 1}\n")
    done = lmoe("check", "bad.yaml", "mix.yaml", "--github", cwd=place)
    assert done.returncode == 2
    assert "::error file=bad.yaml,line=3,col=25,title=recipe-invalid::" in done.stdout
    assert "has no key 'wieght'%0Adid you mean 'weight'?" in done.stdout


def test_findings_say_which_recipe_they_are_of(place):
    text = "base: ./base\nexperts:\n  one: {adapter: ./nowhere}\n"
    for name in ("first.yaml", "second.yaml"):
        (place / name).write_text(text)
    done = lmoe("check", "mix.yaml", "first.yaml", "second.yaml", cwd=place)
    told = done.stderr.splitlines()
    assert told.index("first.yaml:") < told.index("second.yaml:")
    assert "error[" in told[told.index("first.yaml:") + 1]
    done = lmoe("check", "mix.yaml", "first.yaml", "--json", cwd=place)
    good, bad = document(done, "check", 3)["data"]["recipes"]
    assert not [item for item in good["findings"] if item["severity"] == "error"]
    assert [item["where"] for item in bad["findings"] if item["severity"] == "error"] == ["one"]


def test_a_recipe_that_is_not_there_does_not_keep_others_from_being_checked(place):
    done = lmoe("check", "none.yaml", "mix.yaml", "--json", cwd=place)
    gone, good = document(done, "check", 3)["data"]["recipes"]
    assert [item["code"] for item in gone["findings"]] == ["not-found"]
    assert (gone["ok"], good["ok"]) == (False, True)


def test_init_takes_what_an_adapter_claims_for_a_name_on_the_hub(place):
    """Whatever folders are here."""
    for claim, base in (("gpt2", "hf://gpt2"), ("some/base", "hf://some/base"), ("other/base", "other/base")):
        config = json.loads((place / "one" / "adapter_config.json").read_text())
        (place / "one" / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": claim}))
        (place / "some" / "base").mkdir(parents=True, exist_ok=True)
        assert lmoe("init", "a b.yaml", "--force", "--from", "./one", cwd=place).returncode == 0
        assert f"base: {base}\n" in (place / "a b.yaml").read_text()
    done = lmoe("init", "a b.yaml", "--force", "--from", "./one", cwd=place)
    assert "lmoe check 'a b.yaml'" in done.stderr
    assert lmoe("init", "c.yaml", "--from", "./one", "--base", "~nobody-here/x", cwd=place).returncode == 2


def test_init_writes_a_recipe_that_checks(place):
    done = lmoe("init", "new.yaml", "--from", "./one", "--from", "./two", "--base", "./base", cwd=place)
    assert done.returncode == 0, done.stderr
    assert lmoe("check", "new.yaml", cwd=place).returncode == 0
    assert "adapter: ./one" in (place / "new.yaml").read_text()
    assert lmoe("init", "new.yaml", "--from", "./one", cwd=place).returncode == 2


def test_a_bench_tells_rows_beside_the_base(place):
    done = lmoe("bench", "mix.yaml", "--rounds", "2", "--steps", "1", "--peft", "--json", cwd=place)
    rows = document(done, "bench")["data"]["rows"]
    assert [(row["variant"], row["experts"]) for row in rows] == [
        ("base", 0), ("bare", 0), ("blend", 1), ("blend", 2), ("folded", 2), ("peft", 2),
    ]  # fmt: skip
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(1000 / row["ms_per_token"], rel=0.01)
        assert 0 < row["byte_limit"] <= 1
    assert rows[0]["ratio_to_base"] == 1.0


def test_a_reader_that_goes_away_is_no_error(place):
    code = f"{sys.executable} -m lmoe_cli inspect adapter ./one --json | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, cwd=place)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert "Error" not in done.stderr


def test_dtypes_on_the_command_line_are_those_of_a_recipe():
    assert get_args(Dtype) == params.DTYPES
    assert get_args(Method) == METHODS
