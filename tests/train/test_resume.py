"""A training that was stopped goes on as if it had not been, to the last bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from commands import lmoe
from safetensors.torch import load_file, save_file
from train.made import base, bytes_of, config, run, write_data

from lmoe_cli.errors import NotFoundError, ResourceError, UsageError
from lmoe_cli.locks import alone_in
from lmoe_cli.train import checkpoints, training
from lmoe_cli.train.loop import Loop, NotFiniteError

STAGES = [{"train": "experts", "steps": 4, "together": True}, {"train": "joint", "steps": 4}]
GATE = {"activation": "topk"}
OFTEN = {"save_every": 1, "eval_every": 1}


class StoppedError(Exception):
    pass


def stopping_at(number):
    """A watcher that stops the training when it is told of a step for the ``number``-th time."""
    told = []

    def tell(event):
        if "loss" in event:
            told.append(event)
            if len(told) == number:
                raise StoppedError

    return tell


def made(folder, **words):
    return config(folder, STAGES, gate=GATE, trainer=OFTEN | words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    out = run(made(folder), folder)
    return bytes_of(out), [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop", [4, 7])
def test_a_run_stopped_at_any_step_goes_on_to_the_same_bytes(tmp_path, whole, stop):
    with pytest.raises(StoppedError):
        run(made(tmp_path), tmp_path, tell=stopping_at(stop))
    assert not (tmp_path / "out").exists()
    out = run(made(tmp_path), tmp_path, resume=True)
    assert bytes_of(out) == whole[0]
    assert not (tmp_path / "out.work").exists()
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    known = ("run", "step", "loss", "load")
    assert [[one.get(key) for key in known] for one in steps] == [[one.get(key) for key in known] for one in whole[1]]


def test_a_process_that_is_killed_goes_on_to_the_same_bytes(tmp_path, whole):
    told = made(tmp_path).model_dump(mode="json", exclude_none=True)
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(told, sort_keys=False))
    command = [sys.executable, "-m", "lmoe_cli", "train", "train.yaml", "--out", "out", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    log = tmp_path / "out.work" / "stage-2-joint" / "log.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count('loss": ') >= 2) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    done = lmoe("train", "train.yaml", "--out", "out", "--device", "cpu", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out") == whole[0]


def test_a_checkpoint_that_was_cut_short_is_not_gone_on_with(tmp_path, whole):
    with pytest.raises(StoppedError):
        run(made(tmp_path), tmp_path, tell=stopping_at(4))
    found = sorted((tmp_path / "out.work" / "stage-1-experts").glob("checkpoint-*"))
    weights = found[-1] / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-50])
    assert not checkpoints.is_whole(found[-1])
    told = []
    out = run(made(tmp_path), tmp_path, resume=True, tell=told.append)
    assert bytes_of(out) == whole[0]
    assert [event["code"] for event in told if "code" in event] == ["checkpoint-damaged"]


def test_a_checkpoint_holds_what_is_trained_and_nothing_of_the_base(tmp_path):
    with pytest.raises(StoppedError):
        run(made(tmp_path), tmp_path, tell=stopping_at(3))
    from lmoe_cli.checkpoint.header import read_header

    folder = max((tmp_path / "out.work" / "stage-1-experts").glob("checkpoint-*"))
    names = read_header(folder / "trained.safetensors").tensors
    assert names
    assert all(name.startswith("factors.") for name in names)
    assert not list(folder.glob("model*"))


def test_an_unfinished_training_is_neither_overwritten_nor_mistaken_for_another(tmp_path):
    with pytest.raises(NotFoundError, match="nothing was begun"):
        run(made(tmp_path), tmp_path, resume=True)
    with pytest.raises(StoppedError):
        run(made(tmp_path), tmp_path, tell=stopping_at(2))
    with pytest.raises(UsageError) as caught:
        run(made(tmp_path), tmp_path)
    assert caught.value.code == "training-unfinished"
    with pytest.raises(UsageError, match="trainer") as caught:
        run(made(tmp_path, seed=5), tmp_path, resume=True)
    assert caught.value.code == "resume-differs"
    again = made(tmp_path)
    turned = dict(reversed(again.experts.items()))  # checkpoints hold what is trained in the order of the experts
    with pytest.raises(UsageError, match="order") as caught:
        run(again.model_copy(update={"experts": turned}), tmp_path, resume=True)
    assert caught.value.code == "resume-differs"
    with alone_in(tmp_path / "out.work"), pytest.raises(UsageError) as caught:
        run(again, tmp_path, resume=True)
    assert caught.value.code == "output-busy"
    write_data(tmp_path / "words.jsonl", "words", count=30)
    with pytest.raises(UsageError, match=r"words\.jsonl"):
        run(made(tmp_path), tmp_path, resume=True)
    out = run(made(tmp_path), tmp_path, force=True)
    with pytest.raises(UsageError) as caught:
        run(made(tmp_path), tmp_path)
    assert caught.value.code == "output-exists"
    assert (out / "recipe.yaml").is_file()


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    real = Loop.training_step

    def spoilt(self, model, inputs, items=None):
        if self.state.global_step == 2:
            next(iter(self._trainee.trained.values())).data.fill_(float("nan"))
        return real(self, model, inputs, items)

    monkeypatch.setattr(Loop, "training_step", spoilt)
    with pytest.raises(NotFiniteError, match=r"at step 3, in the batch of \S+\.jsonl:\d+, ") as caught:
        run(made(tmp_path), tmp_path)
    assert caught.value.code == "loss-not-finite"
    assert checkpoints.last_whole(tmp_path / "out.work" / "stage-1-experts")[0].name == "checkpoint-2"
    assert not (tmp_path / "out").exists()


def test_a_full_disk_at_a_checkpoint_is_told_and_the_one_before_is_kept(tmp_path, monkeypatch, whole):
    real = Loop._save

    def full(self, folder=None, state_dict=None):
        if self.state.global_step == 3:
            raise OSError(28, "No space left on device")
        return real(self, folder, state_dict)

    monkeypatch.setattr(Loop, "_save", full)
    with pytest.raises(ResourceError) as caught:
        run(made(tmp_path), tmp_path)
    assert caught.value.code == "disk-full"
    assert caught.value.exit_code == 6
    monkeypatch.undo()
    assert bytes_of(run(made(tmp_path), tmp_path, resume=True)) == whole[0]


def test_the_best_evaluation_is_what_is_kept_where_patience_is_asked_for(tmp_path, monkeypatch):
    stages = [{"train": "experts", "steps": 12, "together": True, "patience": 2, "eval_every": 1, "learning_rate": 0.9}]
    told = []
    out = run(config(tmp_path, stages), tmp_path, tell=told.append)
    judged = [event["eval"]["eval_loss"] for event in told if "eval" in event]
    report = json.loads((out / "train-report.json").read_text())
    assert report["runs"]["stage-1-experts"]["eval_loss"] == pytest.approx(min(judged), rel=1e-5)
    assert len(judged) < 12


@pytest.mark.parametrize("stop", [3, 5])
def test_a_run_stopped_in_a_later_pass_over_the_data_goes_on_in_its_order(tmp_path, stop):
    """18 rows, 6 a batch: the second pass has rows in another order than the first."""
    write_data(tmp_path / "sums.jsonl", "sums", count=18, valid=0)
    stages = [{"train": "experts", "steps": 8, "batch_size": 6, "save_every": 1}]
    due = bytes_of(run(config(tmp_path, stages, experts=("sums",)), tmp_path, "whole"))
    with pytest.raises(StoppedError):
        run(config(tmp_path, stages, experts=("sums",)), tmp_path, tell=stopping_at(stop))
    assert bytes_of(run(config(tmp_path, stages, experts=("sums",)), tmp_path, resume=True)) == due


def test_a_run_that_had_run_out_of_patience_is_not_gone_on_with(tmp_path, monkeypatch):
    stages = [{"train": "experts", "steps": 12, "together": True, "patience": 2, "eval_every": 1, "learning_rate": 0.9}]
    due = run(config(tmp_path, stages), tmp_path, "whole")
    told = []

    def dies(*_words):
        raise StoppedError

    monkeypatch.setattr(training, "write_results", dies)
    with pytest.raises(StoppedError):
        run(config(tmp_path, stages), tmp_path)
    monkeypatch.undo()
    out = run(config(tmp_path, stages), tmp_path, resume=True, tell=told.append)
    assert bytes_of(out) == bytes_of(due)
    assert not [event for event in told if "loss" in event]
    reports = [json.loads((folder / "train-report.json").read_text()) for folder in (due, out)]
    assert reports[0]["runs"]["stage-1-experts"].keys() >= {"step", "loss", "eval_loss"}
    assert reports[0] == reports[1]
    lines = [(folder / "log.jsonl").read_text().splitlines() for folder in (due, out)]
    assert [json.loads(line).get("step") for line in lines[0]] == [json.loads(line).get("step") for line in lines[1]]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier")
    return run(made(folder), folder)


def add_one(folder):
    for path in folder.glob("*.safetensors"):
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)


def change(name):
    def it(folder):
        path = folder / name
        found = json.loads(path.read_text())
        path.write_text(json.dumps(found | {"lora_alpha": 77} if "lora_alpha" in found else found | {"new": 1}))

    return it


@pytest.mark.parametrize(
    ("what", "happens"),
    [
        ("base", add_one),
        ("sums", add_one),
        ("base", change("tokenizer_config.json")),
        ("sums", change("adapter_config.json")),
    ],
)
def test_another_base_or_adapter_is_not_gone_on_with(tmp_path, earlier, what, happens):
    earlier = shutil.copytree(earlier, tmp_path / "earlier")
    shutil.copytree(base(), tmp_path / "base")
    folders = {"base": tmp_path / "base", "sums": earlier / "experts" / "sums"}
    again = config(tmp_path, STAGES[1:], gate=GATE, trainer=OFTEN, earlier=earlier)
    again = again.model_copy(update={"base": str(folders["base"])})
    with pytest.raises(StoppedError):
        run(again, tmp_path, tell=stopping_at(2))
    happens(folders[what])
    with pytest.raises(UsageError, match=str(folders[what])) as caught:
        run(again, tmp_path, resume=True)
    assert caught.value.code == "resume-differs"
