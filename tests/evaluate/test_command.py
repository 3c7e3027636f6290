"""`lmoe eval` as a script would call it: exit codes, JSON, the page it writes."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser

import click
import pytest
import tiny
from commands import lmoe
from data.made import said, written
from peft import LoraConfig, get_peft_model

from evaluate.made import TALKS, adapter, spoken_base
from lmoe_cli.cli.evaluate import evaluate
from lmoe_cli.evaluate import same_size
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.train import training
from lmoe_cli.train.config import TrainConfig

NUMBERS = {"nats_per_token", "bits_per_byte", "exact_match"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, adapters, recipes and data."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(spoken_base(), folder / "base")
    shutil.copytree(adapter(), folder / "one")
    shutil.copytree(adapter(seed=2, rank=5), folder / "two")
    experts = "base: ./base\nexperts:\n  one: {adapter: ./one, weight: 0.5}\n"
    (folder / "mix.yaml").write_text(experts + "  two: {adapter: ./two, weight: -0.3}\n")
    (folder / "worse.yaml").write_text(experts + "  two: {adapter: ./two, weight: 2.0}\n")
    (folder / "alone.yaml").write_text(experts)
    written(folder / "talk.jsonl", *TALKS)
    written(folder / "other.jsonl", said("so", "it goes"), {"text": "one, two, three"})
    written(folder / "one.jsonl", said("hi", "yes"))
    split = [{**talk, "split": "valid" if number < 2 else "train"} for number, talk in enumerate(TALKS)]
    written(folder / "split.jsonl", *split)
    (folder / "empty.jsonl").write_text("\n")
    return folder


def told(*words, cwd, code=0):
    done = lmoe("eval", *words, "--device", "cpu", "--json", cwd=cwd)
    assert done.returncode == code, done.stderr
    found = json.loads(done.stdout)
    assert (found["schema"], found["ok"]) == ("lmoe.eval/1", code == 0)
    return found["data"], found["findings"]


def test_the_document_has_the_keys_that_scripts_rely_on(place, tmp_path):
    page = tmp_path / "page.html"
    data, findings = told(
        "mix.yaml", "--data", "talk=talk.jsonl", "--data", "other.jsonl", "--without", "two", "--generate",
        "--html", page, cwd=place,
    )  # fmt: skip
    assert set(data) == {
        "recipe", "name", "base", "router", "experts", "domains", "variants", "without", "oracle", "retrained",
        "tasks", "baseline", "settings", "html",
    }  # fmt: skip
    assert list(data["domains"]) == ["talk", "other"]
    assert set(data["domains"]["talk"]) == {
        "file", "sha256", "split", "records", "tokens", "judged_tokens", "judged_bytes", "truncated", "left_out",
    }  # fmt: skip
    names = ["base", "only one", "only two", "uniform", "recipe", "without two", "random", "oracle"]
    assert [variant["name"] for variant in data["variants"]] == names
    for variant in data["variants"]:
        assert set(variant) == {"name", "kind", "expert", "weights", "domains", "mean"}
        for numbers in (*variant["domains"].values(), variant["mean"]):
            assert set(numbers) - {"chosen"} == NUMBERS | {"difference"}
            assert set(numbers["difference"]) == NUMBERS
            assert set(numbers["difference"]["nats_per_token"]) == {"value", "low", "high"}
    _check_numbers({variant["name"]: variant for variant in data["variants"]}, data)
    assert findings == []
    _check_changes(data)
    _check_page(page.read_text(), names)


def _check_numbers(found, data):
    """What must hold between numbers, whatever they are."""
    recipe = found["recipe"]
    for variant in found.values():
        nats = [variant["domains"][domain]["nats_per_token"] for domain in ("talk", "other")]
        assert variant["mean"]["nats_per_token"] == pytest.approx(sum(nats) / 2)
        for domain, numbers in variant["domains"].items():
            facts = data["domains"][domain]
            bits = numbers["nats_per_token"] * facts["judged_tokens"] / 0.6931471805599453 / facts["judged_bytes"]
            assert numbers["bits_per_byte"] == pytest.approx(bits)
            own = numbers["nats_per_token"] - recipe["domains"][domain]["nats_per_token"]
            assert numbers["difference"]["nats_per_token"]["value"] == pytest.approx(own)
            assert numbers["difference"]["nats_per_token"]["low"] <= own + 1e-9
            assert own <= numbers["difference"]["nats_per_token"]["high"] + 1e-9
    for domain in ("talk", "other"):
        single = {name: found[f"only {name}"]["domains"][domain]["nats_per_token"] for name in ("one", "two")}
        oracle = found["oracle"]["domains"][domain]
        assert oracle["nats_per_token"] == min(single.values())
        assert oracle["chosen"] == data["oracle"]["chosen"][domain] == f"only {min(single, key=single.get)}"


def _check_changes(data):
    """The mean change of tokens is how much worse it is without the expert."""
    (without,) = (variant for variant in data["variants"] if variant["kind"] == "without")
    assert list(data["without"]) == ["two"]
    for domain, told in data["without"]["two"].items():
        assert set(told) == {"tokens", "mean_change", "total_change", "likelier", "less_likely", "largest"}
        assert told["tokens"] == data["domains"][domain]["judged_tokens"]
        worse_by = without["domains"][domain]["difference"]["nats_per_token"]["value"]
        assert told["mean_change"] == pytest.approx(worse_by, abs=2e-5)
        keys = {"where", "before", "text", "logprob", "logprob_without", "change"}
        assert all(set(token) == keys for token in told["largest"])


def _check_page(text, names):
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append(tag)
            assert tag not in ("script", "link", "img", "iframe")
            assert not {"src", "href"} & dict(attrs).keys()

    Reader().feed(text)
    assert seen.count("table") == 6  # domains, nats, bits, exact match, changes by domain and of tokens
    assert all(f"<th>{name}</th>" in text for name in names)


def test_a_worse_recipe_ends_with_1_beside_its_baseline_and_an_equal_one_with_0(place, tmp_path):
    done = lmoe("eval", "mix.yaml", "--data", "talk.jsonl", "--device", "cpu", "--json", cwd=place)
    (tmp_path / "before.json").write_text(done.stdout)
    words = ("--data", "talk.jsonl", "--baseline", tmp_path / "before.json")
    data, _ = told("mix.yaml", *words, "--max-regression", "0", cwd=place)
    assert data["baseline"]["regressed"] is False
    assert data["baseline"]["domains"]["talk"]["worse_by"] == 0
    data, findings = told("worse.yaml", *words, cwd=place, code=1)
    assert data["baseline"]["regressed"] is True
    worse = data["baseline"]["domains"]["talk"]
    assert worse["worse_by"] == pytest.approx(worse["now"] - worse["before"])
    assert worse["worse_by"] > 0.01
    assert {item["code"] for item in findings} == {"eval-regressed"}
    told("worse.yaml", *words, "--max-regression", worse["worse_by"] + 0.01, cwd=place)


@pytest.mark.parametrize(
    ("words", "code", "name"),
    [
        (("mix.yaml",), 2, "usage"),
        (("mix.yaml", "--data", "a=talk.jsonl", "--data", "a=other.jsonl"), 2, "usage"),
        (("mix.yaml", "--data", "mean=talk.jsonl"), 2, "usage"),
        (("mix.yaml", "--data", "talk="), 2, "usage"),
        (("mix.yaml", "--data", "none.jsonl"), 3, "not-found"),
        (("mix.yaml", "--data", "empty.jsonl"), 2, "data-empty"),
        (("mix.yaml", "--data", "mix.yaml"), 2, "data-invalid"),
        (("mix.yaml", "--data", "talk.jsonl", "--split", "valid"), 2, "data-empty"),
        (("mix.yaml", "--data", "talk.jsonl", "--without", "three"), 3, "expert-unknown"),
        (("mix.yaml", "--data", "talk.jsonl", "--max-regression", "0.1"), 2, "usage"),
        (("mix.yaml", "--data", "talk.jsonl", "--retrain-epochs", "2"), 2, "usage"),
        (("mix.yaml", "--data", "talk.jsonl", "--baseline", "talk.jsonl"), 2, "json-invalid"),
        (("mix.yaml", "--data", "talk.jsonl", "--baseline", "base/config.json"), 2, "baseline-invalid"),
        (("mix.yaml", "--data", "talk.jsonl", "--select", "b=other.jsonl"), 2, "usage"),
        (("mix.yaml", "--data", "talk.jsonl", "--retrain", "talk.jsonl"), 2, "usage"),
        (("mix.yaml", "--data", "talk.jsonl", "--html", "talk.jsonl"), 2, "output-exists"),
        (("mix.yaml", "--data", "talk.jsonl", "--too-long", "error", "--max-tokens", "5"), 2, "data-too-long"),
        (("mix.yaml", "--data", "talk.jsonl", "--max-tokens", "2"), 0, None),
        (("mix.yaml", "--data", "talk.jsonl", "--max-tokens", "2", "--too-long", "skip"), 2, "data-empty"),
    ],
)
def test_what_cannot_be_judged_is_refused_by_name(place, words, code, name):
    done = lmoe("eval", *words, "--device", "cpu", "--json", cwd=place)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    found = json.loads(done.stdout)
    if code:
        assert [item["code"] for item in found["findings"]] == [name]
        assert found["findings"][0]["hint"]


def test_a_name_that_is_wrong_is_told_before_anything_is_trained(place):
    done = lmoe("eval", "mix.yaml", "--data", "talk.jsonl", "--retrain", "other.jsonl", "--without", "x", cwd=place)
    assert done.returncode == 3
    assert "--without x" in done.stderr
    assert "training" not in done.stderr


def test_a_baseline_of_other_data_is_refused_before_anything_is_loaded(place, tmp_path):
    done = lmoe("eval", "alone.yaml", "--data", "talk.jsonl", "--device", "cpu", "--json", cwd=place)
    (tmp_path / "before.json").write_text(done.stdout)
    for words in (("--data", "talk=other.jsonl"), ("--data", "other.jsonl"), ("--data", "talk.jsonl", "--limit", "2")):
        data, findings = told("alone.yaml", *words, "--baseline", tmp_path / "before.json", cwd=place, code=2)
        assert (data, [item["code"] for item in findings]) == (None, ["baseline-differs"])


def test_one_record_has_numbers_and_no_interval_and_says_so(place):
    data, findings = told("alone.yaml", "--data", "one.jsonl", "--data", "talk.jsonl", cwd=place)
    assert [variant["name"] for variant in data["variants"]] == ["base", "only one", "recipe", "random", "oracle"]
    base = data["variants"][0]
    for numbers in (base["domains"]["one"], base["mean"]):
        assert numbers["difference"]["nats_per_token"]["value"] != 0
        assert numbers["difference"]["nats_per_token"]["low"] is None
    assert base["domains"]["talk"]["difference"]["nats_per_token"]["low"] is not None
    assert [item["code"] for item in findings] == ["interval-missing"]


def test_only_what_is_held_out_is_judged_where_lines_say_so(place):
    data, _ = told("alone.yaml", "--data", "split.jsonl", "--no-random", cwd=place)
    assert (data["domains"]["split"]["split"], data["domains"]["split"]["records"]) == ("valid", 2)
    data, _ = told("alone.yaml", "--data", "split.jsonl", "--no-random", "--split", "all", cwd=place)
    assert data["domains"]["split"]["records"] == 5


def test_the_best_single_expert_may_be_chosen_on_other_data(place):
    data, _ = told("mix.yaml", "--data", "a=talk.jsonl", "--select", "a=other.jsonl", cwd=place)
    assert data["oracle"]["on"]["a"]["records"] == 2
    other, _ = told("mix.yaml", "--data", "a=other.jsonl", cwd=place)
    assert data["oracle"]["chosen"] == other["oracle"]["chosen"]
    assert other["oracle"]["on"] == "the same data"


def test_what_was_cut_off_is_told(place):
    data, findings = told("alone.yaml", "--data", "talk.jsonl", "--max-tokens", "12", cwd=place)
    assert data["domains"]["talk"]["truncated"] > 0
    assert [item["code"] for item in findings] == ["data-cut"]


def test_one_adapter_of_the_same_size_is_trained_on_what_is_not_judged(place):
    data, _ = told(
        "mix.yaml", "--data", "split.jsonl", "--retrain", "split.jsonl", "--retrain-epochs", "1", "--no-random",
        cwd=place,
    )  # fmt: skip
    trained = data["retrained"]
    # Ranks 4 and 5 on the same modules.
    assert (trained["rank"], trained["parameters"]) == (9, trained["parameters_of_experts"])
    last = {variant["name"]: variant for variant in data["variants"]}["retrained"]
    assert (last["kind"], last["weights"]) == ("other", {"retrained": 1.0})
    base = data["variants"][0]["domains"]["split"]["nats_per_token"]
    assert last["domains"]["split"]["nats_per_token"] != base
    assert not list(place.glob("*.work"))


@pytest.mark.parametrize("most", [4, 2])
def test_it_is_trained_where_the_experts_act_and_another_size_is_told(place, tmp_path, monkeypatch, most):
    words = {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1], "init_lora_weights": False}
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **words)
    get_peft_model(tiny.load(place / "base"), config).save_pretrained(tmp_path / "upper")
    monkeypatch.setattr(same_size, "MAX_RANK", most)
    data, findings = told(
        "--base", "base", "--expert", f"upper={tmp_path / 'upper'}", "--data", "split.jsonl", "--no-random",
        "--retrain", "split.jsonl", "--retrain-epochs", "0.1", cwd=place,
    )  # fmt: skip
    trained = data["retrained"]
    assert trained["targets"] == ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    assert trained["rank"] == most
    assert trained["parameters"] == trained["parameters_of_experts"] * most / 4
    assert [item["code"] for item in findings] == ([] if most == 4 else ["retrained-size"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("--retrain-epochs", "20000"), ("--seed", "3000000000"), ("--retrain-epochs", "nan"), ("--retrain-rate", "nan")],
)
def test_what_cannot_be_trained_with_is_refused_as_an_argument(place, option, value):
    words = ("mix.yaml", "--data", "split.jsonl", "--retrain", "split.jsonl", option, value)
    data, findings = told(*words, cwd=place, code=2)
    assert (data, [item["code"] for item in findings]) == (None, ["usage"])
    assert option in findings[0]["message"]


def test_all_that_the_options_take_can_be_trained_with():
    most = {option.name: option.type for option in evaluate.params if isinstance(option, click.Option)}
    TrainConfig.model_validate(
        {
            "base": "base",
            "experts": {"one": {"rank": same_size.MAX_RANK, "data": "data.jsonl"}},
            "stages": [{"train": "experts"}],
            "trainer": {
                "epochs": most["retrain_epochs"].max,
                "learning_rate": most["retrain_rate"].max,
                "seed": most["seed"].max - 1,
            },
        }
    )


def test_the_token_and_the_trust_in_the_base_s_code_are_for_the_retraining_too(place, monkeypatch):
    tokens = []

    def trains(order, tell):
        tokens.append(order.token)
        assert order.trust_remote_code
        order.out.mkdir()
        (order.out / "recipe.yaml").write_text(
            f"base: {place / 'base'}\nexperts:\n  retrained: {{adapter: {place / 'one'}}}\n"
        )

    def resolves(*words, **settings):
        tokens.append(settings["token"])
        return resolve(*words, **settings)

    monkeypatch.setattr(training, "train", trains)
    monkeypatch.setattr("lmoe_cli.loadout.loadout.resolve", resolves)
    words = (
        "--data",
        "split.jsonl",
        "--retrain",
        "split.jsonl",
        "--no-random",
        "--token",
        "hf_x",
        "--trust-remote-code",
    )
    told("alone.yaml", *words, cwd=place)
    assert tokens == ["hf_x"] * 3


def test_texts_that_a_router_of_prompts_does_not_read_are_told(place):
    recipe = (place / "mix.yaml").read_text().replace("weight: 0.5", "weight: 0.5, examples: [hi]")
    recipe = recipe.replace("weight: -0.3", "weight: -0.3, examples: [one]") + "router: {type: encoder}\n"
    (place / "by-prompt.yaml").write_text(recipe)
    words = ("--data", "one.jsonl", "--data", "other.jsonl", "--no-random")
    _, findings = told("by-prompt.yaml", *words, cwd=place)
    unrouted = [item for item in findings if item["code"] == "eval-unrouted"]
    assert [item["message"].partition(":")[0] for item in unrouted] == ["other"]
    assert "1 texts" in unrouted[0]["message"]
    assert "eval-unrouted" not in [item["code"] for item in told("mix.yaml", *words, cwd=place)[1]]
