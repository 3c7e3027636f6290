"""What is wrong with a config or its data is said before anything is trained, and nothing is left behind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import tiny
import tiny_tokenizer
import torch
from laws.cases import case
from train.made import config, run, write_data

from lmoe_cli.errors import LmoeError, UsageError
from lmoe_cli.findings import RefusedError
from lmoe_cli.train import training
from lmoe_cli.train.config import TrainConfig, read_config
from lmoe_cli.train.log import Log
from lmoe_cli.train.order import Order

EXPERTS = [{"train": "experts", "steps": 2}]


def line(*messages):
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in messages]}) + "\n"


GOOD = line(("user", "add 1"), ("assistant", "2"))


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ("", "data-empty"),
        ("not json\n", "data-invalid"),
        (GOOD + "[1, 2]\n", "data-invalid"),
        (GOOD + line(("robot", "hi"), ("assistant", "yes")), "data-role"),
        (GOOD + line(("user", "hi")), "data-unanswered"),
        (GOOD.replace("{", '{"split": "test", ', 1), "data-empty"),
        (line(("user", "a" * 200), ("assistant", "b")), "data-empty"),
    ],
)  # fmt: skip
def test_data_that_nothing_can_be_learned_from_is_refused(tmp_path, content, code):
    (tmp_path / "sums.jsonl").write_text(content)
    with pytest.raises(LmoeError) as caught:
        run(config(tmp_path, EXPERTS, experts=("sums",)), tmp_path)
    assert caught.value.code == code
    assert "sums.jsonl" in caught.value.message
    assert not (tmp_path / "out").exists()


def test_long_examples_are_cut_left_out_or_refused(tmp_path):
    write_data(tmp_path / "sums.jsonl", "sums", count=10)
    with (tmp_path / "sums.jsonl").open("a") as file:
        file.write(line(("user", "a"), ("assistant", "b" * 300)))
    told = {}
    for too_long in ("truncate", "skip", "error"):
        made = config(tmp_path, EXPERTS, experts=("sums",), trainer={"too_long": too_long})
        events = []
        if too_long == "error":
            with pytest.raises(LmoeError, match="tokens") as caught:
                run(made, tmp_path, too_long)
            assert caught.value.code == "data-too-long"
        else:
            run(made, tmp_path, too_long, events.append)
            told[too_long] = [event["warning"] for event in events if event.get("code") == "data-cut"]
    assert told == {
        "truncate": ["1 of 5 records cut off at the limit"],
        "skip": ["1 of 5 records left out, longer than the limit"],
    }


def test_data_that_was_put_right_is_trained_on_without_a_word(tmp_path):
    made = config(tmp_path, EXPERTS, experts=("sums",))
    good = (tmp_path / "sums.jsonl").read_text()
    (tmp_path / "sums.jsonl").write_text("hello\n")
    with pytest.raises(LmoeError):
        run(made, tmp_path)
    (tmp_path / "sums.jsonl").write_text(good)
    assert (run(made, tmp_path) / "recipe.yaml").is_file()


def test_a_data_file_that_is_missing_is_named(tmp_path):
    made = config(tmp_path, EXPERTS, experts=("sums",))
    (tmp_path / "sums.jsonl").unlink()
    with pytest.raises(LmoeError, match=r"sums\.jsonl") as caught:
        run(made, tmp_path)
    assert caught.value.exit_code == 3


def test_one_example_and_one_expert_are_enough(tmp_path):
    (tmp_path / "sums.jsonl").write_text(GOOD)
    stages = [{"train": "experts", "steps": 2}, {"train": "joint", "steps": 2}]
    out = run(config(tmp_path, stages, experts=("sums",), gate={"activation": "softmax"}), tmp_path)
    assert json.loads((out / "router" / "router.json").read_text())["experts"].keys() == {"sums"}


@pytest.mark.parametrize("variant", ["dora", "lora_bias", "embedding", "ia3", "saved"])
def test_experts_that_hold_more_than_plain_lora_train_a_gate_but_not_themselves(tmp_path, variant):
    own = case("llama", variant)
    talking = tiny_tokenizer.save_tokenizer(Path(shutil.copytree(own.base, tmp_path / "talking")))
    write_data(tmp_path / "sums.jsonl", "sums")
    write_data(tmp_path / "words.jsonl", "words")

    def made(kind):
        told = config(tmp_path, [{"train": kind, "steps": 1}], experts=("sums", "words"), gate={}, earlier=tmp_path)
        experts = {
            name: one.model_copy(update={"adapter": str(folder)})
            for (name, one), folder in zip(told.experts.items(), (own.one, own.two), strict=True)
        }
        return told.model_copy(update={"experts": experts, "base": str(talking)})

    with pytest.raises(LmoeError, match="plain LoRA") as caught:
        run(made("joint"), tmp_path, "joint")
    assert caught.value.code == "train-unsupported"
    out = run(made("gate"), tmp_path, "gate")
    assert (out / "router" / "router.safetensors").is_file()


def test_an_expert_of_another_base_is_refused(tmp_path):
    tiny.save_base("llama", tmp_path / "wide", hidden_size=48)
    adapter = tiny.save_adapter(tmp_path / "wide", "lora", tmp_path / "other")
    made = config(tmp_path, EXPERTS, experts=("sums",))
    experts = {"sums": made.experts["sums"].model_copy(update={"adapter": str(adapter)})}
    with pytest.raises(RefusedError):
        run(made.model_copy(update={"experts": experts}), tmp_path)


def test_targets_that_the_base_does_not_have_are_refused(tmp_path):
    made = config(tmp_path, EXPERTS, experts=("sums",))
    experts = {"sums": made.experts["sums"].model_copy(update={"targets": ["c_attn"]})}
    with pytest.raises(LmoeError, match="c_attn") as caught:
        run(made.model_copy(update={"experts": experts}), tmp_path)
    assert caught.value.code == "targets-missing"
    assert "q_proj" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: x\nexperts: {a: {}}\nstages: [{train: gate}]\n", "'gate' does not say which"),
        ("base: x\nexperts: {a: {}}\nstages: [{train: experts}]\n", "a has no data"),
        ("base: x\nexperts: {a: {data: d}}\ngate: {}\nstages: [{train: gate}]\n", "fresh and does nothing"),
        ("base: x\nexperts: {a: {data: d, rnak: 4}}\nstages: [{train: experts}]\n", "3|did you mean 'rank'"),
        ("base: x\nexperts: {a: {data: d}}\nstages: [{train: expert}]\n", "cannot be 'expert'"),
        ("base: x\nexperts: {a: {data: d}}\ngate: {top_k: 2}\nstages: [{train: joint}]\n", "top_k goes with"),
        ("base: x\nexperts: {a: {data: {train: d, strength: 0}}}\nstages: [{train: experts}]\n", "learns nothing at"),
        (
            "base: x\nexperts: {a: {data: {train: d, valid: ./d}}}\nstages: [{train: experts}]\n",
            "d would be learned from and judged by",
        ),
        (
            "base: x\nexperts: {a: {data: [{train: d, fraction: 0.1}, {train: ./d}]}}\nstages: [{train: experts}]\n",
            "d stands twice",
        ),
        (
            "base: x\nexperts: {a: {adapter: y, data: {train: d, strength: 2}}}\ngate: {}\nstages: [{train: gate}]\n",
            "a strength is for data of an expert",
        ),
        (
            "base: x\nexperts: {a: {data: [{train: d, fraction: 0.1}, {train: d, strength: 2}]}}\n"
            "stages: [{train: experts}]\n",
            "d stands twice",
        ),
        ("base: x\nexperts: {a: {data: []}}\nstages: [{train: experts}]\n", "at least 1 item"),
        ("base: x\nexperts: {a: {data: {train: d, valid: v, fraction: 0.1}}}\nstages: [{train: experts}]\n", "'valid'"),
        ("base: x\nexperts: {a: {data: d, adapter: b, rank: 4}}\nstages: [{train: experts}]\n", "fresh one has: rank"),
        ("base: x\nexperts: {a: {data: d, accept_base: [b]}}\nstages: [{train: experts}]\n", "begins with none"),
        ("base: x\nexperts: {a: {data: d}}\ngate: {}\nstages: [{train: experts}]\n", "no stage that trains it"),
        ("base: x\nexperts: {a: {data: d}}\nstages: [{train: experts, z: 1}]\n", "trains experts has no: z"),
        (
            "base: x\nexperts: {a: {data: d}}\nstages: [{train: experts, gate_learning_rate: 0.1}]\n",
            "trains experts has no: gate_learning_rate",
        ),
        ("base: x\nexperts: {a: {data: d}}\nstages: [{train: experts, epochs: 1, steps: 2}]\n", "leave one out"),
        ("base: x\nexperts: {a: {data: d, targets: []}}\nstages: [{train: experts}]\n", "at least 1"),
        ("base: x\nexperts: {a: {data: d, targets: ['']}}\nstages: [{train: experts}]\n", "at least 1"),
        ("base: x\nexperts: {a: {data: d, adapter: b}}\ngate: {}\nstages: [{train: gate}]\n", "is always 1"),
        (
            "base: x\nexperts: {a: {data: d, adapter: b}, c: {data: d, adapter: b}}\n"
            "gate: {activation: topk, top_k: 7}\nstages: [{train: gate}]\n",
            "top_k 7 leaves nothing to choose",
        ),
        (
            "base: x\ndata: e\nexperts: {a: {data: d, adapter: b}, c: {adapter: b}}\ngate: {}\n"
            "stages: [{train: gate}]\n",
            "that of experts is not read",
        ),
        (
            "base: x\nexperts: {a: {data: d}}\ngate: {}\nstages: [{train: experts}, {train: gate, together: true}]\n",
            "trains gate has no: together",
        ),
        (
            "base: x\nexperts: {a: {data: d}}\nstages: [{train: experts, patience: 1, eval_every: 6, save_every: 2}]\n",
            "must be eval_every (6)",
        ),
        ("[1]\n", "not a training config"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_told_with_its_line(tmp_path, text, message):
    path = tmp_path / "train.yaml"
    path.write_text(text)
    with pytest.raises(RefusedError) as caught:
        read_config(path)
    told = " ".join([str(caught.value), *(f"{one.message} {one.hint}" for one in caught.value.findings)])
    assert any(part in told for part in message.split("|"))
    assert f"{path}:" in told
    assert caught.value.exit_code == 2


def test_what_a_later_stage_is_refused_for_is_told_before_anything_is_trained(tmp_path):
    own = case("llama", "dora")
    talking = tiny_tokenizer.save_tokenizer(Path(shutil.copytree(own.base, tmp_path / "talking")))
    for topic in ("sums", "words"):
        write_data(tmp_path / f"{topic}.jsonl", topic, valid=0)
    experts = {
        "a": {"adapter": str(own.one), "data": "sums.jsonl"},
        "b": {"adapter": str(own.two), "data": "words.jsonl"},
    }
    gate = {"train": "gate", "steps": 1}
    for stages, code in (
        ([gate, {"train": "joint", "steps": 1}], "train-unsupported"),
        ([gate, {**gate, "patience": 1}], "nothing-held-out"),
    ):
        told = []
        made = TrainConfig.model_validate({"base": str(talking), "experts": experts, "gate": {}, "stages": stages})
        with pytest.raises(UsageError) as caught:
            run(made, tmp_path, tell=told.append)
        assert (caught.value.code, told) == (code, [])
        assert not (tmp_path / "out.work").exists()


def test_what_judges_must_be_there(tmp_path):
    write_data(tmp_path / "none.jsonl", "sums", valid=0)
    stages = [{"train": "experts", "steps": 1}]
    made = config(tmp_path, stages, experts=("sums",)).model_dump()
    for data, trainer, code in (
        ({"train": "none.jsonl"}, {"patience": 1}, "nothing-held-out"),
        ({"train": "none.jsonl", "valid": "test.jsonl"}, {}, "data-empty"),
    ):
        write_data(tmp_path / "test.jsonl", "sums", count=2, valid=0, split="test")
        made["experts"]["sums"]["data"] = data
        with pytest.raises(LmoeError) as caught:
            run(TrainConfig.model_validate(made | {"trainer": trainer}), tmp_path, force=True)
        assert caught.value.code == code


def test_data_of_later_runs_is_read_before_the_first_begins(tmp_path):
    made = config(tmp_path, EXPERTS, experts=("sums", "words"))
    with (tmp_path / "words.jsonl").open("a") as file:
        file.write("no json\n")
    told = []
    with pytest.raises(LmoeError) as caught:
        run(made, tmp_path, tell=told.append)
    assert (caught.value.code, told) == ("data-invalid", [])
    assert "words.jsonl:25" in str(caught.value)
    assert not (tmp_path / "out.work").exists()


def test_one_of_several_devices_cannot_be_asked_for(tmp_path, monkeypatch):
    """transformers takes the first that it sees."""
    monkeypatch.setattr(training, "choose_device", torch.device)
    with pytest.raises(UsageError) as caught:
        training.train(Order(config(tmp_path, EXPERTS), tmp_path, tmp_path / "out", device="cuda:1"), lambda _: None)
    assert caught.value.code == "device-index"
    assert "CUDA_VISIBLE_DEVICES=1" in caught.value.hint


def test_a_folder_with_a_state_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "state.json").write_text('{"mine": 1}')
    with pytest.raises(UsageError) as caught:
        run(config(tmp_path, EXPERTS), tmp_path)
    assert caught.value.code == "output-not-ours"
    assert (tmp_path / "out.work" / "state.json").exists()


def test_examples_are_not_packed_on_a_base_that_would_mix_them(tmp_path):
    """OPT counts its positions by itself. See `test_packing_…` for one that keeps examples apart."""
    stages = [{"train": "experts", "steps": 1}]
    made = config(tmp_path, stages, experts=("sums",), arch="opt", trainer={"packing": True})
    with pytest.raises(UsageError) as caught:
        run(made, tmp_path)
    assert caught.value.code == "packing-leaks"


def test_a_gate_that_sends_all_to_one_expert_has_collapsed(tmp_path):
    """With equal scores a hard gate takes the first expert, however even its softmax is; the run has one step."""
    begun = run(config(tmp_path, [{"train": "experts", "steps": 1, "together": True}]), tmp_path, "begun")
    stages = [{"train": "gate", "steps": 1, "balance": 0}]
    told = []
    run(config(tmp_path, stages, gate={"activation": "hard1"}, earlier=begun), tmp_path, tell=told.append)
    assert [event["code"] for event in told if "warning" in event] == ["routing-collapsed"]
    assert next(event for event in told if "load" in event)["load"] == {"sums": 1, "words": 0, "names": 0}


def test_a_collapse_is_told_once_and_not_before_a_run_has_settled(tmp_path):
    told = []
    log = Log(tmp_path / "log.jsonl", told.append, "a run", after=0, experts=("a", "b", "c"))
    for step, effective in ((5, 1.1), (25, 2.2), (30, 1.4), (31, 1.3)):
        log.tell({"step": step, "loss": 1.0, "effective": effective})
    assert [event["code"] for event in told if "warning" in event] == ["routing-collapsed"]
    warning = next(event["warning"] for event in told if "warning" in event)
    assert "1.40 of 3 experts" in warning
    assert "balance" in warning


def test_the_config_on_the_page_is_one(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    whole = [block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "stages:" in block]
    assert whole
    for block in whole:
        (tmp_path / "train.yaml").write_text(block)
        read_config(tmp_path / "train.yaml")
