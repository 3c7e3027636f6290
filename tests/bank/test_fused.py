"""The kernels compute the formula, whatever the shapes, dtypes, ranks and rows.

Without a GPU they run in Triton's interpreter; with one, as compiled.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed, which it is only on Linux")
sys.path.insert(0, str(Path(__file__).parent))

from groups import DEVICE, GROUPS, INTERPRETED, PLAIN, Group
from kernels import in_large_blocks, prepare_once

from lmoe_cli.bank.fused.group import Chosen, Table
from lmoe_cli.bank.fused.launch import behind, grouped, work_size

if DEVICE == "cpu" and not INTERPRETED:
    pytest.skip("there is no GPU, and TRITON_INTERPRET is not 1", allow_module_level=True)
if INTERPRETED:
    prepare_once()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=("float32", "float16", "bfloat16"))
batches = pytest.mark.parametrize(
    ("shape", "batch", "dtype"),
    [
        *(("plain", batch, dtype) for batch in (1, 7) for dtype in DTYPES),
        *((shape, 1, torch.bfloat16) for shape in GROUPS if shape != "plain"),
        ("alone", 1, torch.float32),
        ("plain", 32, torch.bfloat16),
    ],
)
choices = pytest.mark.parametrize(
    ("shape", "batch", "kept", "dtype"),
    [
        *(("plain", 2, 3, dtype) for dtype in (torch.float32, torch.bfloat16)),
        ("plain", 1, 1, torch.bfloat16),
        ("transposed", 1, 4, torch.float16),
        ("transposed", 7, 1, torch.float32),
        ("wide", 1, 1, torch.bfloat16),
    ],
)


@pytest.fixture(autouse=True)
def _blocks_as_of_many_rows(request, monkeypatch):
    """Of one row, as tiles are for so few, with the plain group alone where kernels are interpreted."""
    shape = request.node.callspec.params.get("shape") if hasattr(request.node, "callspec") else None
    if INTERPRETED and shape != "plain":
        in_large_blocks(monkeypatch, rows=4)


@batches
def test_base_and_experts_in_one_launch_are_the_formula(shape, batch, dtype):
    group = Group(**GROUPS[shape], dtype=dtype)
    x, gates = group.random(batch, group.d_in), group.always(1)
    y = grouped(x, group.weights, group.biases, group.factors, gates)
    group.assert_is_formula(y, x, gates)


@batches
def test_experts_behind_the_base_are_the_formula_rounded_twice(shape, batch, dtype):
    group = Group(**GROUPS[shape], dtype=dtype)
    x, gates = group.random(batch, group.d_in), group.always(1)
    y = behind(x, group.products(x), group.factors, gates)
    group.assert_is_formula(y, x, gates, roundings=2)


@pytest.mark.parametrize(("batch", "rows"), [(2, 2), (7, 7), (32, 32), (6, 2), (32, 4)])
def test_each_row_of_gates_acts_on_its_share_of_the_vectors(batch, rows):
    group = Group(**PLAIN)
    x, gates = group.random(batch, group.d_in), group.always(rows)
    group.assert_is_formula(grouped(x, group.weights, group.biases, group.factors, gates), x, gates)
    group.assert_is_formula(behind(x, group.products(x), group.factors, gates), x, gates, roundings=2)


@dtypes
def test_gates_may_be_in_the_dtype_of_the_factors(dtype):
    group = Group(**PLAIN, dtype=dtype)
    x, gates = group.random(3, group.d_in), group.always(3).to(dtype)
    group.assert_is_formula(grouped(x, group.weights, group.biases, group.factors, gates), x, gates)


@choices
def test_chosen_experts_are_the_formula_with_the_other_gates_0(shape, batch, kept, dtype):
    group = Group(**GROUPS[shape], dtype=dtype)
    x, chosen = group.random(batch, group.d_in), group.chosen(batch, kept)
    gates = group.spelled_out(chosen)
    y = grouped(x, group.weights, group.biases, group.factors, chosen)
    group.assert_is_formula(y, x, gates)
    group.assert_is_formula(behind(x, group.products(x), group.factors, chosen), x, gates, roundings=2)


def test_a_number_that_no_expert_has_adds_nothing_and_a_number_twice_adds_twice():
    group = Group(**PLAIN)
    x = group.random(3, group.d_in)
    experts = torch.tensor([[0, 4], [-1, 3], [2, 2]], dtype=torch.int32, device=DEVICE)
    gates = torch.tensor([[1.5, 9.0], [9.0, -0.5], [0.25, 0.5]], dtype=torch.bfloat16, device=DEVICE)
    chosen = Chosen(experts, gates, Table.of(group.layouts, group.experts, DEVICE))
    full = torch.tensor([[1.5, 0, 0, 0], [0, 0, 0, -0.5], [0, 0, 0.75, 0]], device=DEVICE)[:, group.owners]
    group.assert_is_formula(grouped(x, group.weights, group.biases, group.factors, chosen), x, full)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_group_is_the_formula(data):
    members, experts = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    ranks = st.lists(st.integers(0, 5), min_size=experts, max_size=experts)
    layouts = tuple(
        tuple((expert, rank) for expert, rank in enumerate(data.draw(ranks)) if rank) for _ in range(members)
    )
    outs = tuple(data.draw(st.integers(1, 40)) for _ in range(members))
    group = Group(
        outs, data.draw(st.integers(1, 140)), layouts, data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans()),
        data.draw(st.booleans()), experts, data.draw(st.integers(0, 99)),
    )  # fmt: skip
    batch = data.draw(st.sampled_from([1, 2, 3, 17]))
    x, gates = group.random(batch, group.d_in), group.always(data.draw(st.sampled_from([1, batch])))
    group.assert_is_formula(grouped(x, group.weights, group.biases, group.factors, gates), x, gates)
    if any(layouts) and batch <= 3:
        chosen = group.chosen(batch, data.draw(st.integers(1, min(experts, 2))))
        y = behind(x, group.products(x), group.factors, chosen)
        group.assert_is_formula(y, x, group.spelled_out(chosen), roundings=2)


@pytest.mark.parametrize("batch", [1, 5])
def test_with_all_gates_0_the_base_gets_out_what_it_gave(batch):
    group = Group(**PLAIN, dtype=torch.float16)
    x = group.random(batch, group.d_in)
    products = group.products(x)
    found = behind(x, products, group.factors, torch.zeros(1, len(group.owners), device=DEVICE))
    assert all(torch.equal(*pair) for pair in zip(found, products, strict=True))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("choose", [False, True], ids=["always", "chosen"])
def test_equal_inputs_give_equal_bits_into_given_memory_whatever_it_held(batch, choose):
    group = Group(**PLAIN, dtype=torch.bfloat16)
    x = group.random(batch, group.d_in)
    gates = group.chosen(batch, 2) if choose else group.always(1)
    first = grouped(x, group.weights, group.biases, group.factors, gates)
    size = work_size(batch, group.factors, gates, True)
    work = torch.full((size + 16,), torch.nan, device=DEVICE)
    # Columns of a wider matrix, as where all members write into one.
    wide = torch.full((batch, sum(group.outs) + 3), torch.nan, dtype=group.dtype, device=DEVICE)
    out = list(wide[:, : sum(group.outs)].split(group.outs, dim=1))
    second = grouped(x, group.weights, group.biases, group.factors, gates, work, out)
    assert [y.data_ptr() for y in second] == [y.data_ptr() for y in out]
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    assert work[size:].isnan().all()
    assert wide[:, sum(group.outs) :].isnan().all()


def test_results_may_replace_what_the_base_gave():
    group = Group(**PLAIN)
    x, gates = group.random(4, group.d_in), group.always(4)
    due = behind(x, group.products(x), group.factors, gates)
    products = group.products(x)
    found = behind(x, products, group.factors, gates, out=products)
    assert all(torch.equal(a, b) and a is c for a, b, c in zip(found, due, products, strict=True))


def test_the_product_of_a_quantised_base_may_have_a_dtype_of_its_own():
    group = Group(**PLAIN)
    x, gates = group.random(2, group.d_in), group.always(1)
    products = [product.half() for product in group.products(x)]
    found = behind(x, products, group.factors, gates)
    for y, half, (exact, size) in zip(found, products, group.formula(x, gates), strict=True):
        assert y.dtype == half.dtype
        assert ((y.double() - exact).abs() <= 2.0**-10 * size).all()


def test_rows_of_everything_may_lie_apart():
    group = Group(**PLAIN, dtype=torch.float16)
    x, gates = group.random(6, group.d_in), group.always(6)
    due = grouped(x, group.weights, group.biases, group.factors, gates)

    def apart(tensor):
        """The same values as every other row, and some of the columns, of a larger matrix."""
        larger = torch.full((2 * tensor.shape[0], tensor.shape[1] + 7), torch.nan, dtype=tensor.dtype, device=DEVICE)
        larger[::2, 3:-4] = tensor
        return larger[::2, 3:-4]

    factors = dataclasses.replace(group.factors, a=apart(group.factors.a), b=tuple(apart(b) for b in group.factors.b))
    found = grouped(apart(x), [apart(weight) for weight in group.weights], group.biases, factors, apart(gates))
    assert all(torch.equal(*pair) for pair in zip(found, due, strict=True))


def test_members_may_share_rows_of_a():
    group = Group((12, 8), 30, (((0, 6),), ((0, 4),)))
    factors = dataclasses.replace(group.factors, starts=(0, 2))
    x, gates = group.random(2, 30), group.always(1)
    group.factors = factors
    group.assert_is_formula(grouped(x, group.weights, group.biases, factors, gates), x, gates)


def test_a_matrix_may_span_more_elements_than_32_bits_count():
    group = Group((3,), 8, (((0, 2), (1, 1)),), torch.float16)
    x, gates = group.random(2, 8), group.always(1)
    table = Table.of(group.layouts, group.experts, DEVICE)
    # Reserved, and touched in a few places only.
    memory = torch.empty(2**31 + 2**12, dtype=group.dtype, device=DEVICE)

    def spread(tensor, strides, at):
        far = memory[at:].as_strided(tensor.shape, strides)
        return far.copy_(tensor)

    weight = spread(group.weights[0], (2**30, 1), 0)
    a = spread(group.factors.a, (2**30, 1), 64)
    for strides in ((2**30, 1), (1, 2**30)):
        factors = dataclasses.replace(group.factors, a=a, b=(spread(group.factors.b[0], strides, 128),))
        group.assert_is_formula(grouped(x, [weight], group.biases, factors, gates), x, gates)
        chosen = Chosen(torch.tensor([[0], [1]], device=DEVICE), torch.ones(2, 1, device=DEVICE), table)
        y = behind(x, group.products(x), factors, chosen)
        group.assert_is_formula(y, x, group.spelled_out(chosen), roundings=2)


class Layer(torch.nn.Module):
    """Modules of a group as they would stand in a model."""

    def __init__(self, group, call):
        super().__init__()
        self.group, self.call = group, call

    def forward(self, x, *gates):
        own, factors = self.group, self.group.factors
        first = (own.weights, own.biases) if "grouped" in self.call else (own.products(x),)
        y = getattr(torch.ops.lmoe, self.call)(x, *first, factors.a, factors.b, factors.starts, *gates)
        return torch.cat(y, dim=1).relu()


@pytest.mark.parametrize("call", ["grouped", "behind", "grouped_chosen", "behind_chosen"])
def test_torch_compile_traces_through_without_a_break(call):
    import lmoe_cli.bank.fused.ops  # noqa: F401

    group = Group(**PLAIN)
    layer = Layer(group, call)
    x = group.random(2, group.d_in)
    if "chosen" in call:
        chosen = group.chosen(2, 2)
        gates = (chosen.experts, chosen.gates, chosen.table.places, chosen.table.max_rank)
        due = grouped(x, group.weights, group.biases, group.factors, chosen)
    else:
        gates = (group.always(1),)
        due = grouped(x, group.weights, group.biases, group.factors, *gates)
    found = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, *gates)
    torch.testing.assert_close(found, torch.cat(due, dim=1).relu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", ["grouped", "behind"])
def test_the_operators_keep_what_they_promise_to_pytorch(call):
    from lmoe_cli.bank.fused import ops

    group = Group(**PLAIN)
    x = group.random(2, group.d_in)
    first = (group.weights, group.biases) if call == "grouped" else (group.products(x),)
    arguments = (x, *first, group.factors.a, list(group.factors.b), list(group.factors.starts), group.always(1))
    torch.library.opcheck(getattr(ops, call), arguments, test_utils=("test_schema", "test_faketensor"))
