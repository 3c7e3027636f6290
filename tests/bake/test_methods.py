"""The task-vector methods agree with mergekit's on the same task vectors."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from laws.cases import case
from safetensors.torch import load_file, save_file

from lmoe_cli.bake import blocks
from lmoe_cli.bake.methods import thinning
from lmoe_cli.bake.methods.method import Settings, TaskVectors, Whole
from lmoe_cli.bake.methods.registry import METHODS
from lmoe_cli.bake.methods.thinning import draw, drop_at_random, keep_largest
from lmoe_cli.bake.model import bake_model
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

MERGEKIT = {"ties": "ties", "dare": "dare_linear", "dare_ties": "dare_ties", "della": "della"}
RANDOM = ("dare", "dare_ties", "della")
WEIGHTS = [0.6, 0.3, -0.2]


def deltas(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(24, 40, generator=generator) for _ in WEIGHTS]


def settings(density: float, normalize: bool | None = None, seed: int = 5, epsilon: float = 0.1) -> Settings:
    return Settings(density, epsilon, normalize, str(seed))


def rows_of(vector: torch.Tensor):
    return lambda some: vector[some].clone()


def combined(name, vectors, chosen, weights=WEIGHTS, others=0.0, each=map) -> torch.Tensor:
    found = TaskVectors(
        METHODS[name], [rows_of(vector) for vector in vectors], tuple(vectors[0].shape), weights, others, chosen, each
    )
    total = torch.zeros_like(vectors[0])
    for block in blocks.blocks(total.shape):
        found.add_to(total[block], block.start)
    return total


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 7 * 40)


@pytest.fixture
def mergekits_draws(monkeypatch):
    """Draws as mergekit makes them, expert after expert from one stream; they need a whole tensor at a time."""
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 24 * 40)
    generator = torch.Generator().manual_seed(5)
    made: dict[str, torch.Tensor] = {}

    def draw(chance, shape, seed):
        if seed not in made:
            full = torch.full(tuple(shape), chance) if isinstance(chance, float) else chance
            made[seed] = torch.bernoulli(full, generator=generator)
        return made[seed]

    monkeypatch.setattr(thinning, "draw", draw)


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
def test_ties_gives_what_mergekit_gives_a_few_rows_at_a_time(density):
    torch.testing.assert_close(combined("ties", deltas(), settings(density)), theirs("ties", deltas(), density))


@pytest.mark.parametrize("density", [0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("method", RANDOM)
def test_a_random_method_gives_what_mergekit_gives_of_the_same_draws(mergekits_draws, method, density):
    ours = combined(method, deltas(), settings(density))
    torch.testing.assert_close(ours, theirs(MERGEKIT[method], deltas(), density))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("method", list(MERGEKIT))
def test_dividing_by_the_weights_is_what_mergekit_calls_normalize(mergekits_draws, method, normalize):
    found = combined(method, deltas(), settings(0.5, normalize=normalize))
    torch.testing.assert_close(found, theirs(MERGEKIT[method], deltas(), 0.5, normalize=normalize))


def test_magnitude_keeps_the_largest_elements_and_adds():
    kept = [delta * (delta.abs() >= delta.abs().flatten().topk(480).values.min()) for delta in deltas()]
    expected = sum(weight * delta for weight, delta in zip(WEIGHTS, kept, strict=True))
    torch.testing.assert_close(combined("magnitude", deltas(), settings(0.5)), expected)


@pytest.mark.parametrize("method", [*RANDOM, "ties"])
def test_draws_come_from_the_seed_and_threads_make_no_difference(method):
    first = combined(method, deltas(), settings(0.5, seed=1))
    with ThreadPoolExecutor(3) as pool:
        assert torch.equal(combined(method, deltas(), settings(0.5, seed=1), each=pool.map), first)
    assert torch.equal(combined(method, deltas(), settings(0.5, seed=2)), first) == (method == "ties")


@pytest.mark.parametrize("method", ["dare", "magnitude"])
def test_at_full_density_nothing_is_thinned_out(method):
    expected = sum(weight * delta for weight, delta in zip(WEIGHTS, deltas(), strict=True))
    torch.testing.assert_close(combined(method, deltas(), settings(1.0)), expected)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_expert_that_leaves_a_tensor_alone_counts_among_the_weights_as_in_mergekit(normalize):
    present = deltas()[:2]
    found = combined("dare", present, settings(1.0, normalize=normalize), WEIGHTS[:2], WEIGHTS[2])
    due = theirs("dare_linear", [*present, torch.zeros_like(present[0])], 1.0, normalize=normalize)
    torch.testing.assert_close(found, due)


def test_the_elements_of_a_bias_are_ranked_among_each_other_as_in_mergekit(mergekits_draws):
    vectors = [delta[0].clone() for delta in deltas()]
    found = combined("della", [vector[:, None] for vector in vectors], settings(0.5))
    torch.testing.assert_close(found[:, 0], theirs("della", vectors, 0.5))


def whole(delta: torch.Tensor, seed: str = "0") -> Whole:
    return Whole(rows_of(delta), tuple(delta.shape), map, seed)


def thinned(delta: torch.Tensor, thin) -> torch.Tensor:
    kept = delta.clone()
    for block in blocks.blocks(delta.shape):
        if thin:
            thin(kept[block], block)
    return kept


@pytest.mark.parametrize("density", [1e-6, 0.005, 0.1, 0.5, 0.995, 0.999])
@pytest.mark.parametrize("kind", ["normal", "rows of different size", "mostly zero"])
def test_the_largest_elements_are_kept_and_no_other(density, kind, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 3000)
    monkeypatch.setattr(thinning, "SAMPLE", 2000)
    monkeypatch.setattr(thinning, "ROWS", 60)
    delta = torch.randn(200, 500, generator=torch.Generator().manual_seed(0))
    if kind == "rows of different size":
        delta *= torch.logspace(-6, 6, 200)[:, None]
    if kind == "mostly zero":
        delta[20:] = 0.0
    count = max(1, int(density * delta.numel()))
    edge = delta.abs().flatten().topk(count).values.min()
    kept = thinned(delta, keep_largest(whole(delta), density))
    assert torch.equal(kept, torch.where(delta.abs() >= edge, delta, 0.0))


@pytest.mark.parametrize("rows", [1, 2])
def test_of_equal_elements_just_as_many_are_kept_as_there_is_room_for(monkeypatch, rows):
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 4 * rows)
    delta = torch.tensor([[2.0, -1.0, 1.0, -1.0], [1.0, 0.5, 0.0, -3.0], [1.0, 1.0, 9.0, 0.0]])
    kept = thinned(delta, keep_largest(whole(delta), 0.5))
    assert kept.tolist() == [[2.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, -3.0], [0.0, 0.0, 9.0, 0.0]]


@pytest.mark.parametrize("chance", [0.001, 0.3, 0.9])
def test_draws_keep_as_many_as_the_chance_says_and_each_by_itself(chance):
    size = 1 << 20
    first, second = (draw(chance, (1024, 1024), seed).clone() for seed in ("one", "two"))
    slack = 5 * (chance * (1 - chance) / size) ** 0.5
    assert float(first.mean()) == pytest.approx(chance, abs=slack + 1 / thinning.CHANCES)
    assert float((first * second).mean()) == pytest.approx(chance**2, abs=slack)
    for shift in (1, 2, 3, 4, 1024):  # neighbours come from one word of the generator
        assert float((first.flatten()[:-shift] * first.flatten()[shift:]).mean()) == pytest.approx(chance**2, abs=slack)
    own = draw(torch.full((1024, 1024), chance), (1024, 1024), "one")
    assert float((own - first).abs().mean()) < 2 / thinning.CHANCES


def test_what_is_left_has_the_sum_of_magnitudes_that_there_was():
    delta = torch.randn(100, 40, generator=torch.Generator().manual_seed(0))
    kept = thinned(delta, drop_at_random(whole(delta), lambda _: 0.3))
    assert float(kept.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-5)
    assert 0.2 < float((kept != 0).float().mean()) < 0.4


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_an_expert_that_names_a_matrix_twice_has_one_delta_there(tmp_path, method):
    """The sum of both, be it from two parts or from one of both ranks."""
    torch.manual_seed(0)
    a, b = torch.randn(6, 32), torch.randn(32, 6) * 0.1
    module, config = "layers.0.self_attn.q_proj", {"peft_type": "LORA", "target_modules": ["q_proj"]}
    parts = {f"model.{module}": slice(0, 3), module: slice(3, 6)}
    for name, rank, own in (("twice", 3, parts), ("whole", 6, {f"model.{module}": slice(0, 6)})):
        tensors = {f"base_model.model.{key}.lora_A.weight": a[rows].clone() for key, rows in own.items()}
        tensors |= {f"base_model.model.{key}.lora_B.weight": b[:, rows].clone() for key, rows in own.items()}
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "adapter_model.safetensors")
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config | {"r": rank, "lora_alpha": rank}))
    baked = []
    for name in ("twice", "whole"):
        experts = {"it": {"adapter": str(tmp_path / name)}, "two": {"adapter": str(case("llama", "lora").two)}}
        settings = {
            "base": str(case("llama", "lora").base),
            "experts": experts,
            "bake": {"method": method, "density": 0.5},
        }
        bake_model(resolve(Recipe.model_validate(settings), "a test"), tmp_path / f"{name}-out")
        baked.append(load_file(tmp_path / f"{name}-out" / "model.safetensors")[f"model.{module}.weight"])
    torch.testing.assert_close(*baked, rtol=1e-5, atol=1e-6)
