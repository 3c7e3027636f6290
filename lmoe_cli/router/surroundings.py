"""What a router is given to look at when a loadout is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmoe_cli.bank.routed import Place
from lmoe_cli.loadout.loadout import Loadout

Embed = Callable[[str], Tensor]
"""Text → (d,), float32, on the CPU."""


@dataclass(frozen=True)
class Surroundings:
    """The loadout, as it is loaded."""

    loadout: Loadout
    model: nn.Module
    """The base."""
    places: Mapping[str, Place]
    """What has gates of its own, by name; of token routers alone."""
    embed: Embed
    """Embeds a text by the base alone: the mean over its tokens of what leaves one of the blocks."""
    device: torch.device
