"""Training computes what a plain loop computes, and what comes out runs in PEFT and in a recipe."""

from __future__ import annotations

import json
import math
from collections import Counter

import peft
import pytest
import tiny
import torch
from safetensors.torch import load_file
from train.made import base, bytes_of, config, run, write_data
from transformers.models.llama.modeling_llama import LlamaMLP

from lmoe_cli.engine.build import load
from lmoe_cli.train.config import TrainConfig
from lmoe_cli.train.loop import Loop
from lmoe_cli.train.spool import IGNORED

EXPERTS = [{"train": "experts", "steps": 4, "together": True}]
GATE = {"activation": "topk", "top_k": 2}
ALL = [*EXPERTS, {"train": "gate", "steps": 3}, {"train": "joint", "steps": 3}]


def losses(events, run_name=None):
    return [event["loss"] for event in events if "loss" in event and run_name in (None, event["run"])]


def test_what_comes_out_is_a_recipe_that_runs_and_adapters_that_peft_loads(tmp_path):
    out = run(config(tmp_path, ALL, gate=GATE), tmp_path)
    engine = load(out / "recipe.yaml", device="cpu", dtype="float32")
    assert engine.router.settings.type == "gate"
    with engine.router.watched() as seen:
        engine.logits(tiny.tokens())
    assert all((gates != 0).sum(-1).eq(2).all() for one in seen.values() for gates in one)
    for name in ("sums", "words", "names"):
        with torch.no_grad():
            theirs = tiny.peft_model(base(), out / "experts" / name)(tiny.tokens()).logits
        from lmoe_cli.loadout.recipe import Recipe

        experts = {name: {"adapter": str(out / "experts" / name)}}
        ours = load(Recipe.model_validate({"base": str(base()), "experts": experts}), device="cpu", dtype="float32")
        torch.testing.assert_close(ours.logits(tiny.tokens()), theirs, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert not torch.allclose(theirs, tiny.load(base())(tiny.tokens()).logits, atol=1e-4)
    report = json.loads((out / "train-report.json").read_text())
    assert list(report["runs"]) == ["stage-1-experts", "stage-2-gate", "stage-3-joint"]
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sum("loss" in step for step in steps) == 10


def test_a_log_for_tensorboard_needs_its_extra(tmp_path, monkeypatch):
    from lmoe_cli.errors import UsageError
    from lmoe_cli.train import stage

    monkeypatch.setattr(stage, "find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        run(config(tmp_path, EXPERTS, trainer={"tensorboard": True}), tmp_path)
    assert caught.value.code == "extra-missing"


def batches_of(made, folder, expert, count, tell=lambda event: None):
    """The batches that a run of one expert sees, as its loop collates them."""
    seen = []
    from lmoe_cli.train.trainee import Trainee

    forward = Trainee.forward

    def watched(self, **words):
        if self.training:
            seen.append({name: value.clone() for name, value in words.items()})
        return forward(self, **words)

    Trainee.forward = watched
    try:
        run(made, folder, f"watched-{expert}", tell)
    finally:
        Trainee.forward = forward
    return seen[:count]


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_one_expert_is_trained_as_peft_trains_it(tmp_path, strength):
    stages = [{"train": "experts", "steps": 5, "schedule": "constant", "warmup": 0, "clip": 0}]
    made = config(tmp_path, stages, experts=("sums",))
    entry = {"rank": 2, "rslora": strength != 1, "data": {"train": "sums.jsonl", "strength": strength}}
    made = TrainConfig.model_validate({**made.model_dump(), "experts": {"sums": entry}})
    seen = batches_of(made, tmp_path, "sums", 5)
    begun = tmp_path / "begun"
    begun.mkdir()
    trained = load_file(tmp_path / "watched-sums" / "experts" / "sums" / "adapter_model.safetensors")
    from lmoe_cli.loadout.base import read_base
    from lmoe_cli.source import open_source
    from lmoe_cli.train.fresh import write_fresh

    write_fresh(begun, read_base(open_source(str(base()))), made.experts["sums"], seed=0)
    model = peft.PeftModel.from_pretrained(tiny.load(base()), begun, is_trainable=True)
    model.train()
    for layer in (module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)):
        assert layer.scaling["default"] == 4 / (2 if strength == 1 else math.sqrt(2))
        layer.scaling["default"] *= strength
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=1e-2, weight_decay=0.0)
    for batch in seen:
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    theirs = peft.get_peft_model_state_dict(model)
    assert theirs.keys() == trained.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def test_experts_trained_together_are_those_trained_one_by_one_on_the_same_rows(tmp_path):
    """Every row meets its own expert alone, so their gradients do not mix."""
    stages = [{"train": "experts", "steps": 1, "schedule": "constant", "warmup": 0, "clip": 0, "together": True}]
    trainer = {"batch_size": 100, "learning_rate": 1e-2}
    together = run(config(tmp_path, stages, trainer=trainer), tmp_path, "together")
    alone = run(config(tmp_path, [{**stages[0], "together": False}], trainer=trainer), tmp_path, "alone")
    for name in ("sums", "words", "names"):
        found, due = (load_file(out / "experts" / name / "adapter_model.safetensors") for out in (together, alone))
        for key, tensor in due.items():  # AdamW's first step is the sign of the gradient, whatever its scale
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-4)


def test_experts_on_the_head_are_trained_together_as_one_by_one(tmp_path):
    """Gates of every token need a head that sees every token."""
    begun = {}
    for seed, topic in enumerate(("sums", "words")):
        made = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
        torch.manual_seed(seed)
        begin = peft.get_peft_model(tiny.load(base()), made)
        begin.save_pretrained(tmp_path / "begun" / topic, save_embedding_layers=False)
        write_data(tmp_path / f"{topic}.jsonl", topic)
        begun[topic] = {"adapter": str(tmp_path / "begun" / topic), "data": f"{topic}.jsonl"}
    stages = [{"train": "experts", "steps": 1, "schedule": "constant", "warmup": 0, "clip": 0, "together": True}]
    trainer = {"batch_size": 100, "learning_rate": 1e-2}
    found = []
    for name, stage in (("together", stages[0]), ("alone", {**stages[0], "together": False})):
        made = config(tmp_path, [stage], experts=("sums", "words"), trainer=trainer)
        made = TrainConfig.model_validate({**made.model_dump(), "experts": begun})
        found.append(run(made, tmp_path, name))
    for topic in begun:
        one, other = (load_file(out / "experts" / topic / "adapter_model.safetensors") for out in found)
        assert any("lm_head" in key for key in one)
        for key, tensor in other.items():
            torch.testing.assert_close(one[key], tensor, rtol=1e-3, atol=2e-4)


def test_data_of_several_strengths_are_parts_of_one_loss(tmp_path):
    """Whole and half of the weight in one batch: its loss is that of both parts, each computed by PEFT on its own."""
    begun = run(config(tmp_path, [{"train": "experts", "steps": 4}], experts=("sums",)), tmp_path, "begun")
    write_data(tmp_path / "more.jsonl", "words")
    parts = [{"train": "sums.jsonl"}, {"train": ["more.jsonl"], "strength": 0.5}]
    made = config(tmp_path, [{"train": "experts", "steps": 1, "batch_size": 100}], experts=("sums",)).model_dump()
    made["experts"]["sums"] = {"adapter": str(begun / "experts" / "sums"), "data": parts}
    told: list = []
    seen = batches_of(TrainConfig.model_validate(made), tmp_path, "sums", 1, told.append)
    due, count = 0.0, 0
    for strength in (1.0, 0.5):
        model = tiny.peft_model(base(), begun / "experts" / "sums")
        for layer in (module for module in model.modules() if isinstance(module, peft.tuners.lora.LoraLayer)):
            layer.scaling["default"] *= strength
        own = {key: value[seen[0]["strengths"][:, 0] == strength] for key, value in seen[0].items()}
        with torch.no_grad():
            logits = model(input_ids=own["input_ids"], attention_mask=own["attention_mask"]).logits[:, :-1]
        labels = own["labels"][:, 1:]
        due += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels != IGNORED).sum())
    assert losses(told)[0] == pytest.approx(due / count, rel=1e-5)
    assert [len(event["eval"]) for event in told if "eval" in event] == [2]  # both parts are of one expert


@pytest.mark.parametrize("packing", [False, True])
def test_data_that_repeats_is_a_file_with_each_line_several_times(tmp_path, packing):
    """What is held out is judged once."""
    write_data(tmp_path / "words.jsonl", "words")
    lines = write_data(tmp_path / "sums.jsonl", "sums").read_text().splitlines()
    often = [line for line in lines for _ in range(1 if "valid" in line else 3)]
    (tmp_path / "often.jsonl").write_text("\n".join(often) + "\n")
    made = config(tmp_path, [{"train": "experts", "epochs": 1}], experts=("sums",), trainer={"packing": packing})
    found, told = [], list[list]()
    for part in ({"train": "sums.jsonl", "repeat": 3}, {"train": "often.jsonl"}):
        entry = {"rank": 2, "data": [part, {"train": "words.jsonl"}]}
        told.append([])
        own = TrainConfig.model_validate({**made.model_dump(), "experts": {"sums": entry}})
        found.append(bytes_of(run(own, tmp_path, f"out-{len(found)}", told[-1].append)))
    assert found[0] == found[1]
    assert losses(told[0]) == losses(told[1])
    if not packing:
        assert len(losses(told[0])) == (3 * 18 + 18) / 4


def test_a_fresh_expert_changes_nothing_and_begins_as_written(tmp_path):
    stages = [{"train": "experts", "steps": 1}]
    made = config(tmp_path, stages, experts=("sums",), trainer={"learning_rate": 1e-12})
    out = run(made, tmp_path)
    stored = load_file(out / "experts" / "sums" / "adapter_model.safetensors")
    a = torch.cat([tensor.flatten() for name, tensor in stored.items() if "lora_A" in name and tensor.shape[1] == 32])
    assert a.abs().max() <= 1 / math.sqrt(32) + 1e-6
    assert abs(a.std() - 1 / math.sqrt(3 * 32)) < 0.01
    assert all(tensor.abs().max() < 1e-10 for name, tensor in stored.items() if "lora_B" in name)


def test_experts_of_earlier_are_gone_on_with_as_they_are_stored(tmp_path):
    first = run(config(tmp_path, EXPERTS), tmp_path, "first")
    stages = [{"train": "gate", "steps": 2}]
    second = run(config(tmp_path, stages, gate=GATE, earlier=first), tmp_path, "second")
    assert not (second / "experts").exists()
    assert str(first / "experts" / "sums") in (second / "recipe.yaml").read_text()
    third = run(config(tmp_path, ALL[2:], gate=GATE, earlier=first), tmp_path, "third")
    assert (third / "experts" / "sums").is_dir()


def plain_joint(loadout_out, activation, batch):
    """Loss and gradients of a joint step by a plain loop over experts, from the files, in float64."""

    from lmoe_cli.loadout.loadout import resolve
    from lmoe_cli.loadout.parse import read_recipe

    loadout = resolve(read_recipe(loadout_out / "recipe.yaml"), "a test", beside=loadout_out)
    gate = {
        name: tensor.double().requires_grad_()
        for name, tensor in load_file(loadout_out / "router" / "router.safetensors").items()
    }
    model = tiny.load(base()).double()
    leaves = {}
    groups = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    aux = []
    for name in loadout.recipe.experts:
        for key, tensor in load_file(loadout_out / "experts" / name / "adapter_model.safetensors").items():
            leaves[name, key] = tensor.double().requires_grad_()
    modules = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for _, key in leaves if "lora_A" in key
    }
    seen = {}

    for module in modules:
        parent, _, leaf = module.rpartition(".")
        place = f"{parent}.{groups.get(leaf, leaf)}"

        def add(layer, inputs, output, module=module, place=place):
            x = inputs[0]
            scores = (x / x.pow(2).mean(-1, keepdim=True).add(1.2e-7).sqrt()) @ gate[f"{place}.weight"].T + gate[
                f"{place}.bias"
            ]
            seen[place] = scores
            gates = torch.softmax(scores, -1)
            if activation == "sigmoid":
                gates = torch.sigmoid(scores)
            elif activation == "topk":
                kept = scores >= scores.topk(2, -1).values[..., -1:]
                gates = torch.softmax(scores.masked_fill(~kept, -torch.inf), -1)
            elif activation == "hard1":
                gates = gates + (torch.eye(3)[scores.argmax(-1)] - gates).detach()
            for number, name in enumerate(loadout.recipe.experts):
                a = leaves[name, f"base_model.model.{module}.lora_A.weight"]
                b = leaves[name, f"base_model.model.{module}.lora_B.weight"]
                output = output + gates[..., number, None] * 2.0 * (x @ a.T @ b.T)
            return output

        model.get_submodule(module).register_forward_hook(add)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED
    )
    learned = batch["labels"] != IGNORED
    for scores in seen.values():
        own = scores[learned]
        shares = torch.softmax(own, -1)
        if activation == "sigmoid":
            shares = torch.sigmoid(own) / torch.sigmoid(own).sum(-1, keepdim=True)
        kept = own >= own.topk(2 if activation == "topk" else 1, -1).values[:, -1:]
        load_ = (kept.double() / kept.sum(-1, keepdim=True)).mean(0)
        aux.append(0.3 * 3 * (load_ * shares.mean(0)).sum() + 0.2 * (torch.logsumexp(own, -1) ** 2).mean())
    total = loss + torch.stack(aux).mean()
    total.backward()
    return float(loss), {
        **{f"gate {name}": own.grad for name, own in gate.items()},
        **{f"{name} {key}": own.grad for (name, key), own in leaves.items()},
    }


@pytest.mark.parametrize("activation", ["softmax", "topk", "sigmoid", "hard1"])
def test_gradients_of_a_joint_step_are_those_of_a_plain_loop_over_experts(tmp_path, activation):
    """Read off the first step of plain gradient descent."""
    gate = {"activation": activation, "init": "arrow"}
    begun = run(config(tmp_path, [*EXPERTS, {"train": "gate", "steps": 2}], gate=gate), tmp_path, "begun")
    stages = [{"train": "joint", "steps": 1, "balance": 0.3, "z": 0.2, "schedule": "constant", "warmup": 0, "clip": 0}]
    made = config(tmp_path, stages, gate=gate, earlier=begun, trainer={"batch_size": 8})
    found = {}
    from lmoe_cli.source import open_source
    from lmoe_cli.train import training
    from lmoe_cli.train.loop import Loop
    from lmoe_cli.train.training import read_gate as read

    step = Loop.training_step

    def watched(self, model, inputs, items=None):
        result = step(self, model, inputs, items)
        found["batch"] = {name: value.clone() for name, value in inputs.items()}
        found["grads"] = {name: own.grad.clone() for name, own in self._trainee.trained.items()}
        found["loss"] = float(self._pending[-1][0].nats / items)
        found["sites"] = self._trainee
        return result

    assemble = training.assemble

    def with_the_gate(loadout, run_, config_, device, trained, **words):
        assembly = assemble(loadout, run_, config_, device, read(open_source(str(begun / "router"))), **words)
        found["assembly"] = assembly
        return assembly

    Loop.training_step, training.assemble = watched, with_the_gate
    try:
        run(made, tmp_path, "joint")
    finally:
        Loop.training_step, training.assemble = step, assemble
    loss, due = plain_joint(begun, activation, found["batch"])
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assembly, names = found["assembly"], ["sums", "words", "names"]
    compared = 0
    for place in assembly.gates:
        key = place.replace(".", "/")
        for leaf in ("weight", "bias"):
            torch.testing.assert_close(
                found["grads"][f"gates.{key}.{leaf}"].double(), due[f"gate {place}.{leaf}"], rtol=1e-3, atol=1e-5
            )
            compared += 1
    for site in assembly.sites:
        a = found["grads"][f"factors.{(site.names[0] + '.a').replace('.', '/')}"]
        for number, name in enumerate(names):
            for module, member in zip(site.names, site.shared.members, strict=True):
                piece = member.pieces[number][0]
                b = found["grads"][f"factors.{(module + '.b').replace('.', '/')}"]
                for own, key in ((a[piece.rows], "A"), (b[piece.columns].T, "B")):
                    expected = due[f"{name} base_model.model.{module}.lora_{key}.weight"]
                    torch.testing.assert_close(own.double(), expected, rtol=1e-3, atol=1e-5)
                    compared += 1
    assert compared > 90


class Work(Counter):
    def take(self):
        """What was counted since it was last asked."""
        found = Counter(self)
        self.clear()
        return found


@pytest.fixture
def work(monkeypatch):
    """What training computes: how often a block, and of how many rows."""
    counts = Work()
    block, step = LlamaMLP.forward, Loop.training_step

    def counted(self, *args, **words):
        counts["blocks"] += torch.is_grad_enabled()
        return block(self, *args, **words)

    def watched(self, model, inputs, *words):
        counts["rows"] += len(inputs["input_ids"])
        return step(self, model, inputs, *words)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    monkeypatch.setattr(Loop, "training_step", watched)
    return counts


@pytest.mark.parametrize(
    ("share", "activation"), [("block", "softmax"), ("block", "topk"), ("block", "hard1"), ("model", "topk")]
)
def test_recomputing_changes_nothing_of_a_gate_either(tmp_path, work, share, activation):
    gate = {"activation": activation, "share": share, "init": "arrow"}
    stages = [EXPERTS[0], {"train": "joint", "steps": 1, "balance": 0.3}]
    plain, other = [], []
    run(config(tmp_path, stages, gate=gate), tmp_path, "plain", plain.append)
    computed = work.take()["blocks"]
    run(config(tmp_path, stages, gate=gate, trainer={"checkpointing": True}), tmp_path, "other", other.append)
    assert work.take()["blocks"] == 2 * computed
    assert losses(other) == pytest.approx(losses(plain), rel=1e-5)
    found, due = (load_file(tmp_path / out / "router" / "router.safetensors") for out in ("other", "plain"))
    for key, tensor in due.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("words", [{"packing": True}, {"checkpointing": True}, {"accumulate": 2, "batch_size": 4}])
def test_packing_recomputing_and_accumulating_change_nothing_but_the_cost(tmp_path, work, words):
    stages = [{"train": "experts", "steps": 1, "together": True, "clip": 0}]
    plain = []
    run(config(tmp_path, stages, trainer={"batch_size": 100}), tmp_path, "plain", plain.append)
    usual = work.take()
    other = []
    wide = {"batch_size": 100} | words
    if "accumulate" in words:
        wide = {"batch_size": 27, "accumulate": 2}  # 54 rows
    run(config(tmp_path, stages, trainer=wide), tmp_path, "other", other.append)
    cost = work.take()
    assert cost["blocks"] == usual["blocks"] * (1 if "packing" in words else 2)
    assert (cost["rows"] < usual["rows"]) == ("packing" in words)
    assert losses(other)[0] == pytest.approx(losses(plain)[0], rel=1e-5)
    for name in ("sums", "names"):
        found, due = (
            load_file(tmp_path / out / "experts" / name / "adapter_model.safetensors") for out in ("other", "plain")
        )
        for key, tensor in due.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-3, atol=2e-4)


def test_conv1d_bases_are_trained_too(tmp_path):
    made = config(tmp_path, [{"train": "experts", "steps": 2}], experts=("sums",), arch="gpt2")
    out = run(made, tmp_path)
    with torch.no_grad():
        theirs = tiny.peft_model(base("gpt2"), out / "experts" / "sums")(tiny.tokens()).logits
    assert torch.isfinite(theirs).all()
    assert json.loads((out / "experts" / "sums" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    stages = [{**EXPERTS[0], "steps": 2}, {"train": "joint", "steps": 2}]
    first, second = (bytes_of(run(config(tmp_path, stages, gate=GATE), tmp_path, name)) for name in ("one", "two"))
    assert first == second
    other = bytes_of(run(config(tmp_path, stages, gate=GATE, trainer={"seed": 1}), tmp_path, "three"))
    assert other["experts/sums/adapter_model.safetensors"] != first["experts/sums/adapter_model.safetensors"]
