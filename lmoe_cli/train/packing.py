"""Whether a base keeps examples apart that share a row."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmoe_cli.errors import UsageError

LENGTH = 8
"""Tokens of each of the two examples that are tried."""
LEAST = 0.05
"""Part of the logits, by root mean square, that tells another text from rounding in 16 bits."""


@torch.no_grad()
def require_apart(model: nn.Module, name: str, device: torch.device) -> None:
    """Refuse a base on which an example changes what comes after it in its row.

    Where one example ends and the next begins is told by ``position_ids`` alone. Attention heeds that on most
    architectures of transformers; recurrent ones, and attention that has positions of its own, do not.

    Args:
        model: The base, with experts on it or not.
        name: Of the base.
        device: Of the model.

    Raises:
        UsageError: It does.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    tokens = (torch.arange(2 * LENGTH, device=device)[None] * 7 + 3) % vocabulary
    positions = torch.arange(LENGTH, device=device)[None]
    alone = _logits(model, tokens[:, LENGTH:], positions)
    packed = _logits(model, tokens, torch.cat([positions, positions], 1))[:, LENGTH:]
    spread = (alone - alone.mean(-1, keepdim=True)).norm()
    if not (packed - alone).norm() <= LEAST * spread:
        message = f"{name}: examples that share a row would see each other on this architecture"
        raise UsageError("packing-leaks", message, hint="leave 'packing' out", where=name)


def _logits(model: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    found: Tensor = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return found.float()
