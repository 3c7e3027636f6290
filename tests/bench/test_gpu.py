"""The tables of a GPU are made in one go; here of a small model on the CPU."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from functools import partial

import pytest
import torch

from bench.small import SMALL
from benchmarks import gpu
from lmoe_cli.bench import measure as measuring
from lmoe_cli.bench.shapes import SHAPES
from lmoe_cli.bench.work import Prefill

pytestmark = pytest.mark.xdist_group("gpu")  # measured once, by one worker


@pytest.fixture(scope="module")
def found():
    """What the script prints for one layer, steps compiled as far as to a graph of torch's operators."""
    real = measuring.measure

    def once(model, ways, work, rounds):
        if isinstance(work, Prefill):
            raise torch.OutOfMemoryError("no room")
        return real(model, ways, work, 1)

    printed = io.StringIO()
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setitem(SHAPES, "small", SMALL)
        patch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        patch.setattr(measuring, "measure", once)
        patch.setattr(measuring, "WARM_UP", 0)
        gpu.main("cpu", "small", "1")
    torch._dynamo.reset()
    return json.loads(printed.getvalue())


def test_every_table_is_made_and_one_that_fails_is_named_and_costs_no_other(found):
    assert set(found["tables"]) == set(gpu.SAID) - {gpu.PROMPT}
    assert found["left_out"] == {gpu.PROMPT: "as it failed: OutOfMemoryError"}
    compiled, tokens, rows, eager = (found["tables"][name] for name in (gpu.COMPILED, gpu.TOKENS, gpu.ROWS, gpu.EAGER))
    assert [(row["variant"], row["experts"]) for row in compiled] == [("base", 0), ("blend", 2), ("blend", 4)]
    assert [row["variant"] for row in tokens] == [row["variant"] for row in rows] == ["base", "blend"]
    assert [row["variant"] for row in eager] == ["base", "bare", "blend", "blend", "folded", "peft"]


def test_the_page_tells_them_with_their_targets(found):
    text = gpu.text(found)
    for name in found["tables"]:
        assert f"### {gpu.SAID[name]}\n" in text
        assert name not in gpu.TARGETS or f"≥ {gpu.TARGETS[name]:.2f}" in text
    assert "A prompt of 2048 tokens: left out, as it failed: OutOfMemoryError." in text
