"""Random experts are as strong as those they stand for, module by module, and know nothing of them."""

from __future__ import annotations

import pytest
import torch

from evaluate.made import loadout, opened
from lmoe_cli.bank.delta import Delta
from lmoe_cli.evaluate.random_experts import noise, random_delta
from lmoe_cli.loadout.layout import Target


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def changes(model):
    """Module → what the blend adds to its weight, by running the module on the identity."""
    found = {}
    for name, module in model.named_modules():
        base = getattr(module, "base", None)
        if isinstance(base, torch.nn.Linear):
            eye = torch.eye(base.in_features)
            with torch.no_grad():
                found[name] = (module(eye) - base(eye)).T
    return found


@pytest.mark.parametrize("variant", ["lora", "rslora", "patterns", "loha", "head"])
def test_every_module_is_changed_as_much_by_noise_as_by_the_expert(variant):
    variants, stage = opened(loadout(one={"variant": variant, "weight": 0.7}))
    stage.take(variants["recipe"])
    before = changes(stage.model)
    stage.take(variants["random"])
    after = changes(stage.model)
    assert before.keys() == after.keys()
    assert len(before) >= 8
    for name, own in before.items():
        assert float(after[name].norm()) == pytest.approx(float(own.norm()), rel=1e-3)
        cosine = torch.nn.functional.cosine_similarity(own.flatten(), after[name].flatten(), dim=0)
        assert abs(float(cosine)) < 0.35


def test_noise_has_the_rank_of_what_it_stands_for():
    delta = Delta(torch.randn(3, 20), torch.randn(30, 3))
    made = random_delta(delta, drawn(), lambda: None)
    assert int(torch.linalg.matrix_rank(made.b @ made.a)) == 3
    assert float((made.b @ made.a).norm()) == pytest.approx(float((delta.b @ delta.a).norm()), rel=1e-4)


def test_an_adapter_that_changes_nothing_stays_so():
    delta = Delta(torch.randn(2, 8), torch.zeros(8, 2))
    assert not random_delta(delta, drawn(), lambda: None).b.any()


def test_vectors_keep_their_length_and_saved_matrices_their_distance():
    weight = torch.randn(6, 4)
    saved = weight.T + 0.1 * torch.randn(4, 6)
    delta = Delta(row=torch.randn(6), column=torch.randn(4), bias=torch.randn(6), saved=saved)
    made = random_delta(delta, drawn(), lambda: weight, transposed=True)
    for name in ("row", "column", "bias"):
        own, other = getattr(delta, name), getattr(made, name)
        assert float(other.norm()) == pytest.approx(float(own.norm()), rel=1e-5)
        assert not torch.allclose(own, other)
    assert float((made.saved - weight.T).norm()) == pytest.approx(float((saved - weight.T).norm()), rel=1e-4)


def test_noise_depends_on_seed_expert_and_module_alone():
    from lmoe_cli.bank.delta import Term

    delta = Delta(torch.randn(2, 8), torch.randn(8, 2))

    def made(seed, names, expert, module):
        target = Target(module, f"{module}.weight", 8, 8)
        return noise(seed, names)(target, Term(expert, delta), lambda: None).delta.a

    first = made(1, ["one", "two"], 0, "a")
    assert torch.equal(first, made(1, ["two", "one"], 1, "a"))
    for other in (made(2, ["one"], 0, "a"), made(1, ["two"], 0, "a"), made(1, ["one"], 0, "b")):
        assert not torch.equal(first, other)
