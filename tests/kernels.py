"""The kernels for CUDA devices on CPU tensors, by Triton's interpreter."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from importlib.util import find_spec

import pytest

from lmoe_cli.bank.fused import launch, tiles

ROWS = 64


def prepare_once() -> None:
    """Let the interpreter put its language in place once for each kernel, and not again for each function that the
    kernel calls, where nothing is left to be done; that takes it a third of its time."""
    from triton.language import core
    from triton.runtime import interpreter

    patch = interpreter._patch_lang
    if patch.__name__ == "patch_once":
        return

    def patch_once(function):
        seen = [value for value in function.__globals__.values() if value is core or value is interpreter.tl]
        is_done = not any(core.is_builtin(language.load) for language in seen)
        return interpreter._LangPatchScope() if is_done else patch(function)

    interpreter._patch_lang = patch_once


def on_cpu(monkeypatch) -> None:
    """Let models on the CPU be computed by the kernels."""
    if find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run on the GPU here, and the model on the CPU; set TRITON_INTERPRET=1 for this test")
    prepare_once()
    monkeypatch.setattr(launch, "is_available", lambda _: True)
    in_large_blocks(monkeypatch, ROWS)


def in_large_blocks(monkeypatch, rows: int) -> None:
    """At least so many rows at a time: the interpreter takes as long for one, and has no processors to share them."""

    def coarse(fine, *words):
        tile = fine(*words)
        return replace(tile, rows=max(tile.rows, rows))

    for name in ("down", "up"):
        monkeypatch.setattr(tiles, name, partial(coarse, getattr(tiles, name)))
