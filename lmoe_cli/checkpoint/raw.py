"""The bytes of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, of any dtype and not copied."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
