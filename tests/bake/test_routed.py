"""Fixed weights in the place of a router: the mean of its gates, site by site, and what is lost by that."""

from __future__ import annotations

import hashlib
import json

import pytest
import tiny
import torch
from click.testing import CliRunner
from laws.cases import assert_close, case
from router.made import NAMES, loadout_of, logits_by_hand, places_of, save_gate, settings
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import lmoe_cli
from lmoe_cli.bake import divergence
from lmoe_cli.bake.divergence import kl, measure
from lmoe_cli.bake.model import bake_model
from lmoe_cli.bake.routed import measure as mean_gates
from lmoe_cli.bake.routed import with_means
from lmoe_cli.bank.routed import Routing
from lmoe_cli.check import check
from lmoe_cli.cli.root import lmoe
from lmoe_cli.data.examples import Encoder
from lmoe_cli.data.records import read_records
from lmoe_cli.data.splits import of_split
from lmoe_cli.engine.build import start
from lmoe_cli.errors import LmoeError, UsageError
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.parse import read_recipe
from lmoe_cli.loadout.profile import weight_at
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.loadout.trained import GateSettings, fingerprint, weights_hash
from lmoe_cli.loadout.write import recipe_text
from lmoe_cli.router.store import write_gate

EXPERTS = {"warrior": "A goblin attacks.", "mage": "A rune glows.", "healer": "I am sick."}
ASKED = [
    "A goblin attacks.",
    "Open the gate.",
    "My friend is wounded.",
    "Cross the river.",
    "A wolf howls.",
    "I am cold.",
]


def recipe(router, **entries):
    experts = {
        name: {"adapter": f"demo:{name}", "examples": [text], **entries.get(name, {})} for name, text in EXPERTS.items()
    }
    return Recipe.model_validate({"base": "demo:adventurer", "experts": experts, "router": router})


def loadout(router, **entries):
    return resolve(recipe(router, **entries), "mix.yaml")


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "I think about it."}],
         "split": "valid" if number % 2 else "train"}
        for number, text in enumerate(ASKED)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def constant_gate(folder, bias):
    """A trained gate that says the same of every token, at every site."""
    plain = loadout({"type": "arrow"})
    places = {name: place.width for name, place in start(plain, device="cpu", dtype="float32").bank.places.items()}
    weights = {
        name: (torch.zeros(3, width), torch.tensor(bias) + 0.1 * i) for i, (name, width) in enumerate(places.items())
    }
    hashes = {expert.name: weights_hash(expert.adapter) for expert in plain.experts}
    folder.mkdir()
    base = (plain.base.ref, fingerprint(plain.base))
    write_gate(folder, weights, GateSettings(activation="sigmoid"), experts=hashes, base=base)
    return weights


def cases(engine, path, split):
    encoder = Encoder(engine.tokenizer, engine.context)
    return [(record, encoder.encode(record)) for record in of_split(read_records(path), split)]


def bake(tmp_path, written, *words):
    (tmp_path / "mix.yaml").write_text(recipe_text(written))
    words = ["bake", str(tmp_path / "mix.yaml"), "--out", str(tmp_path / "out"), *map(str, words), "--json"]
    return CliRunner().invoke(lmoe, words, catch_exceptions=False)


# -- refusals


@pytest.mark.parametrize("router", [{"type": "arrow"}, {"type": "encoder"}])
def test_a_router_that_decides_is_not_baked_as_if_its_weights_were_1(tmp_path, router):
    with pytest.raises(UsageError) as caught:
        bake(tmp_path, recipe(router))
    assert caught.value.code == "router-dynamic"
    assert "--mean-gates --data FILE" in caught.value.hint
    assert ("--prompt TEXT" in caught.value.hint) is (router["type"] == "encoder")
    with pytest.raises(UsageError) as caught:
        bake_model(loadout(router), tmp_path / "out")
    assert caught.value.code == "router-dynamic"
    engine = start(loadout(router), device="cpu")
    with pytest.raises(UsageError) as caught:
        engine.fold()
    assert caught.value.code == "router-dynamic"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("router", "words", "said"),
    [
        ({"type": "arrow"}, ["--mean-gates"], "go together"),
        ({"type": "arrow"}, ["--data", "data.jsonl"], "go together"),
        ({"type": "arrow"}, ["--prompt", "x"], "decides per token"),
        ({"type": "encoder"}, ["--prompt", "x", "--mean-gates", "--data", "data.jsonl"], "exclude each other"),
        ({"type": "weighted"}, ["--prompt", "x"], "has fixed weights"),
        ({"type": "weighted"}, ["--mean-gates", "--data", "data.jsonl"], "has fixed weights"),
        ({"type": "weighted"}, ["--save-recipe", "x.yaml"], "goes with"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, router, words, said):
    with pytest.raises(UsageError) as caught:
        bake(tmp_path, recipe(router), *words)
    assert said in caught.value.message


# -- mean gates


def test_mean_gates_of_a_router_that_never_changes_its_mind_are_its_gates_and_nothing_is_lost(tmp_path, data):
    weights = constant_gate(tmp_path / "gate", [0.3, -1.0, 0.0])
    engine = start(loadout({"type": "gate", "artefact": str(tmp_path / "gate")}), device="cpu", dtype="float32")
    means = mean_gates(engine, cases(engine, data, "train"))
    assert means.gates.keys() == weights.keys()
    for place, (_, bias) in weights.items():
        expected = torch.sigmoid(bias)
        assert torch.equal(torch.tensor(means.gates[place]), expected), place
    found = with_means(engine, means.gates)
    lost = measure(engine, found, cases(engine, data, "valid"))
    assert lost.nats["mean gates"] < 1e-9
    assert min(lost.nats["base"], lost.nats["uniform"], *lost.single.values()) > 1e-3
    ids = torch.tensor([engine.encode(ASKED[0])])
    assert_close(start(found, device="cpu", dtype="float32").logits(ids), engine.logits(ids))


def test_mean_gates_are_the_mean_over_tokens_at_each_site_times_weights_and_rules(tmp_path, data):
    rules = {"weight": [{"match": "layers.0", "value": 0.5}, {"match": "*", "value": 2.0}]}
    engine = start(loadout({"type": "arrow", "top_k": 2}, mage=rules, healer={"weight": 0.7}), dtype="float32")
    found = cases(engine, data, "train")
    seen = {}
    for _, example in found:
        with engine.router.watched() as watched:
            engine.logits(torch.tensor([example.tokens]))
        for place, gates in watched.items():
            seen.setdefault(place, []).append(gates[0][0])
    expected = {place: torch.cat(rows).mean(0) for place, rows in seen.items()}
    means = mean_gates(engine, found)
    assert means.tokens == sum(len(example.tokens) for _, example in found)
    for place, row in expected.items():
        torch.testing.assert_close(torch.tensor(means.gates[place]), row, rtol=1e-5, atol=1e-6)
    fixed = with_means(engine, means.gates)
    group = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    for number, expert in enumerate(fixed.experts):
        for module in expert.adapter.parts:
            parent, _, leaf = module.rpartition(".")
            place = next(
                name for name in (module, f"{parent}.{group.get(leaf)}", f"{parent}.k_proj") if name in expected
            )
            own = expected[place][number] * ((0.5 if ".0." in module else 2.0) if expert.name == "mage" else 1.0)
            assert weight_at(expert.entry.weight, module) == pytest.approx(float(own), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("share", ["site", "block", "model"])
def test_fixed_gates_of_a_place_act_on_all_that_shares_it_and_on_nothing_else(tmp_path, share):
    plain = loadout_of({"type": "arrow"})
    sites = places_of(start(plain, device="cpu", dtype="float32"))
    blocks = {"block": {f"model.layers.{number}": 32 for number in range(2)}, "model": {"model": 32}}
    outside = {name: width for name, width in sites.items() if not name.startswith("model.layers.")}
    places = blocks[share] | outside if share in blocks else sites
    save_gate(tmp_path / "gate", plain, places, settings(share=share))
    engine = start(loadout_of({"type": "gate", "artefact": str(tmp_path / "gate")}), device="cpu", dtype="float32")
    torch.manual_seed(0)
    means = {place: torch.rand(len(NAMES)).tolist() for place in places}
    group = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}

    def gates_at(module, x):
        parent, _, leaf = module.rpartition(".")
        site = f"{parent}.{group.get(leaf, leaf)}".removeprefix(".")
        name = {"site": site, "block": ".".join(module.split(".")[:3]), "model": "model"}[share]
        return torch.tensor(means[site if site in outside else name]).expand(*x.shape[:-1], -1)

    expected = logits_by_hand(engine.loadout, tiny.tokens(), gates_at)
    found = start(with_means(engine, means), device="cpu", dtype="float32").logits(tiny.tokens())
    assert_close(found, expected)


KINDS = [("qwen3_moe", "experts"), ("mixtral", "experts"), ("qwen3_moe", "gate"), ("gpt2", "lora"), ("llama", "dora")]


@pytest.mark.parametrize(("arch", "variant"), [*KINDS, ("llama", "ia3"), ("llama", "lora_bias")])
def test_fixed_gates_are_those_of_a_router_that_says_them_of_every_token(arch, variant):
    engine = start(loadout_of({"type": "arrow"}, variant, arch, NAMES[:2]), device="cpu", dtype="float32")
    torch.manual_seed(0)
    means = {name: torch.rand(2).tolist() for name in engine.bank.places}
    for name, place in engine.bank.places.items():
        place.gates.route = lambda x, name=name: Routing(torch.tensor(means[name]).expand(*x.shape[:-1], 2))
    found = start(with_means(engine, means), device="cpu", dtype="float32").logits(tiny.tokens())
    assert_close(found, engine.logits(tiny.tokens()))
    assert not torch.allclose(found, engine.detach()(tiny.tokens()).logits, atol=1e-2)


def test_a_module_that_is_taken_from_another_expert_has_no_gates_to_be_baked(tmp_path):
    """Where the one that is taken brings none of its own."""
    experts = {name: {"adapter": str(case("llama", kind).one)} for name, kind in (("a", "lora"), ("b", "saved"))}
    settings = {"base": str(case("llama", "lora").base), "experts": experts, "router": {"type": "arrow", "top_k": 1}}
    own = resolve(Recipe.model_validate({**settings, "modules_to_save": {"take": "a"}}), "a test")
    engine = start(own, device="cpu", dtype="float32")
    means = dict.fromkeys(engine.bank.places, torch.tensor([0.5, 0.5]).tolist())
    fixed = with_means(engine, means)
    assert check(fixed).ok
    engine = start(fixed, device="cpu", dtype="float32")
    assert engine.logits(tiny.tokens()).isfinite().all()


def test_kl_is_what_its_definition_says_of_the_logits(tmp_path, data):
    engine = start(loadout({"type": "arrow"}), device="cpu", dtype="float32")
    fixed = with_means(engine, mean_gates(engine, cases(engine, data, "train")).gates)
    held_out = cases(engine, data, "valid")
    lost = measure(engine, fixed, held_out)
    others = {"mean gates": start(fixed, device="cpu", dtype="float32")}
    plain = start(loadout({"type": "weighted"}), device="cpu", dtype="float32")
    sums, count = dict.fromkeys(("mean gates", "uniform", "mage", "base"), 0.0), 0
    for _, example in held_out:
        ids = torch.tensor([example.tokens])
        p = torch.softmax(engine.logits(ids)[0].double(), -1)
        logits = {"mean gates": others["mean gates"].logits(ids)}
        for name, weights in (("uniform", [1 / 3] * 3), ("mage", [0, 1, 0]), ("base", [0, 0, 0])):
            plain.set_weights(dict(zip(EXPERTS, map(float, weights), strict=True)))
            logits[name] = plain.logits(ids)
        for position in range(len(example.tokens) - 1):
            if not example.learned[position + 1]:
                continue
            count += 1
            for name, found in logits.items():
                q = torch.softmax(found[0, position].double(), -1)
                sums[name] += float(sum(p[position] * (p[position] / q).log()))
    assert lost.tokens == count > 0
    told = {**lost.nats, **lost.single}
    for name, total in sums.items():
        assert told[name] == pytest.approx(total / count, rel=1e-3), name
    assert lost.best_single == min(lost.single, key=lost.single.get)


def test_kl_of_two_coins():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(0.5 / 0.75).log()
    torch.testing.assert_close(kl(p, q)[0].float(), expected)
    assert kl(p, p + 3.0).abs().max() < 1e-9


class Largest(TorchDispatchMode):
    """Notes the most elements of any float64 tensor that is computed."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        if isinstance(found, torch.Tensor) and found.dtype == torch.float64 and func is not torch.ops.aten.cat.default:
            self.elements = max(self.elements, found.numel())
        return found


@pytest.mark.parametrize("rows", [0.5, 1, 3, 4, 100])
def test_kl_is_computed_in_parts_of_bounded_size_and_is_the_same(monkeypatch, rows):
    torch.manual_seed(0)
    p, q = torch.randn(10, 50) * 3, torch.randn(10, 50) * 3
    first, second = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    monkeypatch.setattr(divergence, "MAX_DOUBLES", int(rows * 50))
    with Largest() as largest:
        found = kl(p, q)
    torch.testing.assert_close(found, (first.exp() * (first - second)).sum(-1), rtol=1e-12, atol=1e-12)
    assert largest.elements == min(max(rows // 1, 1), 10) * 50
    assert kl(p[:0], q[:0]).shape == (0,)


def test_a_long_record_is_compared_in_parts_and_loses_the_same(monkeypatch, data):
    engine = start(loadout({"type": "arrow"}), device="cpu", dtype="float32")
    fixed = with_means(engine, mean_gates(engine, cases(engine, data, "train")).gates)
    held_out = cases(engine, data, "valid")[:1]
    whole = measure(engine, fixed, held_out)
    sizes = []
    engine.model.register_forward_hook(lambda module, words, output: sizes.append(tuple(output.logits.shape[1:])))
    monkeypatch.setattr(divergence, "MAX_LOGITS", 3 * engine.loadout.base.vocab_size)
    parts = measure(engine, fixed, held_out)
    assert max(rows for rows, _ in sizes) == 3 < whole.tokens
    assert {vocabulary for _, vocabulary in sizes} == {engine.loadout.base.vocab_size}
    assert (parts.records, parts.tokens) == (1, whole.tokens)
    assert parts.nats == pytest.approx(whole.nats, rel=1e-4)
    assert parts.single == pytest.approx(whole.single, rel=1e-4)
    forward = engine.model.forward  # some architectures compute the logits of every position
    monkeypatch.setattr(engine.model, "forward", lambda input_ids, use_cache: forward(input_ids, use_cache=use_cache))
    assert measure(engine, fixed, held_out).nats == pytest.approx(whole.nats, rel=1e-4)


def test_experts_alone_and_all_evenly_are_as_published_whatever_rules_the_recipe_has(data):
    found = []
    for weight in (0.001, [{"match": "*", "value": 0.001}]):
        engine = start(loadout({"type": "arrow"}, **{name: {"weight": weight} for name in EXPERTS}), device="cpu")
        found.append(measure(engine, engine.loadout, cases(engine, data, "valid")[:1]))
    plain, ruled = found
    assert ruled.single == pytest.approx(plain.single)
    assert ruled.nats["uniform"] == pytest.approx(plain.nats["uniform"])
    assert min(plain.single.values()) > 0.01


# -- the command


@pytest.mark.parametrize("kind", ["model", "adapter"])
def test_what_is_baked_is_the_live_blend_of_the_saved_recipe_and_the_report_says_how_far_it_is(tmp_path, data, kind):
    saved = tmp_path / "mean.yaml"
    words = ["--mean-gates", "--data", data, "--verify", "--as", kind, "--save-recipe", saved]
    done = bake(tmp_path, recipe({"type": "arrow", "top_k": 1}), *words)
    report = json.loads(done.stdout)["data"]["report"]
    assert report == json.loads((tmp_path / "out" / "bake-report.json").read_text())
    assert report["verify"]["ok"]
    told = report["routed"]
    assert told["router"] == {"type": "arrow", "top_k": 1}
    assert told["data"]["sha256"] == hashlib.sha256(data.read_bytes()).hexdigest()
    assert told["data"]["measured"]["records"] == told["data"]["held_out"]["records"] == 3
    assert set(told["kl"]) == {"mean gates", "uniform", "base", "single", "best_single"}
    assert 0 < told["kl"]["mean gates"] < told["kl"]["base"]
    for row in told["mean_gates"].values():
        assert sum(row.values()) == pytest.approx(1.0, abs=1e-4)  # top 1 of a softmax
    again = lmoe_cli.load(saved, device="cpu", dtype="float32")
    ids = torch.tensor([again.encode(ASKED[1])])
    if kind == "model":
        from transformers import AutoModelForCausalLM

        other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        with torch.no_grad():
            found = other(ids).logits
        assert (found - again.logits(ids)).abs().mean() < 0.05 * again.logits(ids).std()
    else:
        assert load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert read_recipe(saved).router.type == "static"


def test_a_prompt_of_an_encoder_is_baked_with_its_blend(tmp_path):
    written = recipe({"type": "encoder", "temperature": 1.0}, healer={"weight": 0.5})
    done = bake(
        tmp_path, written, "--prompt", "My friend is wounded.", "--verify", "--save-recipe", tmp_path / "x.yaml"
    )
    told = json.loads(done.stdout)["data"]["report"]["routed"]
    engine = lmoe_cli.load(written, device="cpu", dtype="float32")
    engine.stream("My friend is wounded.")
    assert list(told["gates"].values()) == pytest.approx(engine.bank.gates.values[0].tolist(), abs=1e-4)
    saved = read_recipe(tmp_path / "x.yaml")
    assert {name: entry.weight for name, entry in saved.experts.items()} == pytest.approx(told["gates"], rel=1e-6)


def test_an_encoder_s_mean_is_that_of_the_blends_of_the_prompts(tmp_path, data):
    engine = start(loadout({"type": "encoder", "temperature": 1.0}), device="cpu", dtype="float32")
    found = cases(engine, data, "train")
    rows = []
    for text in ASKED[::2]:
        engine.stream([{"role": "user", "content": text}])
        rows.append(engine.bank.gates.values[0].clone())
    means = mean_gates(engine, found)
    assert means.gates["model"] == pytest.approx(torch.stack(rows).mean(0).tolist(), rel=1e-5)
    fixed = with_means(engine, means.gates)
    assert [expert.weight for expert in fixed.experts] == pytest.approx(means.gates["model"], rel=1e-6)


def test_data_without_a_split_is_halved_and_data_without_held_out_text_is_refused(tmp_path):
    lines = [json.dumps({"text": f"{text} And then it rains."}) for text in ASKED]
    (tmp_path / "plain.jsonl").write_text("\n".join(lines))
    done = bake(tmp_path, recipe({"type": "arrow"}), "--mean-gates", "--data", tmp_path / "plain.jsonl")
    told = json.loads(done.stdout)["data"]["report"]["routed"]["data"]
    halves = [told["measured"]["records"], told["held_out"]["records"]]
    assert sum(halves) == len(ASKED)
    assert min(halves) >= 1
    (tmp_path / "valid.jsonl").write_text("\n".join(line[:-1] + ', "split": "valid"}' for line in lines))
    with pytest.raises(LmoeError) as caught:
        bake(tmp_path, recipe({"type": "arrow"}), "--mean-gates", "--data", tmp_path / "valid.jsonl", "--force")
    assert caught.value.code == "data-empty"
