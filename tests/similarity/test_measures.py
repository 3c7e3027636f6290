"""Cosines, norms and overlaps that can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lmoe_cli.errors import InvalidFileError
from lmoe_cli.similarity.compare import compare
from tests.similarity.adapters import compared, module, pair, plan, random, write

exactly = pytest.approx


def unit(d: int, *places: int) -> torch.Tensor:
    """Rows of the identity, (len(places), d)."""
    return torch.eye(d)[list(places)]


def test_the_same_delta_is_alike_in_every_measure_however_it_is_factored(tmp_path):
    a, b = random()
    turn = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    same = write(tmp_path / "same", {module(): (a, b)})
    copy = write(tmp_path / "copy", {module(): (a, b)})
    rewritten = write(tmp_path / "rewritten", {module(): (turn @ a.double(), b.double() @ torch.linalg.inv(turn))})
    wider = write(tmp_path / "wider", {module(): (torch.cat([a, 3 * a]), torch.cat([b, torch.zeros(10, 3)], dim=1))})
    for other, tolerance in ((copy, 1e-12), (rewritten, 1e-6), (wider, 1e-12)):
        found = pair(same, other)
        assert found["cosine"] == exactly(1.0, abs=tolerance)
        assert found["overlap_input"] == exactly(1.0, abs=tolerance)
        assert found["overlap_output"] == exactly(1.0, abs=tolerance)
    norms = compared(same, rewritten, wider)["overall"]["norms"]
    assert list(norms.values()) == exactly([float((b.double() @ a.double()).norm())] * 3, rel=1e-6)


def test_a_delta_turned_around_has_cosine_minus_one_and_the_same_subspaces(tmp_path):
    a, b = random()
    one = write(tmp_path / "one", {module(): (a, b)})
    found = pair(one, write(tmp_path / "minus", {module(): (a, -2 * b)}))
    assert found["cosine"] == exactly(-1.0, abs=1e-12)
    assert found["overlap_input"] == exactly(1.0)


def test_deltas_that_share_only_one_side_are_orthogonal_and_overlap_on_that_side(tmp_path):
    reads = unit(8, 0, 1)
    one = write(tmp_path / "one", {module(): (reads, unit(10, 0, 1).T)})
    two = write(tmp_path / "two", {module(): (reads, unit(10, 2, 3).T)})
    found = pair(one, two)
    assert found["cosine"] == 0.0
    assert (found["overlap_input"], found["overlap_output"]) == exactly((1.0, 0.0))
    assert (found["chance_input"], found["chance_output"]) == exactly((2 / 8, 2 / 10))


def test_the_overlap_is_the_share_of_the_smaller_subspace(tmp_path):
    one = write(tmp_path / "one", {module(): (unit(8, 0, 1, 2), unit(10, 0, 1, 2).T)})
    half = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0, 0, 0, 0]])  # 45 degrees, and 90
    two = write(tmp_path / "two", {module(): (half, unit(10, 2, 5).T)})
    found = pair(one, two)
    assert found["overlap_input"] == exactly((0.5 + 0) / 2)
    assert found["overlap_output"] == exactly(1 / 2)
    # the third singular direction of one is e2 e2', of two it reads (e2 + e3)
    assert found["cosine"] == exactly(1 / (math.sqrt(3) * math.sqrt(2 + 1)))


def test_scaling_is_part_of_the_delta(tmp_path):
    one = write(tmp_path / "one", {module(): random(4)}, lora_alpha=8)
    root = write(tmp_path / "root", {module(): random(4)}, lora_alpha=8, use_rslora=True)
    pattern = write(tmp_path / "pattern", {module(): random(4)}, alpha_pattern={"q_proj": 2})
    norms = compared(one, root, pattern)["overall"]["norms"]
    assert norms["root"] / norms["one"] == exactly(2.0)
    assert norms["pattern"] / norms["one"] == exactly(0.25)


def test_a_module_of_one_counts_as_zero_in_the_other(tmp_path):
    """Two modules of equal norm, one of them shared and equal: half of the whole, all of what is shared."""
    factors = (unit(8, 0), unit(10, 0).T)
    one = write(tmp_path / "one", {module(0): factors, module(1): factors})
    two = write(tmp_path / "two", {module(0): factors, module(2): factors})
    found = compared(one, two)
    (both,) = found["overall"]["pairs"]
    assert both["shared"] == 1
    assert both["cosine"] == exactly(0.5)
    assert both["cosine_shared"] == exactly(1.0)
    assert both["overlap_input"] == exactly(1.0)
    layers = {group["layer"]: group for group in found["layers"]}
    assert layers[0]["pairs"][0]["cosine"] == exactly(1.0)
    assert layers[1]["norms"] == {"one": exactly(1.0), "two": None}
    assert layers[1]["pairs"][0]["cosine"] is None


def test_layers_and_kinds_add_up_to_the_whole(tmp_path):
    names = [module(layer, kind) for layer in range(3) for kind in ("q_proj", "v_proj")]
    one = write(tmp_path / "one", {name: random(3, seed=number) for number, name in enumerate(names)})
    two = write(tmp_path / "two", {name: random(5, seed=9 + number) for number, name in enumerate(names)})
    found = compared(one, two)
    for groups in ("layers", "kinds", "matrices"):
        for name in ("one", "two"):
            squares = sum(group["norms"][name] ** 2 for group in found[groups])
            assert squares == exactly(found["overall"]["norms"][name] ** 2)
        assert sum(group["pairs"][0]["shared"] for group in found[groups]) == 6
        inner = sum(
            group["pairs"][0]["cosine"] * group["norms"]["one"] * group["norms"]["two"] for group in found[groups]
        )
        whole = found["overall"]
        assert inner == exactly(whole["pairs"][0]["cosine"] * whole["norms"]["one"] * whole["norms"]["two"])


def test_a_delta_of_zero_has_a_norm_and_no_cosine(tmp_path):
    a, b = random()
    one, zero = write(tmp_path / "one", {module(): (a, b)}), write(tmp_path / "zero", {module(): (a, 0 * b)})
    found = compared(one, zero)
    assert found["overall"]["norms"]["zero"] == 0.0
    (both,) = found["overall"]["pairs"]
    assert both["cosine"] is None
    assert both["overlap_input"] is None  # though the A is the same, the delta reads nothing
    assert both["shared"] == 1


def test_a_delta_beyond_float32_is_refused_by_name(tmp_path):
    a, b = random()
    huge = write(tmp_path / "huge", {module(): (a, 1e30 * b)}, lora_alpha=1e9)
    chosen = plan(write(tmp_path / "one", {module(): (a, b)}), huge)
    with pytest.raises(InvalidFileError, match="huge"):
        list(compare(chosen))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that anything gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return result


def test_no_tensor_as_large_as_the_matrix_is_ever_made(tmp_path):
    d, rank = 300, 4
    folders = [write(tmp_path / name, {module(): random(rank, d, d, seed)}) for seed, name in enumerate("ab")]
    chosen = plan(*folders)
    with Largest() as seen:
        list(compare(chosen))
    assert rank * d <= seen.elements <= 4 * rank * d


def test_one_module_is_in_memory_at_a_time(tmp_path):
    """Nothing is read before it is asked for: a broken second module shows only when it is reached."""
    a, b = random()
    broken = write(tmp_path / "broken", {module(0): (a, b), module(1): (a, b * float("nan"))})
    found = compare(plan(write(tmp_path / "one", {module(0): (a, b)}), broken))
    assert next(found)[0].module == "layers.0.self_attn.q_proj"
    with pytest.raises(InvalidFileError, match=r"layers\.1"):
        next(found)
