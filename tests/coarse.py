"""Larger blocks for Triton's interpreter, which takes as long for a small block as for a large one."""

from __future__ import annotations

import os
from dataclasses import replace

from lmoe_cli.bank.fused import tiles

ROWS = 16


def coarsen(monkeypatch) -> None:
    """Let a block take more rows than a device with a hundred processors would want."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    fine = tiles.down

    def down(*words):
        tile = fine(*words)
        return replace(tile, rows=max(tile.rows, ROWS))

    monkeypatch.setattr(tiles, "down", down)
