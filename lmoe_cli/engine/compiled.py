"""Decoding steps as code that torch's compiler made, with keys and values in memory of a fixed size.

On a CUDA device a compiled step is one graph of kernels that is launched at once. The first steps take as long as the
compiler does; prompts are computed as ever. Weights turn without compiling again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_cli.bank.bank import Bank
from lmoe_cli.bank.experts import BlendedExperts
from lmoe_cli.bank.linear import BlendedLinear
from lmoe_cli.bank.whole import BlendedModule
from lmoe_cli.engine.cache import KeyValues
from lmoe_cli.errors import UsageError

ROOM = 1024
"""Tokens there is room for at first; four times as many whenever that is not enough, and then it is compiled again."""

Step = Callable[..., Any]
"""A model's forward for one token of each row."""


def compiled_step(model: nn.Module, name: str = "step") -> Step:
    """A model's forward, compiled when it is called for the first time.

    Args:
        model: What stands on its layers may change; it is compiled again then.
        name: Unique among those that run in turn: what the compiler made is looked up by it.
    """
    forward = model.forward
    unroll(model)

    def call(**words: Any) -> Any:
        return forward(**words)

    call.__code__ = call.__code__.replace(co_name=name)
    is_cuda = next(model.parameters()).device.type == "cuda"
    made: Step = torch.compile(call, dynamic=False, fullgraph=True, mode="reduce-overhead" if is_cuda else None)
    return made


def unroll(model: nn.Module) -> None:
    """Make ready what stands on a model for steps that are compiled."""
    for module in model.modules():
        if isinstance(module, BlendedModule):
            module.unroll()
        elif isinstance(module, BlendedLinear) and module.b is not None:
            module.b.lay_by_row()


def require_traceable(bank: Bank) -> None:
    """Refuse experts whose products depend on which experts of a mixture a token meets, which no graph can hold.

    Raises:
        UsageError: There are some.
    """
    for name, module in bank.modules.items():
        if isinstance(module, BlendedExperts):
            message = f"steps with LoRA on the experts of a mixture are not compiled: {name}"
            raise UsageError("compile-unsupported", message, hint="leave --compile out")


def require_compiles(model: nn.Module) -> None:
    """Refuse a model whose steps are no single graph, or that keeps something else than keys and values.

    Raises:
        UsageError: So it is.
    """
    hint = "leave --compile out"
    if not getattr(model, "_can_compile_fullgraph", False):
        message = f"transformers does not compile {type(model).__name__} as one graph"
        raise UsageError("compile-unsupported", message, hint=hint)
    try:
        _empty_cache(model, 1)
    except ValueError as error:
        message = f"{type(model).__name__} keeps {error}, which has no fixed size"
        raise UsageError("compile-unsupported", message, hint=hint) from error


def _empty_cache(model: nn.Module, room: int) -> Any:
    """Room for the keys and values of so many tokens in every layer.

    Layers that look back through a window get room for all tokens too, and a mask: the cache that transformers has for
    them counts tokens outside of the graph, which then is compiled anew for every one of them.

    Raises:
        ValueError: Naming what else the model keeps.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    config: Any = model.config
    cache = StaticCache(config=config, max_cache_len=room)
    if others := {type(layer) for layer in cache.layers} - {StaticLayer, StaticSlidingWindowLayer}:
        raise ValueError(", ".join(sorted(kind.__name__ for kind in others)))
    cache.layers = [StaticLayer(max_cache_len=room) for _ in cache.layers]
    return cache


class CompiledKeyValues(KeyValues):
    """Computes single tokens by a compiled step. See `KeyValues`.

    Args:
        model: The base with its bank.
        step: From `compiled_step`.
        **words: As there.
    """

    def __init__(self, model: nn.Module, step: Step, **words: Any) -> None:
        super().__init__(model, **words)
        self._step = step
        self._room = ROOM
        self._takes_places = "position_ids" in inspect.signature(model.forward).parameters

    def clear(self) -> None:
        self._tokens = []
        if self._cache is not None:
            self._cache.reset()

    def _prepare(self, tokens: list[int]) -> None:
        if self._cache is not None and len(tokens) <= self._room:
            return
        while self._room < len(tokens):
            self._room *= 4
        self._tokens, self._cache = [], _empty_cache(self._model, self._room)

    def _compute(self, ids: Tensor, start: int) -> Any:
        if ids.shape[1] > 1 or start == 0:
            return super()._compute(ids, start)
        places = {"position_ids": torch.full((1, 1), start, device=self._device)} if self._takes_places else {}
        from torch._dynamo.exc import TorchDynamoException

        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        try:
            return self._step(input_ids=ids, past_key_values=self._cache, use_cache=True, **places)
        except TorchDynamoException as error:
            reason = " ".join(str(error).partition("\n\nSet TORCH")[0].split())[:200]  # advice for torch's developers
            hint = "leave --compile out; on a CPU it needs a C++ compiler"
            raise UsageError("compile-failed", f"torch could not compile the model: {reason}", hint=hint) from error

    def _goes_on_with_several(self) -> bool:
        return True

    def _rewind(self, length: int) -> None:
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(length)  # what follows is masked, and written over
        self._tokens = self._tokens[:length]


def key_values(model: nn.Module, step: Step | None, **words: Any) -> KeyValues:
    """Empty keys and values of a conversation, computed by a compiled step where there is one.

    Args:
        model: The base with its bank.
        step: From `compiled_step`.
        **words: Of `KeyValues`.
    """
    return CompiledKeyValues(model, step, **words) if step else KeyValues(model, **words)
