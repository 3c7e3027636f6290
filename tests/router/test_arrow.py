"""Arrow sends tokens where PEFT's Arrow sends them, and computes what a plain loop over experts computes."""

from __future__ import annotations

import warnings

import peft
import pytest
import tiny
import torch
from laws.cases import assert_close, case
from router.made import NAMES, deltas, loadout_of, logits_by_hand

from lmoe_cli.engine.build import start
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.router.arrow import first_right_singular_vector

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def siblings(module, known):
    parent, _, leaf = module.rpartition(".")
    group = next((group for group in GROUPS if leaf in group), (leaf,))
    return [name for other in group if (name := f"{parent}.{other}") in known]


def by_hand(loadout, tokens, top_k, temperature):
    """Gates from the singular vectors of dense deltas, those of siblings one above the other."""
    own = deltas(loadout)

    def gates_at(module, x):
        vectors = []
        for number in range(len(loadout.experts)):
            dense = [b @ a for name in siblings(module, own) if number in own[name] for b, a in [own[name][number]]]
            vectors.append(torch.linalg.svd(torch.cat(dense)).Vh[0] if dense else torch.zeros(x.shape[-1]))
        scores = (x @ torch.stack(vectors).T).abs()
        kept = scores >= scores.topk(min(top_k, scores.shape[-1]), -1).values[..., -1:]
        return torch.softmax((scores / temperature).masked_fill(~kept, -torch.inf), -1)

    return logits_by_hand(loadout, tokens, gates_at)


@pytest.mark.parametrize("top_k", [1, 2, 9])
@pytest.mark.parametrize("shape", [(1, 1), (2, 7)])
def test_arrow_is_what_dense_deltas_say(tmp_path, top_k, shape):
    loadout = loadout_of({"type": "arrow", "top_k": top_k, "temperature": 0.7})
    tokens = tiny.tokens(*shape)
    found = start(loadout, device="cpu", dtype="float32").logits(tokens)
    assert_close(found, by_hand(loadout, tokens, top_k, 0.7))


def test_where_every_site_is_one_module_arrow_is_that_of_peft(tmp_path):
    base = case("llama", "lora").base
    folders = []
    for number in range(4):
        torch.manual_seed(number)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
        made = peft.get_peft_model(tiny.load(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "lora_B" in name:
                    parameter[:, 0] *= 5  # one direction stands out: PEFT takes only fifteen steps towards it
        made.save_pretrained(tmp_path / f"e{number}")
        folders.append(str(tmp_path / f"e{number}"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.ArrowConfig(top_k=2, router_temperature=0.5)
        theirs = peft.create_arrow_model(tiny.load(base), folders, config).eval()
        with torch.no_grad():
            expected = theirs(tiny.tokens()).logits
    experts = {f"e{number}": {"adapter": folder} for number, folder in enumerate(folders)}
    router = {"type": "arrow", "top_k": 2, "temperature": 0.5}
    recipe = Recipe.model_validate({"base": str(base), "experts": experts, "router": router})
    found = start(resolve(recipe, "a test"), device="cpu", dtype="float32").logits(tiny.tokens())
    assert_close(found, expected)


def test_directions_come_from_small_matrices_alone(tmp_path):
    torch.manual_seed(0)
    factors = [(torch.randn(rank, 50), torch.randn(d_out, rank)) for rank, d_out in ((3, 40), (5, 7), (2, 60))]
    dense = torch.cat([b @ a for a, b in factors])
    expected = torch.linalg.svd(dense.double()).Vh[0].float()
    found = first_right_singular_vector(factors)
    torch.testing.assert_close(found * torch.sign(found @ expected), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_that_does_nothing_has_no_direction():
    assert not first_right_singular_vector([(torch.randn(2, 8), torch.zeros(4, 2))]).any()


@pytest.mark.parametrize("variant", ["lora", "dora", "patterns", "lora_bias", "ia3"])
def test_a_token_after_the_other_gives_the_logits_of_the_whole_text(tmp_path, variant):
    names = NAMES[:2] if variant == "ia3" else NAMES
    engine = start(loadout_of({"type": "arrow", "top_k": 2}, variant, names=names), dtype="float32")
    text = tiny.tokens(1, 12)
    whole = engine.logits(text)[0]
    values = engine.key_values()
    for length in range(1, 13):
        assert_close(values.logits(text[0, :length].tolist(), engine.blend), whole[length - 1])
        assert values.reused == length - 1


@pytest.mark.parametrize("variant", ["dora", "lora_bias"])
def test_with_one_expert_arrow_is_that_adapter_alone(tmp_path, variant):
    loadout = loadout_of({"type": "arrow"}, variant, names=("zero",))
    with torch.no_grad():
        expected = tiny.peft_model(loadout.base.source.path, loadout.experts[0].adapter.source.path)(
            tiny.tokens()
        ).logits
    assert_close(start(loadout, dtype="float32").logits(tiny.tokens()), expected)


def test_weights_multiply_what_the_router_says_and_0_is_the_base(tmp_path):
    loadout = loadout_of({"type": "arrow", "top_k": 2})
    engine = start(loadout, dtype="float32")
    engine.set_weights(dict.fromkeys(NAMES, 0.0))
    alone = engine.logits(tiny.tokens())
    engine.set_weights(dict.fromkeys(NAMES, 1.0))
    routed = engine.logits(tiny.tokens())
    assert not torch.allclose(routed, alone, atol=1e-2)
    engine.set_weights(one=0.0, two=0.5)
    turned = engine.logits(tiny.tokens())
    assert not torch.allclose(turned, routed, atol=1e-3)
    engine.set_weights(dict.fromkeys(NAMES, 1.0))
    assert torch.equal(engine.logits(tiny.tokens()), routed)
    assert torch.equal(alone, engine.detach()(tiny.tokens()).logits)


def test_experts_of_a_mixture_are_routed_too(tmp_path):
    loadout = loadout_of({"type": "arrow", "top_k": 1}, "experts", arch="qwen3_moe", names=NAMES[:2])
    engine = start(loadout, dtype="float32")
    with engine.router.watched() as seen:
        both = engine.logits(tiny.tokens())
    assert seen["model.layers.0.mlp.experts"][0].shape == (1, 14, 2)
    engine.set_weights(one=0.0)
    assert not torch.allclose(engine.logits(tiny.tokens()), both, atol=1e-4)
