"""LoRA, rank-stabilised LoRA, and DoRA on linear, Conv1D and embedding modules.

    dW = s B A                              Hu et al. 2021, eq. 3             https://arxiv.org/abs/2106.09685
    s  = alpha / sqrt(r)                    Kalajdzievski 2023, sec. 3        https://arxiv.org/abs/2312.03732
    W' = m (W + s B A) / ||W + s B A||      Liu et al. 2024 (DoRA), eq. 5     https://arxiv.org/abs/2402.09353

The norm in DoRA is over each row. With c = m / ||W + s B A||, which is fixed once trained, DoRA is exactly a row scale
and a low-rank delta:  dW = (c - 1) W + c s B A.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmoe_cli.bank.delta import ROW_BLOCK_ELEMENTS, Delta
from lmoe_cli.bank.variants.saved import bias_change, saved_matrix
from lmoe_cli.bank.variants.source import Contents


def lora_delta(contents: Contents) -> Delta:
    """The delta of ``lora_A`` and ``lora_B``, with whatever stands beside them."""
    return _delta(contents, contents.read("lora_A"), contents.read("lora_B"))


def embedding_delta(contents: Contents) -> Delta:
    """The delta of ``lora_embedding_A`` (r, vocabulary) and ``lora_embedding_B`` (d_out, r)."""
    return _delta(contents, contents.read("lora_embedding_A"), contents.read("lora_embedding_B"))


def _delta(contents: Contents, a: Tensor, b: Tensor) -> Delta:
    scaled_b = contents.scaling * b  # (d_out, R)
    row = None
    saved = saved_matrix(contents) if contents.has("saved_weight") else None
    if contents.has("magnitude"):
        own = contents.weight() if saved is None else _turned(saved, contents)
        scale = contents.read("magnitude").flatten() / row_norms(own, a, scaled_b)  # (d_out,)
        scaled_b = scale[:, None] * scaled_b
        if saved is None:
            row = scale - 1.0
        else:  # c S in place of W
            saved = _turned(scale[:, None] * own, contents)
    bias = bias_change(contents)
    if contents.has("lora_B_bias"):
        own = contents.scaling * contents.read("lora_B_bias")
        bias = own if bias is None else bias + own
    return Delta(a, scaled_b, row=row, saved=saved, bias=bias)


def _turned(matrix: Tensor, contents: Contents) -> Tensor:
    """A matrix as it is stored, as (d_out, d_in), or the other way round; float32."""
    return (matrix.T if contents.transposed else matrix).to(torch.float32)


def row_norms(weight: Tensor, a: Tensor, scaled_b: Tensor) -> Tensor:
    """Euclidean norm of each row of W + s B A, without forming the product whole.

    Args:
        weight: W, (d_out, d_in), float32.
        a: A, (R, d_in), float32.
        scaled_b: s B, (d_out, R), float32.

    Returns:
        (d_out,), float32.
    """
    norms = torch.empty(weight.shape[0])
    step = max(1, ROW_BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        norms[rows] = torch.linalg.vector_norm(torch.addmm(weight[rows], scaled_b[rows], a), dim=1)
    return norms
