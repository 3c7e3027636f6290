"""The whole pipeline, in small."""

import os
import random
import stat
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo_model import __main__ as run
from demo_model.__main__ import main
from demo_model.blends import blend
from demo_model.conversations import base_conversations
from demo_model.demo import QUICK, make_demo
from demo_model.evaluate import mean_nats
from demo_model.model import ADAPTERS
from demo_model.package import RefusedError, write_demo
from demo_model.tables import CLASSES, read_tables
from demo_model.tokens import encode

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.xdist_group("demo_model")  # trained once, by one worker


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def demo():
    return make_demo(QUICK, lambda _line: None)


@pytest.fixture(scope="module")
def written(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    write_demo(demo, folder)
    return folder


def test_another_process_writes_the_same_bytes(written, tmp_path):
    out = tmp_path / "again"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "demo_model", "--quick", "--no-bars", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert "| base |" in (out / "demo-matrix.md").read_text()
    (out / "demo-matrix.md").unlink()
    assert files(out) == files(written)


@pytest.mark.parametrize("name", CLASSES)
def test_peft_loads_the_adapter_and_runs_it_as_the_blend_does(demo, written, name):
    base = AutoModelForCausalLM.from_pretrained(written / "adventurer", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, written / name)
    tokenizer = AutoTokenizer.from_pretrained(written / "adventurer")
    rows = encode(tokenizer, list(islice(base_conversations(read_tables(), random.Random(0)), 8)))
    assert rows == encode(demo.tokenizer, list(islice(base_conversations(read_tables(), random.Random(0)), 8)))
    ours = mean_nats(blend(demo.base, demo.experts, {name: 1.0}), rows)
    assert mean_nats(model.get_base_model(), rows) == pytest.approx(ours, abs=1e-5)
    assert model.peft_config["default"].r == ADAPTERS[name].rank


def test_the_rows_are_what_the_chat_template_gives(demo):
    conversations = list(islice(base_conversations(read_tables(), random.Random(1)), 40))
    for conversation, row in zip(conversations, encode(demo.tokenizer, conversations), strict=True):
        messages = [{"role": message.role, "content": message.content} for message in conversation]
        given = demo.tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert tuple(given["input_ids"]) == row.ids
        if all(message.is_learned for message in conversation if message.role == "assistant"):
            assert [bool(is_learned) for is_learned in given["assistant_masks"]] == list(row.is_learned)


def test_any_text_survives_the_tokenizer(demo):
    text = "Žluťoučký kůň \n\t<b>№ 5</b> 龍 🐉"
    assert demo.tokenizer.decode(demo.tokenizer(text)["input_ids"]) == text


def test_files_have_the_modes_that_the_umask_gives(written):
    umask = os.umask(0)
    os.umask(umask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in written.rglob("*") if path.is_file()} == {0o666 & ~umask}


def test_a_demo_that_misses_a_bar_is_not_written(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "make_demo", lambda *_: demo)
    result = CliRunner().invoke(main, ["--quick", "--out", str(tmp_path / "out")])
    assert result.exit_code != 0
    assert "nats/token, not" in result.output
    assert list(tmp_path.iterdir()) == []


def test_a_quick_run_never_replaces_the_embedded_demo():
    assert CliRunner().invoke(main, ["--quick"]).exit_code == 2


def test_a_folder_of_something_else_is_left_alone(demo, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RefusedError, match="thesis"):
        write_demo(demo, tmp_path)
    assert files(tmp_path) == {"thesis.tex": b"years of work"}
