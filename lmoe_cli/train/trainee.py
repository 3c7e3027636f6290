"""The module that is trained: a base with experts on it, its gate, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmoe_cli.bank.gates import Gates
from lmoe_cli.bank.linear import BlendedLinear
from lmoe_cli.engine.some_logits import logits_at
from lmoe_cli.loadout.trained import GateSettings
from lmoe_cli.router.gate import Gate
from lmoe_cli.train.losses import GateLoss, gate_loss, nats
from lmoe_cli.train.spool import IGNORED


class Losses(NamedTuple):
    """Of one batch."""

    nats: Tensor
    """Sum over learned tokens of -log p."""
    gate: GateLoss | None


class Trainee(nn.Module):
    """What an optimiser sees. Names of parameters are those in checkpoints.

    Args:
        base: With experts on it, frozen.
        knobs: The model's own gates.
        factors: Name → parameter of experts that are trained.
        gates: Place → its gate, where there is one.
        sends: Every token meets the expert alone whose data it is from, at the strength of the data.
    """

    def __init__(
        self,
        base: nn.Module,
        knobs: Gates,
        factors: Mapping[str, nn.Parameter],
        gates: Mapping[str, Gate],
        *,
        sends: bool,
    ) -> None:
        super().__init__()
        self.base = base
        self.knobs = knobs
        self.sends = sends
        self.factors = nn.ParameterDict({_key(name): parameter for name, parameter in factors.items()})
        self.gates = nn.ModuleDict({_key(name): gate for name, gate in gates.items()})
        head = base.get_output_embeddings()  # type: ignore[operator]
        self._heads_have_gates = sends and isinstance(head, BlendedLinear)
        for gate in gates.values():
            gate.keeps_scores = True

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Name → parameter, of all that are trained."""
        return {name: own for name, own in self.named_parameters() if own.requires_grad}

    @property
    def settings(self) -> GateSettings | None:
        """Of the gate."""
        return next((gate.settings for gate in self._own_gates()), None)

    def forward(self, input_ids: Tensor, labels: Tensor, experts: Tensor, strengths: Tensor, **words: Tensor) -> Losses:
        """The losses of a batch. See `Rows.collate` for what it holds."""
        if self.sends:
            own = torch.eye(self.knobs.count + 1, device=experts.device)[experts][..., : self.knobs.count]
            self.knobs.set(own * strengths[..., None])
        targets = labels[:, 1:]
        places = (targets != IGNORED).any(0).nonzero().flatten()  # (P,)
        if self._heads_have_gates:  # of every token, so the head has to see every token
            logits = self.base(input_ids=input_ids, use_cache=False, **words).logits[:, places]
        else:
            logits = logits_at(self.base, places, input_ids=input_ids, **words)
        gate = self._gate_loss(labels != IGNORED) if self.training else None
        return Losses(nats(logits, targets[:, places], IGNORED), gate)

    def _gate_loss(self, learned: Tensor) -> GateLoss | None:
        gates = self._own_gates()
        found = [gate.scores for gate in gates if gate.scores is not None]
        for gate in gates:
            gate.scores = None
        same = [scores for scores in found if scores[..., 0].numel() == learned.numel()]  # a head sees fewer tokens
        return gate_loss(same, learned, gates[0].settings) if same else None

    def _own_gates(self) -> list[Gate]:
        return [gate for gate in self.gates.values() if isinstance(gate, Gate)]


def _key(name: str) -> str:
    """A name that a module may hold something under."""
    return name.replace(".", "/")
