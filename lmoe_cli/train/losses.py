"""What a gate is trained by beside the language model's loss, and what is told of it.

    L = L_LM + balance * E sum_e f_e P_e + z * mean (logsumexp z)^2

    f_e   share of the tokens that choose e                          Fedus et al. 2021 (Switch), eq. 4-6
    P_e   mean over tokens of softmax(z)_e                           https://arxiv.org/abs/2101.03961
    z     scores of a token                                          Zoph et al. 2022 (ST-MoE), eq. 5, arXiv 2202.08906

Both are means over places and over the tokens that are learned, those of all processes: f carries no gradient and P is
a sum over tokens, so each process adds its own tokens' part of the gradient. Of a gate that lets several experts act, a
token's choice is shared among them; a sigmoid's scores are made to sum to 1 first. A zero expert is one more expert
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from lmoe_cli.loadout.trained import GateSettings


@dataclass(frozen=True)
class GateLoss:
    """Of one batch."""

    balance: Tensor
    """E sum f P; 1 where all experts are used alike."""
    z: Tensor
    load: Tensor
    """Mean over places of f, (E,), detached; with a zero expert one more."""
    entropy: Tensor
    """Mean over places and tokens of the entropy of softmax(z), in nats; detached."""
    effective: Tensor
    """Mean over places of exp of the entropy of the mean over tokens of the gates as they act, made to sum to 1: how
    many experts are in use; detached."""


def gate_loss(scores: Sequence[Tensor], learned: Tensor, settings: GateSettings) -> GateLoss:
    """The losses of a gate.

    Args:
        scores: z of each place, (B, T, E) or flattened, float32.
        learned: Which tokens count, (B, T), bool.
        settings: How scores become gates.
    """
    own = torch.stack([one.reshape(-1, one.shape[-1]) for one in scores])  # (places, B x T, E)
    weight = learned.reshape(1, -1, 1).float()
    count = _all(weight.sum()).clamp(min=1)  # of all processes
    shares = _shares(own, settings)
    chosen = _chosen(own.detach(), settings)
    load = _all((chosen * weight).sum(1)) / count  # (places, E)
    mine = (shares * weight).sum(1) / count * _processes()
    balance = own.shape[-1] * (load * mine).sum(1).mean()
    z = ((torch.logsumexp(own, dim=-1) ** 2 * weight[..., 0]).sum(1) / count * _processes()).mean()
    with torch.no_grad():
        entropy = _all((_entropy(shares) * weight[..., 0]).sum(1)) / count
        used = _all((_acting(own, settings) * weight).sum(1))  # (places, E)
        effective = _entropy(used / used.sum(-1, keepdim=True).clamp(min=1e-9)).exp()
        return GateLoss(balance, z, load.mean(0), entropy.mean(), effective.mean())


def _shares(scores: Tensor, settings: GateSettings) -> Tensor:
    if settings.activation != "sigmoid":
        return torch.softmax(scores, dim=-1)
    gates = torch.sigmoid(scores)
    return gates / gates.sum(-1, keepdim=True).clamp(min=1e-9)


def _acting(scores: Tensor, settings: GateSettings) -> Tensor:
    """Gates as they act, made to sum to 1: of those that choose, nothing for an expert that is not chosen."""
    shares = _shares(scores, settings)
    if settings.kept is None:
        return shares
    kept = shares * (_chosen(scores, settings) > 0)
    return kept / kept.sum(-1, keepdim=True)


def _chosen(scores: Tensor, settings: GateSettings) -> Tensor:
    kept = min(settings.kept or 1, scores.shape[-1])
    best = scores.topk(kept, dim=-1).indices
    return torch.zeros_like(scores).scatter(-1, best, 1.0 / kept)


def _entropy(shares: Tensor) -> Tensor:
    return -(shares * shares.clamp(min=1e-12).log()).sum(-1)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all(value: Tensor) -> Tensor:
    """The sum over processes, without a gradient."""
    total = value.detach().clone()
    if _processes() > 1:
        dist.all_reduce(total)
    return total


def nats(logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
    """Sum of -log p over the targets.

    Args:
        logits: (B, P, V), any float dtype.
        targets: (B, P), int64.
        ignored: Target that does not count.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=ignored, reduction="sum")
