"""What is told of a gate, and what it is trained by, beside the same worked out token by token."""

from __future__ import annotations

import math

import pytest
import torch

from lmoe_cli.loadout.trained import GateSettings
from lmoe_cli.train.losses import gate_loss

LEARNED = torch.tensor([[True, True, True, False], [True, False, True, True]])
KINDS = [
    GateSettings(activation="softmax"),
    GateSettings(activation="topk", top_k=2),
    GateSettings(activation="sigmoid"),
    GateSettings(activation="hard1"),
    GateSettings(activation="topk", top_k=2, zero_expert=True),
]
named = pytest.mark.parametrize("settings", KINDS, ids=lambda one: f"{one.activation}{'-none' * one.zero_expert}")


def scores(settings, places=3):
    generator = torch.Generator().manual_seed(4)
    made = [torch.randn(2, 4, 4 + settings.zero_expert, generator=generator) for _ in range(places)]
    return [one.double().requires_grad_() for one in made]


def acting(z, settings):
    """The gates of one token as they act, in all 1."""
    gates = [1 / (1 + math.exp(-one)) if settings.activation == "sigmoid" else math.exp(one) for one in z]
    least = sorted(z)[-settings.kept] if settings.kept else -math.inf
    gates = [gate if one >= least else 0.0 for gate, one in zip(gates, z, strict=True)]
    return [gate / sum(gates) for gate in gates]


def entropy(shares):
    return -sum(share * math.log(share) for share in shares if share)


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@named
def test_experts_in_use_are_counted_by_the_gates_that_act_at_each_place(settings):
    places = scores(settings)
    due = [math.exp(entropy(mean([acting(token.tolist(), settings) for token in place[LEARNED]]))) for place in places]
    assert float(gate_loss(places, LEARNED, settings).effective) == pytest.approx(sum(due) / len(due), rel=1e-5)


@pytest.mark.parametrize(("kept", "used"), [(1, 1.0), (2, 2.0)])
def test_experts_that_always_win_narrowly_are_the_only_ones_in_use(kept, used):
    """And places that each use another one use no more for that."""
    settings = GateSettings(activation="topk", top_k=kept)
    places = [torch.full((2, 4, 5), 0.0).index_fill(-1, torch.arange(kept) + place, 1e-3) for place in range(3)]
    assert float(gate_loss(places, LEARNED, settings).effective) == pytest.approx(used, rel=1e-3)


@named
def test_balance_and_z_are_the_equations_and_so_are_their_gradients(settings):
    places = scores(settings)
    found = gate_loss(places, LEARNED, settings)
    balance, z, load = 0.0, 0.0, torch.zeros(places[0].shape[-1])
    for place in places:
        tokens = place[LEARNED]
        gates = torch.sigmoid(tokens) if settings.activation == "sigmoid" else tokens.exp()
        kept = settings.kept or 1
        best = tokens.detach() >= tokens.detach().sort(-1).values[:, -kept, None]
        f = (best / kept).mean(0)
        balance += len(f) * (f * (gates / gates.sum(-1, keepdim=True)).mean(0)).sum() / len(places)
        z += tokens.exp().sum(-1).log().square().mean() / len(places)
        load += f / len(places)
    torch.testing.assert_close((found.balance, found.z, found.load), (balance, z, load), check_dtype=False)
    for ours, theirs in ((found.balance, balance), (found.z, z)):
        for pair in zip(
            torch.autograd.grad(ours, places, retain_graph=True),
            torch.autograd.grad(theirs, places, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(*pair)


@named
def test_gradients_of_the_losses_are_finite_differences(settings):
    """f does not depend on the scores but where the order of two experts turns, which no difference here reaches."""
    places = scores(settings, places=2)

    def total(*given):
        found = gate_loss(given, LEARNED, settings)
        return 0.3 * found.balance + 0.2 * found.z

    assert torch.autograd.gradcheck(total, places, eps=1e-6, atol=1e-6)
