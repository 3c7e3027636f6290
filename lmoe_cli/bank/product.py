"""Which of torch's kernels multiplies vectors with a frozen matrix fastest on this processor.

torch has several kernels for y = W x on a CPU, and chooses by rule: MKL in float32, oneDNN in 16 bits. On processors
that the rule was not made for, another one reads the matrix at twice the speed: on an AMD EPYC of 2 cores a matrix of
(4096, 1024) takes MKL 1140 us and oneDNN 590 us in float32, oneDNN 490 us and torch itself 260 us in bfloat16. All of
them sum in float32, in another order; so the base alone, which is promised bit for bit, keeps the kernel of torch's
choice, and only a model that carries experts is computed by the fastest.

Which one that is, is measured on the model's own weights when it is loaded.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Kernel = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Activations (..., d_in), W (d_out, d_in) and bias (d_out,) → (..., d_out)."""

LARGE_BYTES = 64 << 20
"""Weights of a model below which nothing is measured: they stay in the cache, and every kernel is quick."""
ENOUGH = 1 << 18
"""Elements of a matrix below which a kernel's start costs more than its reading; these keep torch's choice."""
SAMPLE_BYTES = 96 << 20
"""Weights that are measured with, all of them once in a round: more than a cache holds, as in decoding."""
ROUNDS = 4
MANY = 32
"""Vectors of the measurement that decides for several at once."""
BETTER = 1.15
"""How much faster another kernel must have been."""


def onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product by oneDNN, in float32."""
    if torch.is_grad_enabled() or weight.numel() < ENOUGH:  # it has no gradient
        return F.linear(x, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return result


class _WithoutOneDnn:
    """Makes torch leave oneDNN alone for the length of a block, in as little time as can be.

    There is no other way to torch's own kernels than this switch of the whole process. What another thread computes
    meanwhile is as right, but sums in another order, and takes longer where it has many vectors.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._was_enabled = True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._was_enabled = torch._C._get_mkldnn_enabled()
                torch._C._set_mkldnn_enabled(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch._C._set_mkldnn_enabled(self._was_enabled)

    @property
    def is_enabled(self) -> bool:
        """Whether oneDNN is used outside of such blocks."""
        with self._lock:
            return self._was_enabled if self._inside else torch._C._get_mkldnn_enabled()


_WITHOUT_ONEDNN = _WithoutOneDnn()


def native(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The product by torch's own kernel, in 16 bits."""
    with _WITHOUT_ONEDNN:
        return F.linear(x, weight, bias)


_LIBRARY: Any = torch.library.Library("lmoe", "FRAGMENT")  # type: ignore[no-untyped-call]


def _as_operator(name: str, schema: str, kernel: Callable[..., Tensor], shaped: Callable[..., Tensor]) -> Any:
    """A kernel that compiled code calls as it is, where it has no gradient to compute.

    Registered without the wrapper of `torch.library.custom_op`, which takes longer than some of these products.
    """
    _LIBRARY.define(name + schema)
    _LIBRARY.impl(name, kernel, "CPU")
    torch.library.register_fake(f"lmoe::{name}", shaped, lib=_LIBRARY)
    return getattr(torch.ops.lmoe, name).default


_OPERATORS: dict[Kernel, Kernel] = {
    kernel: _as_operator(
        f"{kernel.__name__}_linear",
        "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
        kernel,
        lambda x, weight, _: x.new_empty(*x.shape[:-1], weight.shape[0]),
    )
    for kernel in (onednn, native)
}


def _is_a_loop(x: Tensor) -> bool:
    """Whether a small product with these activations, one vector, is better written as a sum.

    The compiler for CPUs makes one loop of it and of what follows, which reads a matrix of a few ranks as fast as the
    memory gives it; the call of a library would take as long again.
    """
    return torch.compiler.is_compiling() and x.device.type == "cpu" and not torch.is_grad_enabled()


@dataclass(frozen=True)
class Products:
    """The kernels to use for one model."""

    one: Kernel = F.linear
    """For a single vector, as in decoding."""
    many: Kernel = F.linear
    """For several, as in a batch or a prompt."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """W x + b.

        Args:
            x: Activations, (..., d_in).
            weight: W, (d_out, d_in), in the dtype of ``x``.
            bias: b, (d_out,).

        Returns:
            (..., d_out).
        """
        kernel = self.one if x.numel() == x.shape[-1] else self.many
        if kernel is not F.linear and torch.compiler.is_compiling():
            kernel = F.linear if torch.is_grad_enabled() else _OPERATORS[kernel]
        return kernel(x, weight, bias)

    def of(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What a layer of the base computes; by its own forward where that is more than W x + b."""
        own = plain_parameters(layer, x.dtype)
        result: Tensor = layer(x) if own is None else self(x, *own)
        return result

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """A x, for an A of few rows.

        Args:
            x: Activations, (..., d_in).
            a: A, (R, d_in), in the dtype of ``x``.

        Returns:
            (..., R).
        """
        if x.numel() == x.shape[-1] and _is_a_loop(x):
            return (a.float() * x.float().view(-1)).sum(-1).to(x.dtype).view(*x.shape[:-1], -1)
        return self(x, a)

    def add(self, y: Tensor, low: Tensor, b: Tensor) -> Tensor:
        """Add B low to y, in place where that is possible.

        Args:
            y: (N, d_out), any float dtype.
            low: (N, R), in the dtype of ``b``.
            b: B, (d_out, R).

        Returns:
            (N, d_out), in the dtype of ``y``.
        """
        if y.dtype != b.dtype:
            return y + F.linear(low, b).to(y.dtype)
        if len(low) == 1 and _is_a_loop(y):
            return (y.float() + (b.float() * low.float()).sum(-1)).to(y.dtype)
        if self.one is native and len(low) == 1 and not torch.compiler.is_compiling():
            return self.add_one(y, low, b.T)
        return y.addmm_(low, b.T)

    def add_one(self, y: Tensor, low: Tensor, b: Tensor) -> Tensor:
        """Add B low to y in place, for a single vector outside of compiled code.

        Args:
            y: (1, d_out).
            low: (1, R), in the same dtype.
            b: B transposed, (R, d_out), in the same dtype.
        """
        if self.one is not native:
            return y.addmm_(low, b)
        with _WITHOUT_ONEDNN:
            return y.addmm_(low, b)

    def add_few(self, y: Tensor, x: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Add a few experts' B g A x to y in place, for a single vector outside of compiled code.

        Args:
            y: (1, d_out).
            x: (1, d_in), in the same dtype.
            parts: Of each expert A transposed (d_in, R), gate (1, 1) and B transposed (R, d_out), in the same dtype.
        """
        if self.one is native:
            with _WITHOUT_ONEDNN:
                _add_few(y, x, parts)
        else:
            _add_few(y, x, parts)


def _add_few(y: Tensor, x: Tensor, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    for a, gate, b in parts:
        y.addmm_(torch.mm(x, a).mul_(gate), b)


def plain_parameters(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a layer that is W x + b and nothing else, in a dtype; None for any other."""
    if type(layer) is not nn.Linear or layer._forward_pre_hooks or layer._forward_hooks:
        return None
    weight = layer._parameters["weight"]
    return (weight, layer._parameters["bias"]) if weight is not None and weight.dtype == dtype else None


def choose_products(weights: Iterable[Tensor]) -> Products:
    """Measure which kernels are fastest for a model.

    Args:
        weights: Of its linear layers, (d_out, d_in) each. One that is smaller in memory only stands for its shape; one
            that is spread over processes has no product of its own, and is passed over.
    """
    whole = [weight for weight in weights if type(weight) in (Tensor, nn.Parameter)]
    found = [weight for weight in whole if weight.device.type == "cpu" and weight.dim() == 2]
    large = [weight for weight in found if weight.numel() >= ENOUGH and weight.is_floating_point()]
    if sum(weight.nbytes for weight in large) < LARGE_BYTES or not _WITHOUT_ONEDNN.is_enabled:
        return Products()
    sample = _sample(large)
    if large[0].dtype == torch.float32:
        return Products(_faster(onednn, sample, 1), _faster(onednn, sample, MANY))
    return Products(one=_faster(native, sample, 1))


def _sample(weights: Sequence[Tensor]) -> list[Tensor]:
    """Weights from all over a model."""
    apart = max(1, sum(weight.nbytes for weight in weights) // SAMPLE_BYTES)
    found: list[Tensor] = []
    for weight in weights[::apart]:
        if sum(other.nbytes for other in found) < SAMPLE_BYTES:
            found.append(weight.contiguous())
    return found


@torch.inference_mode()
def _faster(other: Kernel, weights: Sequence[Tensor], count: int) -> Kernel:
    """The other kernel where it is faster than torch's choice, else that."""
    inputs = [torch.ones(count, weight.shape[1], dtype=weight.dtype) for weight in weights]
    best = {F.linear: math.inf, other: math.inf}
    for _ in range(ROUNDS):
        for kernel in best:
            started = time.perf_counter()
            for x, weight in zip(inputs, weights, strict=True):
                kernel(x, weight, None)
            # What disturbs a measurement makes it longer: the shortest is the one to believe.
            best[kernel] = min(best[kernel], time.perf_counter() - started)
    return other if best[F.linear] >= BETTER * best[other] else F.linear
