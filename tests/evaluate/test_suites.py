"""Tasks of lm-eval run under the weights of each variant. The library itself is asked where it is installed."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from evaluate.made import loadout, opened
from lmoe_cli.errors import NotFoundError, UsageError
from lmoe_cli.evaluate.suites import Suites
from lmoe_cli.evaluate.variants import plan

TASK = """\
task: lmoe_toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_target: gold
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture
def fake(monkeypatch):
    """As much of lm-eval as is used. A task's metric is the sum of the gates in force."""
    asked = []

    class Manager:
        def __init__(self, include_path=None):
            self.include_path = include_path

        def match_tasks(self, names):
            return [name for name in names if name == "toy"]

    class Model:
        def __init__(self, **words):
            self.words = words

    def simple_evaluate(model, tasks, **words):
        asked.append((model.words, words))
        sums = float(next(m.gates.values.sum() for m in model.words["pretrained"].modules() if hasattr(m, "gates")))
        return {
            "results": {
                task: {"acc,none": sums, "acc_stderr,none": 0.1, "sample_len": 3, "alias": task} for task in tasks
            }
        }

    top, models, tasks = (types.ModuleType(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks"))
    top.simple_evaluate, models.HFLM, tasks.TaskManager = simple_evaluate, Model, Manager
    for name, module in (
        ("lm_eval", top), ("lm_eval.models", types.ModuleType("lm_eval.models")),
        ("lm_eval.models.huggingface", models), ("lm_eval.tasks", tasks),
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, module)
    return asked


def test_every_variant_runs_under_its_own_weights(fake):
    found = loadout(one={"weight": 0.5}, two={"weight": 0.25})
    variants, stage = opened(found)
    told = Suites(["toy"]).run(stage, list(variants.values()), limit=3)
    assert {name: own["toy"]["acc"] for name, own in told.items()} == {
        "base": 0.0, "only one": 1.0, "only two": 1.0, "uniform": 1.0, "recipe": 0.75, "random": 0.75,
    }  # fmt: skip
    assert told["base"]["toy"] == {"acc": 0.0, "acc_stderr": 0.1}
    words, more = fake[0]
    assert (words["max_length"], more["limit"]) == (stage.engine.context, 3)


def test_a_task_that_does_not_exist_is_refused(fake):
    with pytest.raises(NotFoundError) as caught:
        Suites(["toy", "riddles"])
    assert caught.value.code == "task-unknown"
    assert "riddles" in caught.value.message


def test_a_router_per_prompt_is_refused(fake):
    found = loadout(router={"type": "encoder"}, one={"examples": ["x"]}, two={"examples": ["y"]})
    with pytest.raises(UsageError) as caught:
        Suites(["toy"]).run(None, plan(found))
    assert caught.value.code == "router-dynamic"


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError) as caught:
        Suites(["toy"])
    assert (caught.value.code, caught.value.hint) == ("extra-missing", "pip install 'lmoe-cli[eval]'")


def test_lm_eval_itself_counts_what_the_logits_say(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval brings 600 MB: pip install 'lmoe-cli[eval]'")
    rows = [{"q": "ab", "choices": ["c", "d"], "gold": 0}, {"q": "b", "choices": ["x", "y"], "gold": 1}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "toy.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    variants, stage = opened(loadout(one="lora"))
    told = Suites(["lmoe_toy"], tmp_path).run(stage, list(variants.values()))
    for name in ("base", "only one"):
        engine = stage.take(variants[name])
        right = 0
        for row in rows:
            logits = engine.logits(torch.tensor([engine.tokenizer(row["q"])["input_ids"]]))[0, -1]
            first, second = (logits[engine.tokenizer(choice)["input_ids"][0]] for choice in row["choices"])
            right += bool(second > first) == bool(row["gold"])
        assert told[name]["lmoe_toy"]["acc"] == right / 2
