"""Experts that know nothing: noise as strong as what they stand for, module by module.

    A', B' ~ N(0, 1),   then B' so that |B' A'| = |B A|        Frobenius

What a recipe gains over them it owes to what its experts learned, not to a change of the weights of that size. Norms
come from the factors: |B A|^2 = sum (B'B) * (A A'). Vectors (row and column scales, biases) become noise of the same
length, saved matrices noise as far from the base's as they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lmoe_cli.bank.bank import Change
from lmoe_cli.bank.delta import Delta, Term, update
from lmoe_cli.loadout.layout import Target


def noise(seed: int, names: Sequence[str]) -> Change:
    """Make what puts noise in the place of experts.

    Args:
        seed: Another one draws other noise. What a module gets depends on it, the expert's name and the module's alone.
        names: Of the experts, in the order of the gates.
    """

    def change(target: Target, term: Term, weight: Callable[[], Tensor]) -> Term:
        where = f"{seed}:{names[term.expert]}:{target.module}:{target.index}:{target.rows}"
        drawn = int.from_bytes(hashlib.sha256(where.encode()).digest()[:8], "big")
        generator = torch.Generator().manual_seed(drawn)
        return replace(term, delta=random_delta(term.delta, generator, weight, transposed=target.transposed))

    return change


def random_delta(
    delta: Delta, generator: torch.Generator, weight: Callable[[], Tensor], *, transposed: bool = False
) -> Delta:
    """Noise in the shape and of the size of a delta.

    Args:
        delta: What to replace.
        generator: Source of the noise.
        weight: Gives W, (d_out, d_in), float32; asked for only where a matrix was saved.
        transposed: A saved matrix lies as (d_in, d_out).
    """

    def like(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float32)

    def vector(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _as_long(like(tensor), float(tensor.double().norm()))

    a = b = saved = None
    if delta.a is not None and delta.b is not None:
        a, b = like(delta.a), like(delta.b)
        b *= _norm(delta.a, delta.b) / _norm(a, b)
    if delta.saved is not None:
        own = weight()
        own = (own.T if transposed and own.dim() == 2 else own).reshape(delta.saved.shape)
        distance = float((delta.saved.float() - own).double().norm())
        saved = (own + _as_long(like(own), distance)).to(delta.saved.dtype)
    return Delta(a, b, vector(delta.row), vector(delta.column), saved, vector(delta.bias))


def _norm(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of B A."""
    found = update([(1.0, Delta(a, b))], transposed=False)
    assert found is not None, "there are factors"
    norm = found.norm
    assert norm is not None, "it is of low rank"
    return norm


def _as_long(vector: Tensor, length: float) -> Tensor:
    return vector * (length / float(vector.double().norm()))
