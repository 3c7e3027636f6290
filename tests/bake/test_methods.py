"""The task-vector methods agree with mergekit's on the same task vectors."""

from __future__ import annotations

import pytest
import torch

from lmoe_cli.bake.methods.method import Settings, TaskVectors
from lmoe_cli.bake.methods.registry import METHODS
from lmoe_cli.bake.methods.thinning import BLOCK_ELEMENTS, keep_largest

MERGEKIT = {"ties": "ties", "dare": "dare_linear", "dare_ties": "dare_ties", "della": "della"}
WEIGHTS = [0.6, 0.3, -0.2]


def deltas(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(24, 40, generator=generator) for _ in WEIGHTS]


def settings(density: float, normalize: bool | None = None, seed: int = 5, epsilon: float = 0.1) -> Settings:
    return Settings(density, epsilon, normalize, torch.Generator().manual_seed(seed))


def ours(name: str, vectors: list[torch.Tensor], chosen: Settings, block: int = 7) -> torch.Tensor:
    """The combined delta, a few rows at a time as a bake takes it."""
    combined = TaskVectors(METHODS[name], [vector.clone() for vector in vectors], WEIGHTS, 0.0, chosen)
    zero = torch.zeros_like(vectors[0])
    for start in range(0, len(zero), block):
        combined.add_to(zero[start : start + block], start)
    return zero


def theirs(name: str, vectors: list[torch.Tensor], density: float, **parameters: object) -> torch.Tensor:
    from mergekit.merge_methods.base import PerInputValues, TensorGroup
    from mergekit.merge_methods.registry import get

    # A base of zero makes its task vectors ours, without the rounding of adding and subtracting a base.
    group = TensorGroup.from_tensors([torch.zeros_like(vectors[0]), *vectors], base_index=0)
    each = {"weight": WEIGHTS, "density": [density] * 3}
    if name == "della":
        each["epsilon"] = [0.1] * 3
    bound = {key: PerInputValues(list(zip((1, 2, 3), values, strict=True))) for key, values in each.items()}
    method = get(name)
    shared = {
        "int8_mask": False,
        "normalize": method.default_normalize,
        "rescale": method.default_rescale,
        "lambda": 1.0,
    }
    torch.manual_seed(5)
    return method.merge_group(group, **bound, **{**shared, **parameters})


@pytest.mark.parametrize("density", [0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("method", list(MERGEKIT))
def test_a_method_gives_what_mergekit_gives(method, density):
    torch.testing.assert_close(ours(method, deltas(), settings(density)), theirs(MERGEKIT[method], deltas(), density))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", list(MERGEKIT))
def test_dividing_by_the_weights_is_what_mergekit_calls_normalize(method, normalize):
    found = ours(method, deltas(), settings(0.5, normalize=normalize))
    torch.testing.assert_close(found, theirs(MERGEKIT[method], deltas(), 0.5, normalize=normalize))


def test_magnitude_keeps_the_largest_elements_and_adds():
    kept = [delta * (delta.abs() >= delta.abs().flatten().topk(480).values.min()) for delta in deltas()]
    expected = sum(weight * delta for weight, delta in zip(WEIGHTS, kept, strict=True))
    torch.testing.assert_close(ours("magnitude", deltas(), settings(0.5)), expected)


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_random_draws_come_from_the_seed(method):
    first, again = (ours(method, deltas(), settings(0.5, seed=1)) for _ in range(2))
    other = ours(method, deltas(), settings(0.5, seed=2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("method", ["dare", "magnitude"])
def test_at_full_density_nothing_is_thinned_out(method):
    expected = sum(weight * delta for weight, delta in zip(WEIGHTS, deltas(), strict=True))
    torch.testing.assert_close(ours(method, deltas(), settings(1.0)), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_expert_that_leaves_a_tensor_alone_counts_among_the_weights_as_in_mergekit(normalize):
    present = deltas()[:2]
    zero = torch.zeros_like(present[0])
    chosen = settings(1.0, normalize=normalize)
    found = TaskVectors(METHODS["dare"], [delta.clone() for delta in present], WEIGHTS[:2], WEIGHTS[2], chosen)
    due = theirs("dare_linear", [*present, zero], 1.0, normalize=normalize)
    found.add_to(zero, 0)
    torch.testing.assert_close(zero, due)


def test_the_elements_of_a_bias_are_ranked_among_each_other_as_in_mergekit():
    vectors = [delta[0].clone() for delta in deltas()]
    columns = [vector[:, None].clone() for vector in vectors]
    found = TaskVectors(METHODS["della"], columns, WEIGHTS, 0.0, settings(0.5))
    rows = torch.zeros(40, 1)
    found.add_to(rows, 0)
    torch.testing.assert_close(rows[:, 0], theirs("della", vectors, 0.5))


@pytest.mark.parametrize("density", [1e-6, 0.1, 0.5, 0.999])
def test_the_largest_elements_are_kept_and_no_other(density):
    delta = torch.randn(2, BLOCK_ELEMENTS, generator=torch.Generator().manual_seed(0))
    count = max(1, int(density * delta.numel()))
    edge = delta.abs().flatten().topk(count).values.min()
    kept = delta.clone()
    keep_largest(kept, density)
    assert torch.equal(kept, torch.where(delta.abs() >= edge, delta, 0.0))


def test_of_equal_elements_just_as_many_are_kept_as_there_is_room_for():
    delta = torch.tensor([[2.0, -1.0, 1.0, -1.0], [1.0, 0.5, 0.0, -3.0]])
    keep_largest(delta, 0.5)
    assert delta.tolist() == [[2.0, -1.0, 1.0, 0.0], [0.0, 0.0, 0.0, -3.0]]
