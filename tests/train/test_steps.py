"""How many steps a run takes, what is logged of them, and what data they see."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
import time

import pytest
import torch
import yaml
from commands import lmoe
from safetensors.torch import load_file
from train.made import base, bytes_of, config, run, write_data

from lmoe_cli.bank import shared
from lmoe_cli.cli.output import Output
from lmoe_cli.cli.train import View
from lmoe_cli.errors import LmoeError, UsageError
from lmoe_cli.findings import RefusedError
from lmoe_cli.train.config import TrainConfig
from lmoe_cli.train.loop import Loop, NotFiniteError

EXPERTS = [{"train": "experts", "steps": 2, "together": True}]
GATE = {"activation": "hard1", "share": "block", "init": "arrow"}


def logged(out):
    return [line for line in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if "loss" in line]


def test_every_step_is_logged_with_what_one_watches(tmp_path):
    began = time.perf_counter()
    stages = [{"train": "joint", "steps": 2}]
    out = run(config(tmp_path, stages, gate={"activation": "softmax", "zero_expert": True}), tmp_path)
    took = time.perf_counter() - began
    lines = logged(out)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["load"].keys() == {"sums", "words", "names", "none"}
        assert sum(line["load"].values()) == pytest.approx(1, abs=1e-3)
        assert 0 <= line["entropy"] <= math.log(4) + 1e-6
        assert 1 <= line["effective"] <= 4 + 1e-6
        assert line["tokens"] / took < line["tokens_per_s"] < 1e7
        assert 1e8 < line["memory"] < 64e9
        assert {"balance", "z", "learning_rate", "gate_learning_rate"} <= line.keys()


def test_a_base_in_bfloat16_teaches_experts_in_float32(tmp_path):
    """What is trained is kept in float32, and goes near where a base in float32 leads it."""
    stages = [{"train": "joint", "steps": 3}]
    outs = {}
    for precision in ("float32", "bfloat16"):
        made = config(tmp_path, stages, gate={"activation": "softmax"}, trainer={"precision": precision})
        outs[precision] = run(made, tmp_path, precision)
    found, due = (logged(outs[precision]) for precision in ("bfloat16", "float32"))
    for one, other in zip(found, due, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert one["loss"] != other["loss"]
    for file in ("experts/sums/adapter_model.safetensors", "router/router.safetensors"):
        assert {tensor.dtype for tensor in load_file(outs["bfloat16"] / file).values()} == {torch.float32}


def test_a_log_for_tensorboard_names_experts_and_losses(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    stages = [{"train": "joint", "steps": 2}]
    out = run(config(tmp_path, stages, gate={"activation": "softmax"}, trainer={"tensorboard": True}), tmp_path)
    (file,) = (out / "tensorboard").rglob("*tfevents*")
    events = EventAccumulator(str(file))
    events.Reload()
    for line in logged(out):
        for name in ("loss", "balance", "effective", "tokens_per_s"):
            told = {event.step: event.value for event in events.Scalars(f"train/{name}")}
            assert line[name] == pytest.approx(told[line["step"]], rel=1e-5)
        told = {event.step: event.value for event in events.Scalars("train/load/words")}
        assert line["load"]["words"] == pytest.approx(told[line["step"]], rel=1e-5)


def test_a_bar_on_a_terminal_shows_how_far_a_run_is(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    made = config(tmp_path, [{"train": "experts", "steps": 3}], experts=("sums",))
    with View(Output("train"), every=10) as view:
        run(made, tmp_path, tell=view.tell)
    assert "3/3" in screen.getvalue()
    assert "stage-1-experts-sums  loss" in screen.getvalue()


@pytest.mark.parametrize(("rows", "batch", "accumulate", "epochs", "steps"), [(18, 4, 2, 3, 9), (18, 4, 8, 2, 2)])
def test_a_pass_over_the_data_ends_with_the_rest_of_it(tmp_path, rows, batch, accumulate, epochs, steps):
    """18 rows are 5 batches: 3 steps of two batches at most, or one of eight."""
    write_data(tmp_path / "sums.jsonl", "sums", count=rows, valid=0)
    stages = [{"train": "experts", "epochs": epochs, "batch_size": batch, "accumulate": accumulate}]
    out = run(config(tmp_path, stages, experts=("sums",)), tmp_path)
    assert [line["step"] for line in logged(out)] == list(range(1, steps + 1))


def test_every_step_is_logged_also_where_nothing_is_held_out(tmp_path):
    write_data(tmp_path / "sums.jsonl", "sums", count=8, valid=0)
    out = run(config(tmp_path, [{"train": "experts", "steps": 1}], experts=("sums",)), tmp_path)
    assert [line["step"] for line in logged(out)] == [1]
    assert json.loads((out / "train-report.json").read_text())["runs"]["stage-1-experts-sums"]["step"] == 1


def test_rates_are_those_that_a_step_was_made_with(tmp_path):
    stages = [EXPERTS[0], {"train": "joint", "steps": 2, "learning_rate": 0.25, "gate_learning_rate": 0.5}]
    made = config(tmp_path, stages, gate=GATE, trainer={"schedule": "linear", "warmup": 0})
    lines = logged(run(made, tmp_path))
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.01, 0.005, 0.25, 0.125])
    assert [line.get("gate_learning_rate") for line in lines] == [None, None, 0.5, 0.25]


def test_checkpoints_may_be_more_frequent_than_evaluations(tmp_path):
    told = []
    stages = [{"train": "experts", "epochs": 1, "save_every": 1}]
    run(config(tmp_path, stages, experts=("sums",)), tmp_path, tell=told.append)
    assert len([event for event in told if "loss" in event]) == 5
    assert len([event for event in told if "eval" in event]) == 1


def test_experts_may_be_trained_after_their_gate(tmp_path):
    out = run(config(tmp_path, [*EXPERTS, {"train": "gate", "steps": 1}, *EXPERTS], gate=GATE), tmp_path)
    done = lmoe("check", out / "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_adapter_of_another_base_is_trained_on_where_it_is_accepted(tmp_path):
    first = run(config(tmp_path, EXPERTS[:1], experts=("sums",)), tmp_path, "first")
    shutil.copytree(base(), tmp_path / "base")
    named = {tmp_path / "base" / "config.json": {"_name_or_path": "acme/base"}}
    named[first / "experts" / "sums" / "adapter_config.json"] = {"base_model_name_or_path": "acme/other"}
    for path, change in named.items():
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    made = config(tmp_path, EXPERTS[:1], experts=("sums",), earlier=first).model_dump()
    made["base"] = str(tmp_path / "base")
    with pytest.raises(RefusedError):
        run(TrainConfig.model_validate(made), tmp_path)
    made["experts"]["sums"]["accept_base"] = ["acme/other"]
    out = run(TrainConfig.model_validate(made), tmp_path, force=True)
    assert yaml.safe_load((out / "recipe.yaml").read_text())["experts"]["sums"]["accept_base"] == ["acme/other"]


def test_data_for_all_is_for_gates_and_not_for_experts(tmp_path):
    write_data(tmp_path / "all.jsonl", "words", count=40, valid=4)
    stages = [*EXPERTS, {"train": "gate", "steps": 1}]
    told = []
    run(config(tmp_path, stages, gate=GATE, data="all.jsonl"), tmp_path, tell=told.append)
    judged = [set(event["eval"]) for event in told if "eval" in event]
    assert judged[0] == {"eval_loss", "eval_loss_sums", "eval_loss_words", "eval_loss_names"}
    assert judged[-1] == {"eval_loss", "eval_loss_all"}


def test_a_hard_gate_learns_from_experts_that_were_not_chosen(tmp_path, monkeypatch):
    """Their gates are 0, and what they would have done is still asked for, whatever is quicker."""
    begun = run(config(tmp_path, EXPERTS), tmp_path, "begun")
    stages = [{"train": "gate", "steps": 1, "balance": 0, "z": 0, "schedule": "constant", "warmup": 0, "clip": 0}]

    def trained(name, rate):
        trainer = {"gate_learning_rate": rate}
        out = run(config(tmp_path, stages, gate=GATE, earlier=begun, trainer=trainer), tmp_path, name)
        return load_file(out / "router" / "router.safetensors")

    found, at_first = {}, trained("still", 1e-30)
    for way in (True, False):
        monkeypatch.setattr(shared, "is_worth", lambda *_, way=way: way)
        found[way] = trained(f"gate-{way}", 1e-2)
    for name, tensor in found[False].items():
        torch.testing.assert_close(found[True][name], tensor)
        assert (tensor - at_first[name]).view(len(tensor), -1).any(1).all(), "an expert has learned nothing"


def test_what_is_trained_and_is_no_number_is_not_kept_as_good(tmp_path, monkeypatch):
    real = Loop.training_step

    def spoilt(self, model, inputs, items=None):
        loss = real(self, model, inputs, items)
        if self.state.global_step == 1:
            next(iter(self._trainee.trained.values())).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(Loop, "training_step", spoilt)
    with pytest.raises(NotFiniteError):
        run(config(tmp_path, EXPERTS, trainer={"save_every": 1, "eval_every": 1, "clip": 0}), tmp_path)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "out.work").glob("*/checkpoint-*/whole.json")] == ["whole.json"]


def test_a_base_is_not_spread_over_one_process(tmp_path):
    with pytest.raises(UsageError) as caught:
        run(config(tmp_path, EXPERTS, trainer={"shard": True}), tmp_path)
    assert caught.value.code == "shard-alone"


def test_a_folder_of_somebody_else_is_not_worked_in(tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.txt").write_text("mine")
    for words in ({}, {"force": True}):
        with pytest.raises(UsageError) as caught:
            run(config(tmp_path, EXPERTS), tmp_path, **words)
        assert caught.value.code == "output-not-ours"
    assert (tmp_path / "out.work" / "thesis.txt").read_text() == "mine"


def test_a_name_does_not_lead_out(tmp_path):
    with pytest.raises(ValueError, match="name"):
        config(tmp_path, EXPERTS, name="../../elsewhere")


def test_state_that_was_damaged_is_told(tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "state.json").write_text("{}")
    with pytest.raises(LmoeError) as caught:
        run(config(tmp_path, EXPERTS), tmp_path, resume=True)
    assert caught.value.code == "resume-differs"


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM


class Config(LlamaConfig):
    model_type = "own"


class Model(LlamaForCausalLM):
    config_class = Config
"""


def test_a_base_with_code_of_its_own_is_trained_where_that_is_trusted(tmp_path):
    shutil.copytree(base(), tmp_path / "base")
    (tmp_path / "base" / "own.py").write_text(OWN)
    path = tmp_path / "base" / "config.json"
    told = json.loads(path.read_text()) | {
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    }
    path.write_text(json.dumps(told | {"model_type": "own"}))
    made = config(tmp_path, EXPERTS[:1], experts=("sums",)).model_copy(update={"base": str(tmp_path / "base")})
    with pytest.raises(LmoeError):
        run(made, tmp_path)
    run(made, tmp_path, trust_remote_code=True, force=True)


def test_what_a_training_begins_with_is_not_replaced_by_it(tmp_path):
    first = run(config(tmp_path, EXPERTS[:1], experts=("sums",)), tmp_path, "first")
    before = bytes_of(first)
    data = str(shutil.copy(tmp_path / "sums.jsonl", first))
    for made in (
        config(tmp_path, EXPERTS[:1], experts=("sums",), earlier=first),
        config(tmp_path, EXPERTS[:1], experts=("sums",), data=data),
    ):
        with pytest.raises(UsageError) as caught:
            run(made, tmp_path, "first", force=True)
        assert caught.value.code == "output-is-input"
    assert bytes_of(first) == before


def test_a_stage_ends_by_its_own_word_before_that_of_all(tmp_path):
    stages = [{"train": "experts", "epochs": 1}]
    out = run(config(tmp_path, stages, experts=("sums",), trainer={"steps": 2}), tmp_path)
    assert len(logged(out)) == 5  # 18 rows in fours


def test_a_router_tells_what_it_was_trained_on_and_not_what_was_held_out(tmp_path):
    write_data(tmp_path / "held.jsonl", "sums", valid=0)
    made = config(
        tmp_path, [*EXPERTS, {"train": "gate", "steps": 1}], experts=("sums", "words"), gate=GATE
    ).model_dump()
    made["experts"]["sums"]["data"] = {"train": "sums.jsonl", "valid": "held.jsonl"}
    out = run(TrainConfig.model_validate(made), tmp_path)
    assert json.loads((out / "router" / "router.json").read_text())["data"].keys() == {"sums.jsonl", "words.jsonl"}
    assert "held.jsonl" in json.loads((out / "train-report.json").read_text())["data"]
