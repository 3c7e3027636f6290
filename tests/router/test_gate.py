"""A trained gate computes what its equations say, at whatever it is shared by, and binds to experts and base."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from laws.cases import assert_close
from router.made import NAMES, loadout_of, logits_by_hand, places_of, save_gate, settings

from lmoe_cli.bank import shared
from lmoe_cli.check import check
from lmoe_cli.engine.build import start
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.findings import RefusedError
from lmoe_cli.router.gate import Gate, gates_of

GROUPS = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
ACTIVATIONS = ({"activation": "softmax"}, {"activation": "topk", "top_k": 2}, {"activation": "topk"},
               {"activation": "sigmoid"}, {"activation": "hard1"}, {"activation": "softmax", "zero_expert": True},
               {"activation": "topk", "top_k": 2, "zero_expert": True},
               {"activation": "hard1", "zero_expert": True})  # fmt: skip


def scored(x, weight, bias, words, temperature=1.0):
    """Gates of an input, by the equations."""
    scores = ((x / x.pow(2).mean(-1, keepdim=True).add(1.2e-7).sqrt()) @ weight.T + bias) / temperature
    match words["activation"]:
        case "softmax":
            gates = scores.exp() / scores.exp().sum(-1, keepdim=True)
        case "topk":
            kept = scores >= scores.topk(words.get("top_k", 2), -1).values[..., -1:]
            gates = scores.exp() * kept / (scores.exp() * kept).sum(-1, keepdim=True)
        case "sigmoid":
            gates = 1 / (1 + (-scores).exp())
        case "hard1":
            gates = (scores == scores.max(-1, keepdim=True).values).float()
    return gates[..., : len(NAMES)]


def gated(tmp_path, words, share="site", **router):
    """A loadout with a random gate, and that gate's weights."""
    plain = loadout_of({"type": "arrow"})
    sites = places_of(start(plain, dtype="float32"))
    blocks = {f"model.layers.{number}": 32 for number in range(2)}
    outside = {name: width for name, width in sites.items() if not name.startswith("model.layers.")}
    places = {"site": sites, "block": blocks | outside, "model": {"model": 32} | outside}[share]
    weights = save_gate(tmp_path / "gate", plain, places, settings(share=share, **words))
    return loadout_of({"type": "gate", "artefact": str(tmp_path / "gate"), **router}), weights


@pytest.mark.parametrize("words", ACTIVATIONS, ids=lambda words: "-".join(map(str, words.values())))
@pytest.mark.parametrize("shape", [(1, 1), (2, 7)])
def test_a_gate_of_each_site_is_its_equations(tmp_path, words, shape):
    loadout, weights = gated(tmp_path, words)

    def gates_at(module, x):
        parent, _, leaf = module.rpartition(".")
        return scored(x, *weights[f"{parent}.{GROUPS.get(leaf, leaf)}".removeprefix(".")], words)

    tokens = tiny.tokens(*shape)
    assert_close(start(loadout, dtype="float32").logits(tokens), logits_by_hand(loadout, tokens, gates_at))


@pytest.mark.parametrize("share", ["block", "model"])
def test_a_shared_gate_reads_what_flows_into_the_block(tmp_path, share):
    words = {"activation": "softmax"}
    loadout, weights = gated(tmp_path, words, share)
    tokens, flows = tiny.tokens(), {}

    def gates_at(module, x):
        block = ".".join(module.split(".")[:3])
        place = block if share == "block" else "model"
        return scored(flows[block if share == "block" else "model.layers.0"], *weights[place], words)

    model = tiny.load(loadout.base.source.path)
    load = tiny.load
    try:
        tiny.load = lambda _: model
        for name, block in model.named_modules():
            if name in ("model.layers.0", "model.layers.1"):
                block.register_forward_pre_hook(lambda _, inputs, name=name: flows.update({name: inputs[0]}))
        expected = logits_by_hand(loadout, tokens, gates_at)
    finally:
        tiny.load = load
    assert_close(start(loadout, dtype="float32").logits(tokens), expected)


@pytest.mark.parametrize("share", ["site", "block", "model"])
@pytest.mark.parametrize("words", ACTIVATIONS[:5], ids=lambda words: "-".join(map(str, words.values())))
def test_a_token_after_the_other_gives_the_logits_of_the_whole_text(tmp_path, words, share):
    loadout, _ = gated(tmp_path, words, share)
    engine = start(loadout, dtype="float32")
    text = tiny.tokens(1, 12)
    whole = engine.logits(text)[0]
    values = engine.key_values()
    for length in range(1, 13):
        assert_close(values.logits(text[0, :length].tolist(), engine.blend), whole[length - 1])


SPARSE = [words for words in ACTIVATIONS if words["activation"] in ("topk", "hard1")]


@pytest.mark.parametrize("words", SPARSE, ids=lambda words: "-".join(map(str, words.values())))
def test_what_kernels_of_few_experts_are_told_adds_up_to_the_gates(words):
    scores = torch.randn(50, 3 + words.get("zero_expert", False))
    routing = gates_of(scores, settings(**words), 3)
    experts, gates = routing.chosen
    assert int(experts.max()) < 3
    torch.testing.assert_close(torch.zeros(50, 3).scatter_add(1, experts, gates), routing.values)


def test_a_vector_that_goes_to_the_zero_expert_meets_no_expert(tmp_path):
    loadout, _ = gated(tmp_path, {"activation": "hard1", "zero_expert": True})
    engine = start(loadout, dtype="float32")
    for place in engine.bank.places.values():
        with torch.no_grad():
            place.gates.route.bias[-1] += 1e3
    blended = engine.logits(tiny.tokens(1, 1))
    assert all(place.gates.active == frozenset() for place in engine.bank.places.values())
    assert torch.equal(blended, engine.detach()(tiny.tokens(1, 1)).logits)


@pytest.mark.parametrize(
    "words", [*SPARSE, {"activation": "sigmoid"}], ids=lambda words: "-".join(map(str, words.values()))
)
def test_only_the_experts_that_act_or_all_of_them_gives_the_same(tmp_path, words, monkeypatch):
    loadout, _ = gated(tmp_path, words)
    found = []
    for way in (True, False):
        monkeypatch.setattr(shared, "is_worth", lambda *_, way=way: way)
        found.append(start(loadout, dtype="float32").logits(tiny.tokens()))
    assert_close(*found)


def test_what_the_recipe_sets_goes_before_what_was_trained(tmp_path):
    loadout, _ = gated(tmp_path, {"activation": "softmax"}, activation="topk", top_k=1, temperature=3.0)
    with (engine := start(loadout, dtype="float32")).router.watched() as seen:
        engine.logits(tiny.tokens())
    assert all((gates[0] > 0).sum(-1).eq(1).all() for gates in seen.values())


@pytest.mark.parametrize("trained", [1.0, 0.5])
def test_the_temperature_is_the_recipe_s_or_what_was_trained(tmp_path, trained):
    words, tokens = {"activation": "softmax", "temperature": trained}, tiny.tokens()
    for acting, told in ((trained, {}), (3.0, {"temperature": 3.0})):
        loadout, weights = gated(tmp_path / str(acting), words, **told)

        def gates_at(module, x, weights=weights, temperature=acting):
            parent, _, leaf = module.rpartition(".")
            own = weights[f"{parent}.{GROUPS.get(leaf, leaf)}".removeprefix(".")]
            return scored(x, *own, words, temperature)

        assert_close(start(loadout, dtype="float32").logits(tokens), logits_by_hand(loadout, tokens, gates_at))


@pytest.mark.parametrize("words", ACTIVATIONS, ids=lambda words: "-".join(map(str, words.values())))
def test_gradients_are_those_of_finite_differences(words):
    torch.manual_seed(3)
    gate = Gate(6, 3, settings(**words)).double()
    x, mix = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    start_ = torch.randn_like(gate.weight)

    def loss(weight):
        scores = torch.nn.functional.rms_norm(x, (6,)) @ weight.T
        return (gates_of(scores, gate.settings, 3).values * mix).sum()

    if words["activation"] == "hard1":  # forward it is a step; its gradient is, by definition, that of the softmax

        def smooth(weight):
            scores = torch.nn.functional.rms_norm(x, (6,)) @ weight.T
            return (torch.softmax(scores, -1)[..., :3] * mix).sum()

        weight = start_.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(weight), weight)
        (expected,) = torch.autograd.grad(smooth(weight), weight)
        torch.testing.assert_close(slope, expected)
        assert torch.autograd.gradcheck(smooth, start_.clone().requires_grad_())
    else:
        assert torch.autograd.gradcheck(loss, start_.clone().requires_grad_())


# -- what it is bound to


def codes(loadout):
    return {found.code for found in check(loadout).findings if found.severity == "error"}


def test_rows_follow_the_names_of_the_experts_not_their_order(tmp_path):
    loadout, _ = gated(tmp_path, {"activation": "softmax"})
    turned = loadout_of(loadout.recipe.router.model_dump(exclude_none=True), names=NAMES)
    experts = dict(reversed(list(turned.recipe.experts.items())))
    from lmoe_cli.loadout.loadout import resolve

    turned = resolve(turned.recipe.model_copy(update={"experts": experts}), "a test")
    assert [expert.name for expert in turned.experts] == list(reversed(NAMES))
    first, second = (start(one, dtype="float32").logits(tiny.tokens()) for one in (loadout, turned))
    assert_close(first, second)


def test_other_experts_are_refused(tmp_path):
    loadout, _ = gated(tmp_path, {"activation": "softmax"})
    router = loadout.recipe.router.model_dump(exclude_none=True)
    assert codes(loadout) == set()
    assert codes(loadout_of(router, names=NAMES[:3])) == {"router-experts-differ"}
    shutil.copytree(loadout.experts[1].adapter.source.path, tmp_path / "two-other")
    other = loadout_of(router, two={"adapter": str(tmp_path / "two-other")})
    assert codes(other) == {"router-expert-changed"}
    with pytest.raises(RefusedError):
        start(other, dtype="float32")


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": 400}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 1}}],
    ids=lambda told: next(iter(told)),
)
def test_an_expert_that_acts_otherwise_by_its_config_is_refused(tmp_path, changes):
    assert codes(with_config(tmp_path, **changes)) == {"router-expert-changed"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_alpha": 6.0},
        {"alpha_pattern": {"no_such_module": 1}},
        {"base_model_name_or_path": "org/moved", "inference_mode": False, "revision": "main"},
    ],
    ids=lambda told: "-".join(told) or "layout",
)
def test_what_a_config_says_without_changing_a_number_does_not_count(tmp_path, changes):
    assert "router-expert-changed" not in codes(with_config(tmp_path, **changes))


def with_config(tmp_path, **changes):
    """A gated loadout, one of whose experts has a config with other values, in another layout."""
    loadout, _ = gated(tmp_path, {"activation": "softmax"})
    folder = tmp_path / "one"
    shutil.copytree(loadout.experts[1].adapter.source.path, folder)
    path = folder / "adapter_config.json"
    told = json.loads(path.read_text())
    assert told["lora_alpha"] == 6
    path.write_text(json.dumps(dict(reversed([*(told | changes).items()]))))
    return loadout_of(loadout.recipe.router.model_dump(exclude_none=True), one={"adapter": str(folder)})


def test_another_base_is_refused(tmp_path):
    loadout, _ = gated(tmp_path, {"activation": "softmax"})
    tiny.save_base("llama", tmp_path / "base", seed=5)
    from lmoe_cli.loadout.loadout import resolve

    moved = resolve(loadout.recipe.model_copy(update={"base": str(tmp_path / "base")}), "a test")
    assert "router-base-differs" in codes(moved)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("router.json", lambda text: text.replace('"lmoe.router/1"', '"lmoe.router/9"')),
        ("router.json", lambda text: text.replace('"softmax"', '"hardest"')),
        ("router.json", lambda text: text[:-30]),
        (
            "router.json",
            lambda text: text.replace('"one":', '"seven":', 1).replace('"two":', '"eight": "x", "two":', 1),
        ),
    ],
)
def test_a_damaged_artefact_is_refused(tmp_path, file, change):
    loadout, _ = gated(tmp_path, {"activation": "softmax"})
    path = tmp_path / "gate" / file
    changed = change(path.read_text())
    path.write_text(changed)
    with pytest.raises(RefusedError) as caught:
        loadout_of(loadout.recipe.router.model_dump(exclude_none=True))
    assert {found.code for found in caught.value.findings} <= {"router-invalid", "json-invalid"}


def test_weights_cut_short_are_refused(tmp_path):
    loadout, _ = gated(tmp_path, {"activation": "softmax"})
    path = tmp_path / "gate" / "router.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RefusedError):
        loadout_of(loadout.recipe.router.model_dump(exclude_none=True))
    path.unlink()
    with pytest.raises(RefusedError) as caught:
        loadout_of(loadout.recipe.router.model_dump(exclude_none=True))
    assert caught.value.findings[0].code == "router-invalid"


def test_a_gate_that_knows_a_place_less_is_refused(tmp_path):
    plain = loadout_of({"type": "arrow"})
    places = places_of(start(plain, dtype="float32"))
    places.popitem()
    save_gate(tmp_path / "gate", plain, places, settings())
    with pytest.raises(InvalidFileError) as caught:
        start(loadout_of({"type": "gate", "artefact": str(tmp_path / "gate")}), dtype="float32")
    assert caught.value.code == "router-place-missing"


def test_the_config_says_what_the_gate_is_for(tmp_path):
    loadout, _ = gated(tmp_path, {"activation": "topk", "top_k": 2})
    told = json.loads((tmp_path / "gate" / "router.json").read_text())
    assert told["format"] == "lmoe.router/1"
    assert list(told["experts"]) == list(NAMES)
    assert told["settings"]["top_k"] == 2
    assert loadout.gate.places == frozenset(gate for gate in places_of(start(loadout, dtype="float32")))
