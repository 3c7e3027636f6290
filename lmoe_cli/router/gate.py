"""A trained gate: a linear map of each token's activations, at every place that has one of its own.

    z = (W_r x / rms(x) + b) / tau                                  scores; ours, so that they do not depend on |x|

    softmax   g = softmax(z)                                        Jacobs et al. 1991, eq. 1.2
    topk      g = softmax(z) over the k largest z, else 0           Shazeer et al. 2017, eq. 3    arXiv 1701.06538
    sigmoid   g_e = 1 / (1 + exp(-z_e))                             each expert by itself
    hard1     g = onehot(argmax z) forward, softmax(z) backward     Bengio et al. 2013, sec. 3.2  arXiv 1308.3432

A zero expert is one more row of W_r whose gate is dropped: what goes there adds nothing to the base. The idea of a gate
over whole adapters, trained end to end, is that of L-MoE (arXiv 2510.17898, withdrawn by its authors since); the
normalisation and the choice of places are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmoe_cli.bank.routed import Place, Route, Routing
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.loadout.routers import GateRouter as Settings
from lmoe_cli.loadout.trained import GateSettings, TrainedGate
from lmoe_cli.router.surroundings import Surroundings
from lmoe_cli.router.token import TokenRouter, sparse


class Gate(nn.Module):
    """The gate of one place.

    Args:
        width: d.
        count: E.
        settings: How scores become gates.
    """

    def __init__(self, width: int, count: int, settings: GateSettings) -> None:
        super().__init__()
        self.count, self.settings = count, settings
        rows = count + settings.zero_expert
        self.weight = nn.Parameter(torch.zeros(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows))
        self.scores: Tensor | None = None
        """z of the last input, (..., E), where `keeps_scores` says so."""
        self.keeps_scores = False

    def forward(self, x: Tensor) -> Routing:
        """Route tokens: (..., d), any float dtype → gates (..., E), float32."""
        normed = F.rms_norm(x.float(), x.shape[-1:])
        scores = F.linear(normed, self.weight, self.bias) / self.settings.temperature
        if self.keeps_scores:
            self.scores = scores
        return gates_of(scores, self.settings, self.count)


def gates_of(scores: Tensor, settings: GateSettings, count: int) -> Routing:
    """Scores → gates.

    Args:
        scores: z, (..., E), or (..., E + 1) with a zero expert; float32.
        settings: Which activation.
        count: E.
    """
    match settings.activation:
        case "softmax":
            return Routing(torch.softmax(scores, dim=-1)[..., :count])
        case "sigmoid":
            return Routing(torch.sigmoid(scores))
        case "topk":
            return _of_experts(sparse(scores, min(settings.kept or 1, scores.shape[-1])), count)
        case "hard1":
            return _hard(scores, count)


def _hard(scores: Tensor, count: int) -> Routing:
    best = scores.argmax(dim=-1, keepdim=True)  # (..., 1)
    one = torch.zeros_like(scores).scatter(-1, best, 1.0)
    if scores.requires_grad:
        soft = torch.softmax(scores, dim=-1)
        one = one + (soft - soft.detach())
    if scores.requires_grad:
        return Routing(one[..., :count])
    return _of_experts(Routing(one, (best, torch.ones_like(best, dtype=scores.dtype))), count)


def _of_experts(routing: Routing, count: int) -> Routing:
    """The same without a zero expert: where it was chosen, the first one stands with a gate of 0."""
    values, chosen = routing
    if values.shape[-1] == count or chosen is None:
        return routing
    experts, gates = chosen
    is_none = experts == count
    return Routing(values[..., :count], (experts.masked_fill(is_none, 0), gates.masked_fill(is_none, 0.0)))


class GateRouter(TokenRouter):
    """Gates that were trained. See `StaticRouter` for arguments."""

    settings: Settings

    def prepare(self, around: Surroundings) -> None:
        gate = around.loadout.gate
        assert gate is not None, "the loadout was resolved"
        settings, names = gate.settings.changed_by(self.settings), [expert.name for expert in around.loadout.experts]
        self.gates_at = read_gates(gate, settings, around.places.values(), names, around.device)
        super().prepare(around)

    def route_at(self, place: Place) -> Route:
        return self.gates_at[place.name]


def read_gates(
    trained: TrainedGate, settings: GateSettings, places: Iterable[Place], names: Sequence[str], device: torch.device
) -> dict[str, Gate]:
    """Read a trained gate, its rows brought into the order of the loadout's experts.

    Args:
        trained: Its files are on this machine.
        settings: What to run it with.
        places: What has gates of its own.
        names: Of the loadout's experts, in the order of the bank.
        device: Where the gates are to be.

    Raises:
        InvalidFileError: It has no weights for a place, weights of another width, or numbers that are not finite.
    """
    rows = list(trained.experts)
    order = [rows.index(name) for name in names] + [len(rows)] * settings.zero_expert
    found: dict[str, Gate] = {}
    with TensorReader(trained.stored, trained.source.require) as reader:
        for place in places:
            where = f"{trained.source.ref}: {place.name}"
            if place.name not in trained.places:
                hint = "its experts act elsewhere than those it was trained with: train it again"
                raise InvalidFileError("router-place-missing", f"{where}: it has no gate there", hint=hint)
            weight, bias = (reader.tensor(f"{place.name}.{leaf}")[order] for leaf in ("weight", "bias"))
            if weight.shape[1] != place.width:
                message = f"{where}: a gate for {weight.shape[1]} numbers per token, which has {place.width} here"
                raise InvalidFileError("router-invalid", message, hint="it was trained on another base")
            if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
                raise InvalidFileError(
                    "weights-not-finite", f"{where} holds NaN or infinity", hint="its training diverged"
                )
            gate = found[place.name] = Gate(place.width, len(names), settings)
            gate.load_state_dict({"weight": weight, "bias": bias})
            gate.requires_grad_(False).to(device)
    return found
