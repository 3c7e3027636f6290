"""`lmoe chat` as a script, a pipe and a person at a terminal would call it."""

from __future__ import annotations

import functools
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
import transformers
from click.testing import CliRunner
from commands import lmoe
from torch._dynamo.testing import CompileCounterWithBackend

from lmoe_cli.cli.chat import EMBEDDED
from lmoe_cli.cli.root import lmoe as command
from lmoe_cli.cli.root import run
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.parse import read_recipe
from lmoe_cli.source import DEMO

ROOT = Path(__file__).parents[2]
SHORT = ("--max-new-tokens", "8", "--temperature", "0")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a base that can talk, one without a chat template, one without words, adapters and a recipe."""
    folder = tmp_path_factory.mktemp("chat")
    model = tiny.model("llama", max_position_embeddings=256)
    model.model.embed_tokens.weight.data[: len(tiny_tokenizer.SPECIAL)] = 0
    model.lm_head.weight.data[: len(tiny_tokenizer.SPECIAL)] = 0
    model.save_pretrained(folder / "mute")
    shutil.copytree(folder / "mute", folder / "plain")
    shutil.copytree(folder / "mute", folder / "base")
    tiny_tokenizer.save_tokenizer(folder / "plain", template=False)
    tiny_tokenizer.save_tokenizer(folder / "base")
    tiny.save_adapter(folder / "base", "lora", folder / "mage")
    tiny.save_adapter(folder / "base", "dora", folder / "healer", seed=2)
    tiny.save_base("llama", folder / "narrow", hidden_size=16)
    tiny.save_adapter(folder / "narrow", "lora", folder / "other")
    (folder / "bad.yaml").write_text("base: ./base\nexperts:\n  mage: {adapter: ./mage, wieght: 1}\n")
    (folder / "mix.yaml").write_text(
        "base: ./base\nexperts:\n  mage: {adapter: ./mage, weight: 0.5}\n  healer: {adapter: ./healer, weight: -0.25}\n"
        "chat: {temperature: 0, max_new_tokens: 8}\n"
    )
    return folder


def answer(*words, text=None):
    """What a chat says in this process."""
    result = CliRunner().invoke(command, ["chat", *map(str, words)], input=text)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_a_prompt_is_answered_on_stdout_and_nothing_else_is(place, monkeypatch, capfd):
    monkeypatch.chdir(place)
    assert run(["chat", "--loadout", "mix.yaml", "--prompt", "Who are you?", "-v"]) == 0
    told = capfd.readouterr()
    import lmoe_cli

    assert told.out == lmoe_cli.load(place / "mix.yaml", device="cpu").generate("Who are you?") + "\n"
    assert "tok/s" in told.err
    assert "mage 0.50" in told.err


def test_json_tells_text_weights_and_timings(place):
    done = lmoe("chat", "--loadout", "mix.yaml", "--json", cwd=place, text="Who are you?\n")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["schema"], found["ok"]) == ("lmoe.chat/1", True)
    assert set(found["data"]) == {"text", "weights", "tokens", "finish", "timings", "without"}
    assert found["data"]["without"] is None
    assert found["data"]["weights"] == {"mage": 0.5, "healer": -0.25}
    assert (found["data"]["tokens"], found["data"]["finish"]) == (8, "length")
    assert found["data"]["timings"]["prompt_tokens"] == len("Who are you?") + 3
    assert found["data"]["timings"]["tokens_per_s"] > 0
    assert {item["code"] for item in found["findings"]} == {"base-unconfirmed"} or found["findings"] == []


def test_a_blend_and_a_bare_base_can_be_said_on_the_command_line(place):
    words = ("--expert", f"mage={place / 'mage'}:0.5", "--expert", f"healer={place / 'healer'}:-0.25")
    spoken = answer("--base", place / "base", *words, "--prompt", "Hi", *SHORT)
    assert spoken.stdout == answer("--loadout", place / "mix.yaml", "--prompt", "Hi").stdout
    bare = answer("--base", place / "base", "--prompt", "Hi", *SHORT)
    assert bare.exit_code == 0
    assert bare.stdout not in ("", spoken.stdout)


def test_a_base_without_a_template_is_continued_and_that_is_said(place):
    words = ("--base", place / "plain", *SHORT)
    done = answer(*words, "--prompt", "Once upon")
    assert "continues the text" in done.stderr
    assert len(done.stdout) == 9
    assert answer(*words, "-q", text="Once upon\n").output == done.stdout


def test_settings_of_the_command_line_come_before_those_of_the_recipe(place):
    words = ("--loadout", place / "mix.yaml", "--prompt", "Hi", "--temperature", "5", "--json")
    first, second = (json.loads(answer(*words, "--seed", "7").stdout)["data"]["text"] for _ in range(2))
    assert first == second
    assert first != json.loads(answer(*words, "--seed", "8").stdout)["data"]["text"]
    stopped = json.loads(answer(*words, "--seed", "7", "--stop", first[3]).stdout)["data"]
    assert stopped["text"] == first[: first.index(first[3])]
    assert stopped["finish"] == "stop"
    system = json.loads(answer(*words, "--seed", "7", "--system", "Be brave.").stdout)["data"]
    assert system["timings"]["prompt_tokens"] > stopped["timings"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("words", "text", "code", "reason"),
    [
        (("--loadout", "absent.yaml", "--prompt", "x"), None, 3, "no such recipe"),
        (("--loadout", "bad.yaml", "--prompt", "x"), None, 2, "bad.yaml:3:27: experts.mage has no key 'wieght'"),
        (("--loadout", "mix.yaml", "--base", "base", "--prompt", "x"), None, 2, "exclude each other"),
        (("--expert", "mage=./mage", "--prompt", "x"), None, 2, "--expert needs a --base"),
        (("--base", "absent/folder/x", "--prompt", "x"), None, 3, "no such folder"),
        (("--base", "base", "--expert", "mage=./absent", "--prompt", "x"), None, 3, "no such folder"),
        (("--base", "mute", "--prompt", "x"), None, 2, "no tokenizer"),
        (("--base", "base", "--expert", "mage=./other", "--prompt", "x"), None, 1, "do not fit"),
        (("--loadout", "mix.yaml"), "", 2, "there is no text to answer"),
        (("--loadout", "mix.yaml", "--prompt", " "), None, 2, "there is no text to answer"),
        (("--loadout", "mix.yaml"), b"\xff\xfe", 2, "byte 0 of stdin is not UTF-8"),
        (("--loadout", "mix.yaml", "--prompt", "x", "--temperature", "-1"), None, 2, "greater than or equal to 0"),
        (("--loadout", "mix.yaml", "--prompt", "x", "--dtype", "int3"), None, 2, "--dtype"),
    ],
)
def test_a_mistake_is_one_clear_error_and_nothing_heavy_is_loaded_for_it(place, words, text, code, reason):
    probe = (
        "import runpy, sys\n"
        f"sys.argv = ['lmoe', 'chat', *{list(map(str, words))!r}]\n"
        "try:\n    runpy.run_module('lmoe_cli', run_name='__main__')\n"
        "finally:\n    print('@', sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))\n"
    )
    data = text.encode() if isinstance(text, str) else text
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=place, input=data, stdin=subprocess.DEVNULL if data is None else None,
        capture_output=True, env={**os.environ, "NO_COLOR": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    told = done.stderr.decode()
    assert done.returncode == code, told
    assert reason in told
    assert "Traceback" not in told
    assert done.stdout.decode() == "@ []\n"


def test_errors_come_as_json_too(place):
    done = lmoe("chat", "--loadout", "absent.yaml", "--prompt", "x", "--json", cwd=place)
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"], found["data"]) == (3, False, None)
    assert found["findings"][0]["code"] == "not-found"


def test_json_in_a_conversation_is_refused(place):
    chat = Terminal(place, "--loadout", "mix.yaml", "--json")
    assert chat.leaves() == 2
    assert "--json answers once" in chat.seen


def test_a_prompt_longer_than_the_context_is_refused(place):
    with pytest.raises(Exception, match="do not fit the model's context of 256"):
        answer("--loadout", place / "mix.yaml", text="a" * 300)


def test_the_embedded_recipe_is_the_one_among_the_recipes():
    assert EMBEDDED.read_text() == (ROOT / "recipes" / "battlemage.yaml").read_text()
    recipe = read_recipe(EMBEDDED)
    assert recipe.base == "demo:adventurer"
    assert {name: entry.weight for name, entry in recipe.experts.items()} == {
        "warrior": 0.6,
        "mage": 0.3,
        "healer": 0.1,
    }


@pytest.mark.skipif(not (DEMO / "adventurer").is_dir(), reason="the demo is not trained here: make demo-model")
def test_with_no_loadout_named_the_embedded_one_answers():
    found = json.loads(answer("--prompt", "A goblin blocks the bridge.", "--seed", "1", "--json").stdout)["data"]
    assert found["weights"] == {"warrior": 0.6, "mage": 0.3, "healer": 0.1}
    assert found["finish"] == "stop"
    assert len(found["text"].split()) > 5


class Terminal:
    """`lmoe chat` in a pseudo-terminal."""

    def __init__(self, cwd, *words, term="xterm-256color"):
        self.seen = ""
        self._end, other = pty.openpty()
        env = {
            **os.environ,
            "TERM": term,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "80",
            "LINES": "24",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lmoe_cli", "chat", *words],
            cwd=cwd,
            env=env,
            stdin=other,
            stdout=other,
            stderr=other,
        )
        os.close(other)

    def types(self, text):
        os.write(self._end, text.encode())

    def sees(self, pattern):
        """Wait for a text that matches."""
        while not re.search(pattern, self.seen):
            assert self._reads(), f"it ended before {pattern!r} came:\n{self.seen}"

    def leaves(self):
        """Wait for its end; give its exit code."""
        while self._reads():
            pass
        os.close(self._end)
        return self._process.wait(60)

    def _reads(self):
        assert select.select([self._end], [], [], 60)[0], f"nothing came for a minute:\n{self.seen}"
        try:
            data = os.read(self._end, 65536)
        except OSError:  # the other end is closed
            return False
        self.seen += data.decode("utf-8", "replace")
        return bool(data)


def test_compiled_steps_say_the_same(place, monkeypatch):
    counter = CompileCounterWithBackend("eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    words = ("--loadout", place / "mix.yaml", "--device", "cpu", "--prompt", "Who are you?")
    plain = answer(*words).stdout
    assert counter.frame_count == 0
    assert answer(*words, "--compile").stdout == plain
    assert counter.frame_count == 1


def test_a_model_that_does_not_compile_is_refused_with_a_code(place, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_can_compile_fullgraph", False)
    with pytest.raises(UsageError) as caught:
        answer("--loadout", place / "mix.yaml", "--prompt", "Who are you?", "--compile")
    assert caught.value.code == "compile-unsupported"


def test_in_a_terminal_it_is_a_conversation(place):
    chat = Terminal(place, "--loadout", "mix.yaml")
    chat.sees(r"healer.*-0\.25")
    chat.types("Who are you?\r")
    chat.sees(r"tok/s · first token")
    chat.types("\x1b[1;3A")
    chat.types("/show\r")  # in words: of the bar above, only the characters that change are drawn
    chat.sees(r"mix\.yaml")
    chat.sees(r"mage\W.*0\.55")
    chat.types("\x04")
    assert chat.leaves() == 0
    assert "Traceback" not in chat.seen


def test_a_dumb_terminal_gets_lines(place):
    chat = Terminal(place, "--base", "plain", *SHORT, term="dumb")
    chat.sees("continues the text")
    chat.types('"""Once\nupon"""\n')
    chat.sees("tok/s")
    chat.types("\x03")
    chat.types("/nonsense\n")
    chat.sees("no command /nonsense")
    chat.types("/bye\n")
    assert chat.leaves() == 0
    assert "\x1b" not in chat.seen
