"""A text as one vector: the mean over its tokens of what leaves a block of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lmoe_cli.bank.blocks import block_names
from lmoe_cli.engine.widened import for_model
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from lmoe_cli.engine.engine import Engine


class _ReachedError(Exception):
    """The block has been computed; what follows it is of no interest."""

    def __init__(self, states: Tensor) -> None:
        self.states = states


def middle_block(model: nn.Module, layer: int | None) -> nn.Module:
    """The block whose output embeds texts.

    Args:
        model: The base.
        layer: Its number; that in the middle when None.

    Raises:
        UsageError: The model has no such block.
    """
    names = block_names(model)
    number = (len(names) - 1) // 2 if layer is None else layer
    if not 0 <= number < len(names):
        hint = f"'layer' is from 0 to {len(names) - 1}" if names else "name a sentence-transformers model as 'encoder'"
        raise UsageError("layer-missing", f"{type(model).__name__} has no block {number} to embed texts by", hint=hint)
    return model.get_submodule(names[number])


def embedded(engine: Engine, text: str) -> Tensor:
    """See `Engine.embed`."""
    block = middle_block(engine.model, getattr(engine.router.settings, "layer", None))
    tokens = engine.tokenizer(text or " ")["input_ids"][: engine.context] or [engine.tokenizer.eos_token_id or 0]
    gates = engine.bank.gates
    with engine.still(), for_model(engine.model):
        before = gates.values.clone()
        gates.set(torch.zeros_like(before[:1]))
        try:
            return mean_state(engine.model, block, tokens)
        finally:
            gates.set(before)


@torch.inference_mode()
def mean_state(model: nn.Module, block: nn.Module, tokens: Sequence[int]) -> Tensor:
    """The mean over tokens of a block's output. The rest of the model is not computed.

    The first token is left out where there are more: it draws attention whatever it is, and its state is alike for all
    texts.

    Args:
        model: As it stands, with or without experts.
        block: From `middle_block`.
        tokens: At least one.

    Returns:
        (d,), float32, on the CPU.
    """

    def stop(*told: Any) -> None:
        output = told[-1]
        raise _ReachedError(output if isinstance(output, Tensor) else output[0])

    hook = block.register_forward_hook(stop)
    try:
        model(input_ids=torch.tensor([list(tokens)], device=next(model.parameters()).device), use_cache=False)
    except _ReachedError as reached:
        states = reached.states[0].float()  # (T, d)
        return (states[1:] if len(states) > 1 else states).mean(0).cpu()
    finally:
        hook.remove()
    raise AssertionError("every forward passes through every block")
