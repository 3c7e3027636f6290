"""What holds of the fused kernels where they cannot run: what they refuse, and that nothing else misses them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from groups import DEVICE, PLAIN, Group

from lmoe_cli.bank.fused import tiles
from lmoe_cli.bank.fused.group import Table
from lmoe_cli.bank.fused.launch import behind, grouped, is_available

ROOT = Path(__file__).parents[2]
WITHOUT = """
import sys
sys.modules["triton"] = None
import torch
import lmoe_cli.bank.fused.ops
from lmoe_cli.bank.fused.launch import is_available
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    x, w, a, b = (torch.empty(shape, dtype=torch.bfloat16) for shape in ((3, 8), (5, 8), (2, 8), (5, 2)))
    (y,) = torch.ops.lmoe.grouped(x, [w], [None], a, [b], [0], torch.empty(1, 2))
    (z,) = torch.ops.lmoe.behind(x, [y.float()], a, [b], [0], torch.empty(1, 2))
assert (y.shape, y.dtype, z.shape, z.dtype) == ((3, 5), torch.bfloat16, (3, 5), torch.float32)
print(is_available(torch.device("cpu")), is_available(torch.device("cuda")))
"""


def test_without_triton_the_operators_are_there_to_trace_and_the_answer_is_no():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False False\n", done.stderr


def test_the_interpreter_does_not_make_a_cpu_a_device_to_run_on(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not is_available(torch.device("cpu"))


def group():
    return Group(**PLAIN, dtype=torch.float16)


def b_of(own, m, b):
    return dataclasses.replace(own.factors, b=tuple(b if k == m else old for k, old in enumerate(own.factors.b)))


CALLS = {
    "x of three dimensions": lambda own, x: (x[None], own.weights, own.biases, own.factors, own.always(1)),
    "too many vectors": lambda own, x: (x.repeat(9, 1), own.weights, own.biases, own.factors, own.always(1)),
    "no vector": lambda own, x: (x[:0], own.weights, own.biases, own.factors, own.always(1)),
    "x of another dtype": lambda own, x: (x.float(), own.weights, own.biases, own.factors, own.always(1)),
    "x in float64": lambda own, x: (x.double(), own.weights, own.biases, own.factors, own.always(1)),
    "x by column": lambda own, x: (x.T.contiguous().T, own.weights, own.biases, own.factors, own.always(1)),
    "x of another width": lambda own, x: (x[:, 1:], own.weights, own.biases, own.factors, own.always(1)),
    "a weight too few": lambda own, x: (x, own.weights[1:], own.biases, own.factors, own.always(1)),
    "a bias too few": lambda own, x: (x, own.weights, own.biases[1:], own.factors, own.always(1)),
    "weights in another order": lambda own, x: (x, own.weights[::-1], own.biases, own.factors, own.always(1)),
    "a weight by column": lambda own, x: (
        x, [own.weights[0].T.contiguous().T, *own.weights[1:]], own.biases, own.factors, own.always(1),
    ),
    "a weight in int8": lambda own, x: (
        x, [own.weights[0].to(torch.int8), *own.weights[1:]], own.biases, own.factors, own.always(1),
    ),
    "a bias of another member": lambda own, x: (x, own.weights, own.biases[::-1], own.factors, own.always(1)),
    "no members": lambda own, x: (x, [], [], dataclasses.replace(own.factors, b=(), starts=()), own.always(1)),
    "B of another dtype": lambda own, x: (
        x, own.weights, own.biases, b_of(own, 0, own.factors.b[0].float()), own.always(1),
    ),
    "B with more columns than A has rows": lambda own, x: (
        x, own.weights, own.biases, b_of(own, 2, own.factors.b[0][:5]), own.always(1),
    ),
    "a start too few": lambda own, x: (
        x, own.weights, own.biases, dataclasses.replace(own.factors, starts=(0, 11)), own.always(1),
    ),
    "a start before A": lambda own, x: (
        x, own.weights, own.biases, dataclasses.replace(own.factors, starts=(-1, 11, 11)), own.always(1),
    ),
    "A of another width": lambda own, x: (
        x, own.weights, own.biases, dataclasses.replace(own.factors, a=own.factors.a[:, 1:]), own.always(1),
    ),
    "gates per expert": lambda own, x: (x, own.weights, own.biases, own.factors, own.always(1)[:, :4]),
    "gates without rows": lambda own, x: (x, own.weights, own.biases, own.factors, own.always(1)[0]),
    "gates in float64": lambda own, x: (x, own.weights, own.biases, own.factors, own.always(1).double()),
    "three rows of gates for four vectors": lambda own, x: (x, own.weights, own.biases, own.factors, own.always(3)),
    "a short workspace": lambda own, x: (
        x, own.weights, own.biases, own.factors, own.always(1), torch.empty(9, device=DEVICE),
    ),
    "outputs of another dtype": lambda own, x: (
        x, own.weights, own.biases, own.factors, own.always(1), None, [y.float() for y in own.products(x)],
    ),
    "an output too few": lambda own, x: (
        x, own.weights, own.biases, own.factors, own.always(1), None, own.products(x)[1:],
    ),
}  # fmt: skip
"""What is wrong with a call → its arguments."""


@pytest.mark.parametrize("wrong", CALLS)
def test_arguments_that_do_not_fit_are_refused(wrong):
    own = group()
    with pytest.raises(ValueError, match=r"got|members|but|carry"):
        grouped(*CALLS[wrong](own, own.random(4, own.d_in)))


@pytest.mark.parametrize(
    "change",
    [
        {"experts": torch.zeros(3, 2, dtype=torch.int64)},
        {"experts": torch.zeros(4, 2)},
        {"experts": torch.zeros(4, 0, dtype=torch.int64), "gates": torch.zeros(4, 0)},
        {"experts": torch.zeros(2, 4, dtype=torch.int64).T},
        {"gates": torch.zeros(4, 3)},
        {"gates": torch.zeros(4, 2, dtype=torch.int64)},
        {"table": Table(torch.zeros(2, 2, 4, dtype=torch.int32), 8)},
        {"table": Table(torch.zeros(2, 3, 4, dtype=torch.int64), 8)},
        {"table": Table(torch.zeros(2, 3, 4, dtype=torch.int32), 0)},
    ],
)
def test_choices_that_do_not_fit_are_refused(change):
    own = group()
    x = own.random(4, own.d_in)
    change = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    chosen = dataclasses.replace(own.chosen(4, 2), **change)
    with pytest.raises(ValueError, match=r"got|must be"):
        behind(x, own.products(x), own.factors, chosen)


def test_a_product_of_another_shape_is_refused():
    own = group()
    x = own.random(4, own.d_in)
    with pytest.raises(ValueError, match="a product must be"):
        behind(x, own.products(x)[::-1], own.factors, own.always(1))
    with pytest.raises(ValueError, match="2 products"):
        behind(x, own.products(x)[1:], own.factors, own.always(1))


def test_a_table_says_where_each_expert_is():
    table = Table.of([[(2, 3), (0, 8)], [], [(1, 6), (0, 0)]], 3, "cpu")
    assert table.max_rank == 8
    assert table.places.tolist() == [
        [[3, 0, 0], [0, 0, 0], [17, 11, 0]],
        [[8, 0, 3], [0, 0, 0], [0, 6, 0]],
    ]


@pytest.mark.parametrize("layouts", [[[(0, 2), (1, 1), (0, 2)]], [[(3, 2)]], [[(-1, 2)]]])
def test_a_table_refuses_an_expert_in_two_places_or_unknown(layouts):
    with pytest.raises(ValueError, match="expert"):
        Table.of(layouts, 3, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2, 16, 17, 32])
@pytest.mark.parametrize("rows", [0, 1, 100, 513, 20000])
def test_tiles_are_powers_of_two_that_hold_the_batch(dtype, batch, rows):
    for tile in (tiles.down(dtype, 1000, rows, batch), tiles.up(77, rows, batch)):
        for side in (tile.rows, tile.columns, tile.batch, tile.warps):
            assert side > 0
            assert side & (side - 1) == 0
        assert tile.batch >= batch
        assert batch == 1 or min(tile.rows, tile.columns, tile.batch) >= tiles.LEAST


COMPILED = '''
import sys
import torch, triton
from triton.backends.compiler import GPUTarget
from groups import Group
from lmoe_cli.bank.fused import always, chosen
from lmoe_cli.bank.fused.launch import behind, grouped

class Absent:
    """A device of which nothing but its kind is known."""
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", int(sys.argv[1]), 32)

class Compiled:
    """A kernel that is compiled where it would be launched."""
    def __init__(self, kernel): self.kernel = kernel
    def __getitem__(self, grid): return lambda *a, **k: texts.append(self.kernel.warmup(*a, grid=grid, **k).asm["ptx"])

triton.runtime.driver.set_active(Absent())
for module, names in ((always, ("down", "up")), (chosen, ("down_chosen", "up_chosen"))):
    for name in names:
        setattr(module, name, Compiled(getattr(module, name)))
for batch in (1, 4):
    group = Group((600, 32), 2048, (((0, 16), (1, 16)), ((2, 8),)), torch.bfloat16)
    x = group.random(batch, 2048)
    for gates in (group.always(1), group.chosen(batch, 2)):
        texts = []
        grouped(x, group.weights, group.biases, group.factors, gates)
        first, second = texts
        # Weights are read 16 bytes at a time, what does not fit in registers is nowhere, and results are rounded.
        assert "ld.global.v4.b32" in first or "cp.async.cg.shared.global" in first
        assert "cvt.rn.bf16" in second
        assert "mma.sync" in first or batch == 1
        assert not any(".local" in text for text in texts)
        behind(x, group.products(x), group.factors, gates)
        assert len(texts) == 4
'''


@pytest.mark.parametrize("capability", [90])
def test_kernels_compile_for_a_device_that_is_not_there(capability, tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed, which it is only on Linux")
    here = os.pathsep.join((str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": here}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-c", COMPILED, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
