"""The kernels for CUDA devices on CPU tensors, by Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import pytest

from lmoe_cli.bank.fused import launch, tiles

ROWS = 16


def on_cpu(monkeypatch) -> None:
    """Let models on the CPU be computed by the kernels."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run on the GPU here, and the model on the CPU; set TRITON_INTERPRET=1 for this test")
    monkeypatch.setattr(launch, "is_available", lambda _: True)
    fine = tiles.down

    def coarse(*words):
        """Larger blocks: the interpreter takes as long for a small one, and there are no processors to share them."""
        tile = fine(*words)
        return replace(tile, rows=max(tile.rows, ROWS))

    monkeypatch.setattr(tiles, "down", coarse)
