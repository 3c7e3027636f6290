"""A trained gate takes in an expert and lets one go; what it scores for the others stays."""

from __future__ import annotations

import json
import shutil

import peft
import pytest
import tiny
import torch
from click.testing import CliRunner
from laws.cases import assert_close
from router.made import NAMES, adapter, loadout_of, places_of, save_gate, settings
from safetensors.torch import load_file
from tiny_tokenizer import save_tokenizer

from lmoe_cli.check import check
from lmoe_cli.cli.root import lmoe, run
from lmoe_cli.engine.build import load, start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.parse import read_recipe
from lmoe_cli.loadout.routers import GateRouter
from lmoe_cli.loadout.write import recipe_text
from lmoe_cli.regrow.rows import Rows, idle

TARGETS = {"a": ["q_proj", "v_proj", "down_proj"], "b": ["q_proj", "up_proj"], "new": ["k_proj", "up_proj", "o_proj"]}
SITE = "model.layers.{}.self_attn.{}"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A base that can read, and three experts on modules of their own."""
    folder = tmp_path_factory.mktemp("parts")
    save_tokenizer(tiny.save_base("llama", folder / "base"))
    for number, (name, targets) in enumerate(TARGETS.items()):
        torch.manual_seed(number)
        words = {"r": 2 + number, "lora_alpha": 6, "target_modules": targets, "init_lora_weights": False}
        made = peft.get_peft_model(tiny.load(folder / "base"), peft.LoraConfig(task_type="CAUSAL_LM", **words))
        made.peft_config["default"].base_model_name_or_path = str(folder / "base")
        made.save_pretrained(folder / name)
    return folder


def recipe_of(place, names, router):
    text = "base: ./base\nexperts:\n" + "".join(f"  {name}: {{adapter: ./{name}}}\n" for name in names)
    path = place / f"{'-'.join(names)}.yaml"
    path.write_text(f"{text}router: {{{router}}}\n")
    return path


def loadout_at(path):
    return resolve(read_recipe(path), str(path), beside=path.parent)


@pytest.fixture
def place(parts, tmp_path):
    for name in ("base", *TARGETS):
        shutil.copytree(parts / name, tmp_path / name)
    return tmp_path


def trained(place, names=("a", "b"), share="site", **words):
    """A recipe with a random gate for its experts, in the folder ``gate``."""
    plain = loadout_at(recipe_of(place, names, "type: arrow"))
    widths = places_of(start(plain, device="cpu", dtype="float32"))
    if share != "site":
        widths = {f"model.layers.{number}": 32 for number in range(2)} if share == "block" else {"model": 32}
    save_gate(place / "gate", plain, widths, settings(share=share, **words), seed=4)
    return recipe_of(place, names, "type: gate, artefact: ./gate")


def grow(recipe, out, *words, name="new", ref=None):
    told = ["router", "grow", str(recipe), "--expert", f"{name}={ref or recipe.parent / 'new'}", "--out", str(out)]
    return CliRunner().invoke(lmoe, [*told, *words, "--json"], catch_exceptions=False)


def shrink(recipe, name, out):
    return CliRunner().invoke(
        lmoe, ["router", "shrink", str(recipe), name, "--out", str(out), "--json"], catch_exceptions=False
    )


def data(done):
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)["data"]


def gate_at(folder):
    return load_file(folder / "router.safetensors")


def config_at(folder):
    return json.loads((folder / "router.json").read_text())


def delta_at(place, name, modules):
    """Dense deltas of an expert on modules of one input, one above the other, from what PEFT saved."""
    stored = load_file(place / name / "adapter_model.safetensors")
    key = "base_model.model.{}.lora_{}.weight"
    return torch.cat([stored[key.format(module, "B")] @ stored[key.format(module, "A")] for module in modules])


# -- growing


@pytest.mark.parametrize("words", [{"activation": "softmax"}, {"activation": "topk", "zero_expert": True}])
def test_a_grown_gate_binds_runs_and_keeps_the_rows_of_the_others(place, words):
    recipe = trained(place, **words)
    told = data(grow(recipe, place / "grown"))
    before, after, zero = gate_at(place / "gate"), gate_at(place / "grown"), int(words.get("zero_expert", False))
    assert told["experts"] == list(config_at(place / "grown")["experts"]) == ["a", "b", "new"]
    for number in range(2):
        # Sites that the new expert does not touch, or not by their first module, keep their names.
        for site in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{number}.{site}"
            kept = [0, 1, 3][: 2 + zero]
            for leaf in ("weight", "bias"):
                assert torch.equal(after[f"{name}.{leaf}"][kept], before[f"{name}.{leaf}"])
    grown = loadout_at(place / "grown" / "recipe.yaml")
    assert check(grown).ok
    engine = start(grown, device="cpu", dtype="float32")
    with engine.router.watched() as seen:
        assert torch.isfinite(engine.logits(tiny.tokens())).all()
    assert seen.keys() == {name.removesuffix(".bias") for name in after if name.endswith(".bias")}
    assert all(gates[0].shape[-1] == 3 for gates in seen.values())


def test_scores_of_the_others_stay_token_by_token(place):
    recipe = trained(place, activation="sigmoid")  # under which every gate is a score of its own
    data(grow(recipe, place / "grown"))
    old = load(recipe, device="cpu", dtype="float32")
    new = load(place / "grown" / "recipe.yaml", device="cpu", dtype="float32")
    new.set_weights(new=0.0)  # or what it does would change what the gates read
    found = []
    for engine in (old, new):
        with engine.router.watched() as seen:
            found.append(engine.logits(tiny.tokens()))
        found.append(seen)
    assert_close(found[0], found[2])
    for name in (SITE.format(0, "q_proj"), "model.layers.1.mlp.down_proj"):
        assert_close(found[1][name][0], found[3][name][0][..., :2])


def test_a_new_row_is_the_direction_of_the_dense_delta_at_the_mean_strength_of_the_others(place):
    recipe = trained(place, zero_expert=True)
    data(grow(recipe, place / "grown"))
    before, after = gate_at(place / "gate"), gate_at(place / "grown")
    for site, module in ((SITE.format(1, "q_proj"), SITE.format(1, "k_proj")), ("model.layers.0.mlp.up_proj",) * 2):
        direction = torch.linalg.svd(delta_at(place, "new", [module])).Vh[0]
        direction = direction * direction[direction.abs().argmax()].sign()
        weight, bias = before[f"{site}.weight"], before[f"{site}.bias"]
        expected = direction * weight[:2].norm(dim=1).mean()  # without the zero expert's
        torch.testing.assert_close(after[f"{site}.weight"][2], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(after[f"{site}.bias"][2], bias[:2].mean())


def test_where_the_new_expert_does_nothing_it_takes_nothing(place):
    recipe = trained(place)
    told = data(grow(recipe, place / "grown"))
    site = "model.layers.0.mlp.down_proj"
    assert site in told["idle_at"]
    after = gate_at(place / "grown")
    assert not after[f"{site}.weight"][2].any()
    weight, bias = after[f"{site}.weight"], after[f"{site}.bias"]
    for x in (torch.randn(2000, weight.shape[1]), -weight[:2], weight[:2]):
        x = x / x.pow(2).mean(-1, keepdim=True).sqrt()
        assert torch.softmax(x @ weight.T + bias, -1)[:, 2].max() < 1e-8


def test_no_input_lets_an_idle_expert_reach_more_than_a_share_of_e_to_the_minus_20():
    torch.manual_seed(0)
    for zero in (False, True):
        rows = Rows(torch.randn(4, 6) * 3, torch.randn(4))
        grown = idle(rows, 0.5, zero_expert=zero)
        number = 3 if zero else 4
        worst = -rows.weight / rows.weight.norm(dim=1, keepdim=True) * 6**0.5  # the inputs that each row likes least
        scores = (worst @ grown.weight.T + grown.bias) / 0.5
        assert (scores.min(dim=1).values == scores[:, number]).all()
        others = [row for row in range(5) if row != number]
        assert (scores[:, others].min(dim=1).values - scores[:, number] >= 20 - 1e-3).all()


def test_where_nobody_but_the_new_expert_acts_the_others_get_rows_of_zeros(place):
    recipe = trained(place)
    told = data(grow(recipe, place / "grown"))
    assert told["alone_at"] == [SITE.format(number, "o_proj") for number in range(2)]
    before, after = gate_at(place / "gate"), gate_at(place / "grown")
    strength = torch.stack([one.norm(dim=1).mean() for name, one in before.items() if name.endswith("weight")]).mean()
    for name in told["alone_at"]:
        assert not after[f"{name}.weight"][:2].any()
        assert not after[f"{name}.bias"].any()
        torch.testing.assert_close(after[f"{name}.weight"][2].norm(), strength)


def test_texts_choose_the_sign_under_which_their_tokens_score_positive(place):
    recipe = trained(place)
    (place / "texts.txt").write_text("Cast a spell.\nRead the rune aloud.\n")
    texts = ["Cast a spell.", "Read the rune aloud."]
    words = ("--example", texts[0], "--example", texts[1])
    told = data(grow(recipe, place / "grown", *words))
    assert told["texts"] == 2
    model, inputs = tiny.load(place / "base"), {}
    tokenizer = start(loadout_at(recipe), device="cpu").tokenizer
    sites = {name.removesuffix(".weight") for name in gate_at(place / "grown") if name.endswith(".weight")}
    for site in sites:
        model.get_submodule(site).register_forward_pre_hook(
            lambda _, seen, site=site: inputs.setdefault(site, []).append(seen[0][0, 1:])
        )
    with torch.no_grad():
        for text in texts:
            model(torch.tensor([tokenizer(text)["input_ids"]]))
    after, turned = gate_at(place / "grown"), 0
    data(grow(recipe, place / "plain"))
    plain = gate_at(place / "plain")
    for site in sites - set(told["idle_at"]):
        x = torch.cat(inputs[site])
        row = after[f"{site}.weight"][2]
        assert (x / x.pow(2).mean(-1, keepdim=True).sqrt() @ row).mean() > 0
        turned += int(not torch.equal(row, plain[f"{site}.weight"][2]))
        torch.testing.assert_close(row.abs(), plain[f"{site}.weight"][2].abs())
    assert turned  # somewhere the texts disagree with the rule that is used without them
    data(grow(recipe, place / "from-file", "--data", str(place / "texts.txt")))
    for name, tensor in gate_at(place / "from-file").items():
        assert torch.equal(tensor, after[name])
    assert read_recipe(place / "from-file" / "recipe.yaml").experts["new"].data == str(place / "texts.txt")


@pytest.mark.parametrize("share", ["block", "model"])
def test_a_shared_gate_grows_too(place, share):
    recipe = trained(place, share=share)
    data(grow(recipe, place / "grown", "--example", "Cast a spell."))
    engine = load(place / "grown" / "recipe.yaml", device="cpu", dtype="float32")
    assert torch.isfinite(engine.logits(tiny.tokens())).all()
    before, after = gate_at(place / "gate"), gate_at(place / "grown")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name][:2], tensor)
        assert after[name][2].any()


def test_a_gate_of_a_mixture_grows_and_shrinks(tmp_path):
    loadout = loadout_of({"type": "arrow"}, "experts", "qwen3_moe", NAMES[:2])
    places = places_of(start(loadout, device="cpu", dtype="float32"))
    assert "model.layers.0.mlp.experts" in places
    before = save_gate(tmp_path / "gate", loadout, places, settings(activation="topk"))
    recipe = loadout.recipe.model_copy(update={"router": GateRouter(type="gate", artefact="./gate")})
    (tmp_path / "mix.yaml").write_text(recipe_text(recipe))
    data(grow(tmp_path / "mix.yaml", tmp_path / "grown", ref=adapter("qwen3_moe", "experts", 2)))
    load(tmp_path / "grown" / "recipe.yaml", device="cpu").logits(tiny.tokens())
    data(shrink(tmp_path / "grown" / "recipe.yaml", "zero", tmp_path / "shrunk"))
    load(tmp_path / "shrunk" / "recipe.yaml", device="cpu").logits(tiny.tokens())
    after = gate_at(tmp_path / "shrunk")
    for place, (weight, _) in before.items():
        assert torch.equal(after[f"{place}.weight"][0], weight[1])
        assert after[f"{place}.weight"].shape == weight.shape


def test_growing_twice_gives_the_same_bytes(place):
    recipe = trained(place)
    for out in ("one", "two"):
        data(grow(recipe, place / out, "--example", "Cast a spell."))
    for file in ("router.safetensors", "router.json"):
        assert (place / "one" / file).read_bytes() == (place / "two" / file).read_bytes()


# -- shrinking


def test_shrinking_what_was_grown_gives_the_gate_back(place):
    recipe = trained(place, zero_expert=True)
    data(grow(recipe, place / "grown"))
    told = data(shrink(place / "grown" / "recipe.yaml", "new", place / "back"))
    assert told["dropped_at"] == [SITE.format(number, "o_proj") for number in range(2)]
    before, after = gate_at(place / "gate"), gate_at(place / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
    assert config_at(place / "back")["experts"] == config_at(place / "gate")["experts"]
    first, second = (load(one, device="cpu", dtype="float32") for one in (recipe, place / "back" / "recipe.yaml"))
    assert torch.equal(first.logits(tiny.tokens()), second.logits(tiny.tokens()))


def test_a_site_called_after_a_module_that_only_the_lost_expert_changes_gets_another_name(place):
    recipe = trained(place, ("b", "new"))
    data(shrink(recipe, "b", place / "less"))
    before, after = gate_at(place / "gate"), gate_at(place / "less")
    for number in range(2):
        old, new = SITE.format(number, "q_proj"), SITE.format(number, "k_proj")
        assert f"{new}.weight" not in before
        assert f"{old}.weight" not in after
        assert torch.equal(after[f"{new}.weight"], before[f"{old}.weight"][1:])
    assert check(loadout_at(place / "less" / "recipe.yaml")).ok
    load(place / "less" / "recipe.yaml", device="cpu").logits(tiny.tokens())


def test_a_grown_gate_refuses_the_experts_it_had_and_the_old_one_the_new(place):
    recipe = trained(place)
    data(grow(recipe, place / "grown"))
    for names, folder, fits in (
        (("a", "b"), "grown", False), (("a", "b", "new"), "gate", False), (("new", "b", "a"), "grown", True)
    ):  # fmt: skip
        found = check(loadout_at(recipe_of(place, names, f"type: gate, artefact: ./{folder}"))).findings
        assert ("router-experts-differ" not in {item.code for item in found}) is fits
    (place / "new" / "adapter_model.safetensors").write_bytes(
        (place / "new" / "adapter_model.safetensors").read_bytes()
    )
    assert check(loadout_at(place / "grown" / "recipe.yaml")).ok
    torch.manual_seed(7)
    tensors = {name: torch.randn_like(one) for name, one in load_file(place / "new/adapter_model.safetensors").items()}
    from safetensors.torch import save_file

    save_file(tensors, place / "new" / "adapter_model.safetensors", metadata={"format": "pt"})
    codes = {item.code for item in check(loadout_at(place / "grown" / "recipe.yaml")).findings}
    assert "router-expert-changed" in codes


# -- refusals


def refusal(capfd, *words, code=2):
    assert run(["router", *map(str, words)]) == code
    return capfd.readouterr().err


def test_what_cannot_grow_or_shrink_says_why_and_leaves_nothing(place, capfd):
    recipe, new, out = trained(place), place / "new", place / "out"
    (place / "gate.yaml").write_text((recipe).read_text())
    told = refusal(capfd, "grow", recipe, "--expert", f"a={new}", "--out", out)
    assert "error[expert-taken]" in told
    assert "hint: give the new one another name" in told
    assert "error[usage]" in refusal(capfd, "grow", recipe, "--expert", "new", "--out", out)
    assert "error[usage]" in refusal(capfd, "grow", recipe, "--expert", f"9new={new}", "--out", out)
    assert "error[expert-unknown]" in refusal(capfd, "shrink", recipe, "aa", "--out", out, code=3)
    assert "error[output-exists]" in refusal(capfd, "shrink", recipe, "a", "--out", place / "gate")
    assert "error[output-is-input]" in refusal(capfd, "shrink", recipe, "a", "--out", place / "gate", "--force")
    (place / "router.json").write_text("{}")  # as if a folder around its experts were one that lmoe wrote
    assert "error[output-is-input]" in refusal(capfd, "shrink", recipe, "a", "--out", place, "--force")
    (place / "router.json").unlink()
    arrow = recipe_of(place, ("a", "b", "new"), "type: arrow")
    assert "error[gate-needed]" in refusal(capfd, "shrink", arrow, "a", "--out", out)
    assert "error[not-found]" in refusal(capfd, "grow", recipe, "--expert", "new=./nowhere", "--out", out, code=3)
    assert "error[not-found]" in refusal(
        capfd, "grow", place / "none.yaml", "--expert", f"n={new}", "--out", out, code=3
    )
    other = recipe_of(place, ("a", "new"), "type: gate, artefact: ./gate")
    assert "error[router-experts-differ]" in refusal(capfd, "shrink", other, "a", "--out", out, code=1)
    assert not out.exists()


def test_the_group_alone_says_what_it_has(capfd):
    told = refusal(capfd)
    assert "Usage: lmoe router" in told
    assert "shrink" in told
    assert "error" not in told


def test_the_last_expert_stays(place, capfd):
    recipe = trained(place, ("a",))
    told = refusal(capfd, "shrink", recipe, "a", "--out", place / "out")
    assert "error[expert-last]" in told


def test_an_expert_of_another_base_does_not_join(place, capfd):
    recipe = trained(place)
    tiny.save_base("llama", place / "wide", hidden_size=64)
    made = peft.get_peft_model(tiny.load(place / "wide"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    made.save_pretrained(place / "stranger")
    told = refusal(capfd, "grow", recipe, "--expert", f"new={place / 'stranger'}", "--out", place / "out", code=1)
    assert "error[shape-mismatch]" in told
    assert not (place / "out").exists()


def test_a_gate_that_was_grown_may_be_replaced_by_force(place, capfd):
    recipe = trained(place)
    data(grow(recipe, place / "grown"))
    assert "error[output-exists]" in refusal(
        capfd, "grow", recipe, "--expert", f"new={place / 'new'}", "--out", place / "grown"
    )
    data(grow(recipe, place / "grown", "--force"))
