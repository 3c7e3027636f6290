"""Where to run, and in which dtype."""

from __future__ import annotations

import torch

from lmoe_cli.engine.widened import has_instructions
from lmoe_cli.errors import UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALL = 64 << 20
"""Bytes of a base below which float32 costs nothing worth saving."""


def choose_device(name: str | None = None) -> torch.device:
    """The device that was asked for, or the best there is.

    Raises:
        UsageError: There is no such device on this machine.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if _has_mps() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # some devices only have shapes, no numbers
    except (RuntimeError, AssertionError) as error:
        here = ["cpu", *(["cuda"] if torch.cuda.is_available() else []), *(["mps"] if _has_mps() else [])]
        hint = f"here there is {' and '.join(here)}; leave --device out to take the best"
        raise UsageError("device-unknown", f"no device '{name}' here", hint=hint) from error
    return device


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def choose_dtype(
    name: str | None, stored: str | None, size: int, device: torch.device, *, answers: bool = False
) -> torch.dtype:
    """The dtype that was asked for, or what the base is stored in where the device computes well in it.

    Args:
        name: ``float32``, ``float16``, ``bfloat16`` or None.
        stored: Of the base's weights.
        size: Bytes of the base.
        device: Where it will run.
        answers: Whether most is computed one token at a time, and prompts as `lmoe_cli.engine.widened` does it: then
            bfloat16 does well on any processor.
    """
    if name:
        return DTYPES[name]
    wanted = DTYPES.get(stored or "", torch.float32)
    if device.type != "cpu":
        return wanted
    if size < SMALL or wanted is torch.float32:
        return torch.float32
    does_well = has_instructions() or (answers and wanted is torch.bfloat16)
    return torch.bfloat16 if does_well else torch.float32
