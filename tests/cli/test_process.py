"""The command line among other processes: streams that are closed, full or no longer read, and signals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from laws.cases import case

from lmoe_cli.cli import root

LMOE = f"{sys.executable} -m lmoe_cli"
FULL = "/dev/full"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, an adapter and recipes that fit and that do not."""
    folder = tmp_path_factory.mktemp("process")
    own = case("qwen3", "lora")
    shutil.copytree(own.base, folder / "base")
    shutil.copytree(own.one, folder / "one")
    (folder / "mix.yaml").write_text("base: ./base\nexperts:\n  one: {adapter: ./one, weight: 0.5}\n")
    (folder / "bad.yaml").write_text("base: ./base\nexperts:\n  one: {adapter: ./one, weihgt: 0.5}\n")
    return folder


def shell(line, cwd):
    """Run a line of bash. Its exit code is that of the first command of a pipe."""
    return subprocess.run(
        ["bash", "-c", line.replace("lmoe", LMOE, 1) + "; exit ${PIPESTATUS[0]}"],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("lmoe ls", 0),
        ("lmoe --help", 0),
        ("lmoe schema", 0),
        ("lmoe check mix.yaml", 0),
        ("lmoe check mix.yaml --json", 0),
        ("lmoe check bad.yaml", 2),
        ("lmoe check absent.yaml --json", 3),
        ("lmoe check absent.yaml 2>&1", 3),
    ],
)
def test_a_reader_that_goes_away_does_not_change_the_verdict(place, command, code):
    done = shell(f"{command} | true", place)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


@pytest.mark.skipif(not os.path.exists(FULL), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("command", "code"),
    [("ls --json", 6), ("schema", 6), ("--help", 6), ("check mix.yaml", 6), ("check absent.yaml --json", 3)],
)
def test_a_result_that_found_no_room_is_a_failure_and_is_told(place, command, code):
    done = shell(f"lmoe {command} > {FULL}", place)
    assert done.returncode == code
    assert "error[disk-full]: stdout: the disk is full\n  hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert shell(f"lmoe check absent.yaml 2> {FULL}", place).returncode == 3


@pytest.mark.parametrize(
    ("line", "code", "told"),
    [
        ("lmoe schema >&-", 2, "error[bad-path]: cannot write stdout"),
        ("lmoe ls >&-", 2, "error[bad-path]: cannot write stdout"),
        ("lmoe chat <&-", 2, "error[prompt-empty]"),
        ("lmoe chat 0>written", 2, "error[bad-path]: cannot read stdin"),
        ("lmoe check mix.yaml 2>&- >/dev/null", 0, ""),
        ("lmoe bake absent.yaml --out out 2>&-", 3, ""),
        ("lmoe init new.yaml --from ./one --base ./base --force >&-", 0, "new.yaml"),
    ],
)
def test_closed_streams_are_told_where_they_matter(place, line, code, told):
    done = shell(line, place)
    assert done.returncode == code, done.stderr
    assert told in done.stderr
    assert done.stdout == ""


def test_what_is_opened_after_closed_streams_is_not_taken_for_them(place):
    assert shell("lmoe init other.yaml --from ./one --base ./base <&- >&- 2>&-", place).returncode == 0
    assert (place / "other.yaml").read_text().startswith("# yaml-language-server")
    assert shell("lmoe check other.yaml", place).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_half_written(place, tmp_path, number):
    words = [sys.executable, "-m", "lmoe_cli", "bake", place / "mix.yaml", "--out", tmp_path / "out", "--verify"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not any(tmp_path.iterdir()):
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(number)
    told = process.communicate()[1]
    assert process.returncode == 128 + number, told
    assert "error[interrupted]" in told
    assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_a_signal_that_is_ignored_stays_ignored():
    probe = (
        "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from lmoe_cli.cli.process import terminable\n"
        "with terminable(): sys.exit(signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)"
    )
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0


def test_an_interrupt_while_modules_are_loaded_shows_no_traceback(tmp_path):
    (tmp_path / "click.py").write_text("raise KeyboardInterrupt\n")
    code = "from lmoe_cli.cli.main import main; main()"
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "")


def test_an_interrupt_that_breaks_a_lock_on_its_way_out_is_still_one(monkeypatch, capsys):
    def interrupted(*_, **__):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(root.lmoe, "main", interrupted)
    assert root.run(["ls"]) == 130
    assert "error[interrupted]" in capsys.readouterr().err
