"""The modules of a loaded model: found by the names that adapters and checkpoints use, and their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_cli.errors import LmoeError, UsageError
from lmoe_cli.loadout.layout import DOWN, HALVES, HEADS, ONE_EXPERT, Assignment, module_key

COMPUTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes whose numbers are the weights themselves."""


@dataclass(frozen=True)
class Location:
    """Where in a loaded model an assignment acts."""

    module: str
    """Name among ``model.named_modules()``."""
    parameter: str | None = None
    """Of a module with fused experts."""
    index: int | None = None
    """Which expert of the mixture."""
    rows: tuple[int, int] | None = None
    """Which outputs of that slice."""


class Tree:
    """The modules of a loaded model by name, with or without the wrappers in front.

    Args:
        model: A causal language model of transformers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self._by_key: dict[str, list[str]] = {}
        for name in self.modules:
            self._by_key.setdefault(module_key(name), []).append(name)

    def find(self, item: Assignment) -> Location:
        """Find where an assignment acts.

        Raises:
            LmoeError: The model class has no such module, though the checkpoint has its tensor.
        """
        for name in (item.part.module, item.target.module):
            if (found := self._module(name)) is not None:
                return Location(found)
        match = ONE_EXPERT.match(item.target.module)
        experts = self._module(match["parent"]) if match else None
        if match and experts is not None:
            leaf, index = match["leaf"], int(match["number"])
            if leaf in DOWN:
                return Location(experts, "down_proj", index)
            if leaf in HALVES and hasattr(self.modules[experts], "gate_up_proj"):
                half, middle = HALVES[leaf], item.target.d_out
                return Location(experts, "gate_up_proj", index, (half * middle, (half + 1) * middle))
            return Location(experts, "up_proj" if leaf in HALVES else leaf, index)
        message = f"the model class has no module {item.part.module}"
        hint = "this version of transformers may call it differently"
        raise LmoeError("module-unknown", message, hint=hint, where=item.part.module)

    def stored(self, place: Location) -> Tensor:
        """The parameter, or slice of one, at a place, as the module keeps it: a view into the model."""
        module = self.modules[place.module]
        parameter: Tensor = getattr(module, place.parameter or "weight")
        if place.index is None:
            return parameter.detach()
        return self.rows(parameter.detach()[place.index], place)

    def rows(self, matrix: Tensor, place: Location) -> Tensor:
        """The outputs that a place means, of the matrix they are in: a view."""
        if place.rows is None:
            return matrix
        return matrix[:, slice(*place.rows)] if self.is_transposed(place) else matrix[slice(*place.rows)]

    def is_transposed(self, place: Location) -> bool:
        """Whether the parameter at a place is kept as (d_in, d_out)."""
        module = self.modules[place.module]
        return bool(getattr(module, "is_transposed", False)) if place.parameter else is_transposed(module)

    def is_quantized(self, place: Location) -> bool:
        """Whether the parameter at a place is not made of the numbers it stands for."""
        return is_packed(self.modules[place.module]) or self.stored(place).dtype not in COMPUTED

    def weight(self, place: Location) -> Tensor:
        """The matrix W at a place, (d_out, d_in), float32, on the CPU; of a quantised module what it stands for."""
        module = self.modules[place.module]
        stored = dequantized(module) if is_packed(module) else self.stored(place)
        if stored.dtype not in COMPUTED:  # scaled by numbers beside it
            message = f"{place.module}: an expert needs its weights, which are kept as {stored.dtype}"
            raise UsageError("base-dtype-unsupported", message, hint="name a base that is not quantised")
        matrix = _gathered(stored).to("cpu", torch.float32)
        return matrix.T if self.is_transposed(place) and matrix.dim() == 2 else matrix

    def bias(self, place: Location) -> Tensor | None:
        """The bias at a place, (d_out,), float32, on the CPU."""
        bias = getattr(self.modules[place.module], "bias", None)
        if not isinstance(bias, Tensor) or place.parameter:
            return None
        return _gathered(bias.detach()).to("cpu", torch.float32)

    def _module(self, name: str) -> str | None:
        if name in self.modules:
            return name
        parent, _, leaf = name.rpartition(".")
        names = [f"{parent}.{head}" if parent else head for head in HEADS] if leaf in HEADS else [name]
        found = [own for one in names for own in self._by_key.get(module_key(one), [])]
        return found[0] if len(found) == 1 else None


def _gathered(tensor: Tensor) -> Tensor:
    """What all processes hold of a tensor that is spread over them; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return gather() if gather else tensor


def is_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as (d_in, d_out)."""
    return type(module).__name__ == "Conv1D" or isinstance(module, nn.Embedding)


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes W x + b: a linear layer, a quantised one, or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def is_lookup(module: nn.Embedding) -> bool:
    """Whether an embedding looks rows up, scales them by its ``embed_scale`` where it has one, and does no more."""
    is_plain = type(module).forward is nn.Embedding.forward
    return is_plain or (hasattr(module, "embed_scale") and not list(module.children()))


def input_width(module: nn.Module) -> int:
    """Inputs d_in of a linear layer or Conv1D."""
    return int(module.in_features) if isinstance(module, nn.Linear) else int(getattr(module, "nx", 0))


def is_packed(module: nn.Module) -> bool:
    """Whether bitsandbytes packed a module's own weight, in whatever dtype the bytes are kept."""
    own = dict(module.named_parameters(recurse=False)).get("weight")  # wrappers show that of what they hold
    return type(own).__name__ in ("Params4bit", "Int8Params")


def dequantized(module: nn.Module) -> Tensor:
    """What a packed weight stands for, (d_out, d_in), to be read before the first product packs it otherwise."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    state = getattr(module, "state", None)
    dense: Tensor = dequantize_bnb_weight(module.weight, state=state)
    return dense


def scales(module: nn.Module) -> list[Tensor]:
    """The scales of a packed weight as they lie beside it: of rows, of blocks, and of scales that are packed too."""
    weight: Any = module.weight
    blocks = getattr(weight, "quant_state", None)
    if blocks is not None:
        outer = getattr(blocks, "state2", None)
        return [blocks.absmax] if outer is None else [blocks.absmax, outer.absmax, outer.code]
    state: Any = module.state
    return [state.SCB if weight.SCB is None else weight.SCB]


def compute_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype a module computes in; ``default`` where its weight is quantised."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dtype in COMPUTED and not is_packed(module):
        return weight.dtype
    return default


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each layer that a fresh expert may change: linear ones but for the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in model.named_modules():
        if is_linear(module) and module is not head:
            yield name, module
