"""A base that bitsandbytes packed, taken as the ordinary model that its packed matrices stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from lmoe_cli.checkpoint.packed import Packed, unpacked
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.loadout.base import Base
from lmoe_cli.loadout.layout import is_conv1d

METHOD = "bitsandbytes"
SETTINGS = "quantization_config"
HALVES = ("bfloat16", "float16")
"""Dtypes of 16 bits."""


def dequantized(base: Base) -> Base:
    """The unquantised model that is the same function as a packed one, but for how its products round.

    Its config names no quantisation, its tensors are those of the ordinary model, and whatever reads them gets the
    numbers that bitsandbytes' own functions give. Loaded, its layers are ordinary ones.

    Args:
        base: Its weight files are on this machine.

    Returns:
        The base itself where it is not stored quantised, or by another method than bitsandbytes.

    Raises:
        InvalidFileError: The parts of a packed matrix contradict each other, or there is none.
    """
    if base.quantization != METHOD:
        return base
    found = unpacked(base.stored, base.beginning, partial(is_conv1d, base.model_type), base.ref)
    if not any(isinstance(tensor, Packed) for tensor in found.values()):
        message = f"{base.ref}: its config says {METHOD}, but none of its matrices is packed"
        hint = "take the quantization_config out of its config.json, or download it again"
        raise InvalidFileError("packing-invalid", message, hint=hint, where=base.ref)
    settings = base.text_config[SETTINGS]
    return replace(base, config=_unquantized(base.config), stored=found, dequantized_from=settings)


def _unquantized(config: Mapping[str, Any]) -> dict[str, Any]:
    left = {key: value for key, value in config.items() if key != SETTINGS}
    inner = left.get("text_config")
    return {**left, "text_config": _unquantized(inner)} if isinstance(inner, dict) else left


def written_dtype(base: Base) -> str | None:
    """The dtype of 16 bits in which a dequantised base is written where nobody asks for another.

    It is the one that 4-bit products are computed in, else the one of the embedding, else bfloat16.

    Returns:
        As torch calls it; None for any other base.
    """
    if base.dequantized_from is None:
        return None
    settings = base.dequantized_from
    by_product = settings.get("bnb_4bit_compute_dtype") if settings.get("load_in_4bit") else None
    named = (str(kind).removeprefix("torch.") for kind in (by_product, base.runs_in))
    return next((kind for kind in named if kind in HALVES), HALVES[0])
