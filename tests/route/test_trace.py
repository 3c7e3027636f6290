"""The gates that are shown are those of the formula; shares and means are what they say."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from router.made import loadout_of, places_of, save_gate, settings

from lmoe_cli.engine.build import start
from lmoe_cli.engine.legend import leader, letters
from lmoe_cli.engine.say import shares
from lmoe_cli.engine.trace import texts, trace
from lmoe_cli.route.report import report
from lmoe_cli.route.subject import subject
from route.made import NAMES, inputs_of

TEXT = "A goblin, 2 axes."
KNOBS = torch.tensor([1.0, 0.5, 1.0])


def gates_by_hand(x, weight, bias, kind):
    """Gates of an input (T, d), by the equations, with the recipe's weights."""
    z = x / x.pow(2).mean(-1, keepdim=True).add(1.2e-7).sqrt() @ weight.T + bias
    gates = 1 / (1 + (-z).exp()) if kind == "sigmoid" else z.exp() / z.exp().sum(-1, keepdim=True)
    return gates[:, : len(NAMES)] * KNOBS


@pytest.mark.parametrize("kind", ["gate", "zero", "sigmoid"])
def test_the_gates_of_each_place_and_token_are_those_of_the_formula(tinymage, engines, kind):
    engine, weights = engines(kind), tinymage[1][kind]
    tokens = engine.encode(TEXT)
    found = trace(engine, tokens)
    inputs = inputs_of(engine, tokens)
    assert {spot.name for spot in found.spots} == set(weights)
    for number, spot in enumerate(found.spots):
        expected = gates_by_hand(inputs[spot.name], *weights[spot.name], kind)
        torch.testing.assert_close(found.gates[number], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gate", "zero", "sigmoid"])
def test_the_report_tells_means_over_places_and_layers_and_shares_of_them(tinymage, engines, kind):
    engine, weights = engines(kind), tinymage[1][kind]
    looked_at = subject(engine, TEXT)
    inputs = inputs_of(engine, looked_at.tokens)
    each = {name: gates_by_hand(inputs[name], *own, kind) for name, own in weights.items()}
    data = report(engine, looked_at, by="layer")

    def close(told, expected):
        assert list(told) == list(NAMES)
        torch.testing.assert_close(torch.tensor(list(told.values())), expected, rtol=1e-4, atol=1e-5)

    mean = torch.stack(list(each.values())).mean(0)
    of_layer = [torch.stack([own for name, own in each.items() if f".{layer}." in name]).mean(0) for layer in (0, 1)]
    for number, token in enumerate(data["tokens"]):
        close(token["gates"], mean[number])
        assert list(token["layers"]) == ["0", "1"]
        close(token["layers"]["0"], of_layer[0][number])
        close(token["layers"]["1"], of_layer[1][number])
    own = [number for number, token in enumerate(data["tokens"]) if token["part"] == "text"]
    assert "".join(data["tokens"][number]["text"] for number in own) == TEXT
    share = mean.abs() / mean.abs().sum(-1, keepdim=True).clamp(min=1)
    close({expert["name"]: expert["share"] for expert in data["experts"]}, share[own].mean(0))
    assert data["rest"] == pytest.approx(1 - float(share[own].mean(0).sum()), abs=1e-5)
    close(data["layers"][1]["gates"], of_layer[1][own].mean(0))


def test_by_site_tells_each_place_of_each_token(engines):
    engine = engines("gate")
    looked_at = subject(engine, TEXT)
    found, data = trace(engine, looked_at.tokens), report(engine, looked_at, by="site")
    for number, spot in enumerate(found.spots):
        for at, token in enumerate(data["tokens"]):
            assert list(token["places"][spot.name].values()) == pytest.approx(
                found.gates[number, at].tolist(), abs=1e-6
            )
    assert [spot.layer for spot in found.spots] == sorted(spot.layer for spot in found.spots)


def test_an_answer_s_tokens_are_routed_as_the_model_reads_them(engines):
    engine = engines("gate")
    looked_at = subject(engine, TEXT, generate=6)
    said = engine.generate(TEXT, temperature=0, max_new_tokens=6)
    assert looked_at.answer == said
    given = subject(engine, TEXT, answer=said)
    assert given.tokens == looked_at.tokens
    whole = trace(engine, looked_at.tokens)
    prompt = trace(engine, engine.encode(TEXT))
    length = prompt.gates.shape[1]
    torch.testing.assert_close(whole.gates[:, :length], prompt.gates, rtol=1e-4, atol=1e-5)


def test_shares_are_those_of_text_and_answer_not_of_the_template(engines):
    engine = engines("gate")
    looked_at = subject(engine, TEXT, answer="No.")
    assert looked_at.parts.count("answer") == 3
    assert looked_at.parts.count("text") == len(TEXT)
    data = report(engine, looked_at)
    told = [token["gates"]["healer"] for token in data["tokens"] if token["part"] != "template"]
    assert data["experts"][2]["share"] == pytest.approx(sum(told) / len(told), abs=1e-5)


def test_a_raw_text_has_no_template_around_it(engines):
    engine = engines("gate")
    raw = subject(engine, TEXT, raw=True)
    assert list(raw.tokens) == engine.tokenizer(TEXT)["input_ids"]
    assert set(raw.parts) == {"text"}
    assert len(subject(engine, TEXT).tokens) > len(raw.tokens)


def test_arrow_gates_sum_to_the_weights_of_two_experts(engines):
    engine = engines("arrow")
    gates = trace(engine, engine.encode(TEXT)).gates / KNOBS
    torch.testing.assert_close(gates.sum(-1), torch.ones(gates.shape[:2]))
    assert (gates > 0).sum(-1).eq(2).all()


def test_an_encoder_has_one_blend_for_all_tokens_and_tells_its_scores(engines):
    engine = engines("encoder")
    data = report(engine, subject(engine, "a spell of fire"))
    assert data["scope"] == "prompt"
    assert len({tuple(token["gates"].values()) for token in data["tokens"]}) == 1
    scores = torch.tensor(list(data["scores"].values()))
    expected = torch.softmax(scores, 0) * KNOBS
    torch.testing.assert_close(torch.tensor(list(data["tokens"][0]["gates"].values())), expected, rtol=0, atol=1e-5)
    assert scores.argmax() == 1


@pytest.mark.parametrize("kind", ["weighted", "static"])
def test_a_fixed_router_has_the_recipe_s_weights_for_every_token(engines, kind):
    engine = engines(kind)
    data = report(engine, subject(engine, TEXT))
    assert data["scope"] == "fixed"
    assert all(token["gates"] == {"warrior": 1.0, "mage": 0.5, "healer": 1.0} for token in data["tokens"])
    assert [expert["share"] for expert in data["experts"]] == pytest.approx([0.4, 0.2, 0.4])


def test_rules_per_module_are_told_by_layer(folder):
    from route.made import engine_of

    engine = engine_of(folder / "rules.yaml")
    data = report(engine, subject(engine, TEXT), by="site")
    at = {place["place"]: place["gates"]["mage"] for place in data["places"]}
    assert at["model.layers.0.mlp.up_proj"] == 0.25
    assert at["model.layers.1.mlp.up_proj"] == 2.0
    assert at["model.layers.1.self_attn.q_proj"] == 1.0
    assert data["layers"][0]["gates"] == {"warrior": 1.0, "mage": 0.25, "healer": 1.0}


@pytest.mark.parametrize("share", ["block", "model"])
def test_shared_gates_are_told_once_for_all_that_share_them(tmp_path, share):
    plain = loadout_of({"type": "arrow"})
    outside = {name: width for name, width in places_of(start(plain)).items() if ".layers." not in name}
    inside = {"model.layers.0": 32, "model.layers.1": 32} if share == "block" else {"model": 32}
    save_gate(tmp_path / "gate", plain, inside | outside, settings(share=share))
    engine = start(loadout_of({"type": "gate", "artefact": str(tmp_path / "gate")}), dtype="float32")
    found = trace(engine, [5, 6, 7])
    assert list(found.layers) == [*(["0", "1"] if share == "block" else ["model"]), *outside]
    torch.testing.assert_close(found.gates.sum(-1), torch.ones(found.gates.shape[:2]))


def test_fused_experts_of_a_mixture_are_a_place_too():
    engine = start(loadout_of({"type": "arrow"}, "experts", arch="qwen3_moe", names=("zero", "one")), dtype="float32")
    found = trace(engine, [5, 6, 7])
    assert "model.layers.1.mlp.experts" in [spot.name for spot in found.spots]
    assert found.left_out == ()


def test_experts_that_all_rest_have_no_share(engines):
    engine = engines("gate")
    before = engine.weights
    engine.set_weights(dict.fromkeys(NAMES, 0.0))
    try:
        data = report(engine, subject(engine, TEXT))
    finally:
        engine.set_weights(before)
    assert data["rest"] == 1.0
    assert len(data["layers"]) == 2


def test_texts_of_tokens_are_the_whole_text_special_tokens_too(engines):
    engine = engines("gate")
    tokens = engine.encode(TEXT)
    assert "".join(texts(engine, tokens)) == engine.tokenizer.decode(tokens)
    assert "<user>" in texts(engine, tokens)


# -- letters


@given(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=100))
def test_no_two_experts_have_one_letter(names):
    found = letters(names)
    assert list(found) == names
    assert len(set(found.values())) == len(names)
    assert all(len(letter) == 1 and len(letter.lower()) == 1 for letter in found.values())


def test_letters_are_the_first_that_are_free():
    assert list(letters(["warrior", "mage", "healer", "mystic", "wow", "m-1"]).values()) == list("WMHYO1")


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=6))
def test_shares_sum_to_one_at_most_and_keep_what_is_less(gates):
    found = shares(torch.tensor(gates))
    total = sum(map(abs, gates))
    assert float(found.sum()) == pytest.approx(min(1.0, total), abs=1e-5)
    if total <= 1:
        assert found.tolist() == pytest.approx([abs(gate) for gate in gates], abs=1e-6)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"a": 0.4, "b": 0.6}, "b"),
        ({"a": 0.2, "b": 0.3}, None),
        ({"a": 0.1, "b": 0.46}, "b"),
        ({"a": 0.0}, None),
        ({}, None),
    ],
)
def test_the_base_leads_where_it_has_more_than_any_expert(said, expected):
    assert leader(said) == expected
