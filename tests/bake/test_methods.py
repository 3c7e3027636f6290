"""The task-vector methods agree with mergekit's on the same task vectors."""

from __future__ import annotations

import pytest
import torch

from lmoe_cli.bake.methods.method import Settings
from lmoe_cli.bake.methods.registry import METHODS

MERGEKIT = {"ties": "ties", "dare": "dare_linear", "dare_ties": "dare_ties", "della": "della"}
WEIGHTS = [0.6, 0.3, -0.2]


def deltas(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(24, 40, generator=generator) for _ in WEIGHTS]


def settings(density: float, normalize: bool | None = None, seed: int = 5, epsilon: float = 0.1) -> Settings:
    return Settings(density, epsilon, normalize, torch.Generator().manual_seed(seed))


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
    ours = METHODS[method](deltas(), WEIGHTS, settings(density))
    torch.testing.assert_close(ours, theirs(MERGEKIT[method], deltas(), density))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", list(MERGEKIT))
def test_dividing_by_the_weights_is_what_mergekit_calls_normalize(method, normalize):
    ours = METHODS[method](deltas(), WEIGHTS, settings(0.5, normalize=normalize))
    torch.testing.assert_close(ours, theirs(MERGEKIT[method], deltas(), 0.5, normalize=normalize))


def test_magnitude_keeps_the_largest_elements_and_adds():
    kept = [delta * (delta.abs() >= delta.abs().flatten().topk(480).values.min()) for delta in deltas()]
    expected = sum(weight * delta for weight, delta in zip(WEIGHTS, kept, strict=True))
    torch.testing.assert_close(METHODS["magnitude"](deltas(), WEIGHTS, settings(0.5)), expected)


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della"])
def test_random_draws_come_from_the_seed(method):
    first, again = (METHODS[method](deltas(), WEIGHTS, settings(0.5, seed=1)) for _ in range(2))
    other = METHODS[method](deltas(), WEIGHTS, settings(0.5, seed=2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("method", ["dare", "magnitude"])
def test_at_full_density_nothing_is_thinned_out(method):
    expected = sum(weight * delta for weight, delta in zip(WEIGHTS, deltas(), strict=True))
    torch.testing.assert_close(METHODS[method](deltas(), WEIGHTS, settings(1.0)), expected)
