"""Bake the experts of a loadout into one PEFT adapter whose delta is the blend.

    A = [A_1; A_2; …],  B = [g_1 B_1, g_2 B_2, …]      exact, at the sum of the ranks

A blend with row scales (DoRA, IA3) is one DoRA adapter: with c = 1 + sum_e g_e rho_e the matrix is c W + B A, which is
DoRA's m (W + B'A) / ||W + B'A|| for B' = B / c and m = c ||W + B'A||. Saved modules stay saved modules.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmoe_cli import files
from lmoe_cli.adapter.write import Entry, lora_config, write_adapter
from lmoe_cli.bake.lowrank import padded, truncate
from lmoe_cli.bake.model import Verify, refuse_out
from lmoe_cli.bake.plan import STORED_AS
from lmoe_cli.bake.report import experts_facts, file_hashes
from lmoe_cli.bake.stored import stored_at
from lmoe_cli.bank.delta import Delta, bias_update, update
from lmoe_cli.bank.gates import in_force
from lmoe_cli.bank.load import Terms, open_terms
from lmoe_cli.bank.variants.lora import row_norms
from lmoe_cli.checkpoint.raw import raw
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.checkpoint.writer import Shape
from lmoe_cli.errors import InvalidFileError, UsageError
from lmoe_cli.loadout.about_router import require_fixed
from lmoe_cli.loadout.base import Base
from lmoe_cli.loadout.layout import CONV1D, Target
from lmoe_cli.loadout.loadout import Loadout

Gated = list[tuple[float, Delta]]
"""Gate and delta of each expert in one matrix."""
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM takes."""


@dataclass(frozen=True)
class Module:
    """One module of the adapter that is made."""

    name: str
    a: Tensor | None = None
    """(R, d_in), float32."""
    b: Tensor | None = None
    """(d_out, R), float32."""
    scale: Tensor | None = None
    """c, factor on each row of W, (d_out,), float32."""
    bias: Tensor | None = None
    """Change of the bias, (d_out,), float32."""
    saved: Mapping[str, Tensor] | None = None
    """``saved_weight`` and ``saved_bias`` of a module that stays whole."""
    is_embedding: bool = False
    norms: Tensor | None = None
    """Norms of the rows of W + B'A, (d_out,), float32; only where some module has a scale."""
    error: float = 0.0
    """What was cut off, relative."""


def bake_adapter(
    loadout: Loadout,
    out: Path,
    *,
    rank: int | None = None,
    dtype: str | None = None,
    target: str | None = None,
    force: bool = False,
    verify: Verify | None = None,
    routed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a loadout's experts as one PEFT adapter.

    Args:
        loadout: Checked; its files are on this machine.
        out: Folder to be made.
        rank: Cut every module to this rank; exact when None.
        dtype: Of the tensors; float32 when None.
        target: ``vllm`` to keep to what that engine takes.
        force: Replace what stands at ``out``.
        verify: Called with the finished folder before it gets its name.
        routed: See `bake_model`.

    Returns:
        The report that also stands in the folder; its ``modules`` tell rank and error of each.

    Raises:
        UsageError: ``out`` exists, one adapter cannot hold this blend, or a router decides per prompt or token.
        ResourceError: The disk is full.
        LmoeError: Verification failed. Nothing is left at ``out`` in any of these cases.
    """
    started = time.perf_counter()
    require_fixed(loadout)
    refuse_out(loadout, out, force=force)
    loadout = loadout.dequantized  # DoRA needs what the base's weights stand for
    if loadout.recipe.bake.method != "linear":
        hint = "an adapter is a sum of deltas: bake it as a model"
        raise UsageError("adapter-inexpressible", f"method {loadout.recipe.bake.method} gives no low rank", hint=hint)
    with open_terms(loadout) as terms, _reader(loadout) as reader:
        modules = list(_modules(loadout, terms, reader, rank))
    if not modules:
        raise _inexpressible("every weight is zero: there is nothing to write")
    if target == "vllm":
        modules = _for_vllm(modules)
    if any(module.scale is not None for module in modules) and any(module.bias is not None for module in modules):
        raise _inexpressible("DoRA and biases do not go into one adapter")
    kind = dtype or "float32"
    config = _config(loadout, modules)
    entries = [entry for module in modules for entry in _entries(module, kind, config)]
    with files.new_folder(out, force=force) as folder:
        digest = write_adapter(folder, config, entries)
        for name in (name for name in loadout.base.side_files if name.startswith(("tokenizer", "chat_template"))):
            files.copy_file(loadout.base.source.require(name), folder / name)
        report = {
            **experts_facts(loadout, file_hashes(loadout.base.source, loadout.base.weight_files)),
            "files": {"adapter_model.safetensors": digest},
            "modules": [
                {"name": item.name, "rank": 0 if item.a is None else item.a.shape[0], "error": item.error}
                for item in modules
            ],
            "seconds": round(time.perf_counter() - started, 3),
        }
        if routed:
            report["routed"] = dict(routed)
        if verify:
            report["verify"] = verify(folder)
        files.write_file(folder / files.REPORT, json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
    return report


def _reader(loadout: Loadout) -> TensorReader:
    return TensorReader(loadout.base.stored, loadout.base.source.require)


def _inexpressible(reason: str) -> UsageError:
    return UsageError("adapter-inexpressible", reason, hint="bake it as a model: leave out --as adapter")


def _modules(loadout: Loadout, terms: Terms, reader: TensorReader, rank: int | None) -> Iterator[Module]:
    gates = in_force([expert.weight for expert in loadout.experts], loadout.recipe.skip_below).tolist()
    scaled = _has_scales(loadout)
    for target, items in loadout.by_target.items():
        name = target.module if target.tied else items[0][1].part.module
        if target.index is not None or items[0][1].part.experts > 1:
            raise _inexpressible(f"{name}: experts of a mixture cannot be stacked into one adapter")

        weight, bias = stored_at(loadout.base, reader, target)
        gated = terms.gated(target, weight, bias, gates)
        total = update(gated, transposed=False)
        change = bias_update(gated)
        if _is_saved(gated) or (total is None and change is not None):
            yield _saved(name, target, gated, reader, bias())
            continue
        if total is None:
            continue
        if total.column is not None:
            raise _inexpressible(f"{name}: IA3 scales its inputs, which no LoRA can")
        if total.left is None or total.right is None:  # only a row scale: DoRA on a delta of nothing
            a, b = torch.zeros(1, target.d_in), torch.zeros(target.d_out, 1)
        else:
            a, b = total.right, total.left
        error = 0.0
        scale = None if total.row is None else 1.0 + total.row
        if scale is not None:
            if (scale == 0).any():
                raise _inexpressible(f"{name}: a row of the blend is scaled to nothing")
            b = b / scale[:, None]
        if rank is not None:
            a, b, error = truncate(a, b, rank)
        norms = row_norms(weight(), a, b) if scaled else None
        embedding = items[0][1].part.kind == "embedding"
        yield Module(name, a, b, scale, change, None, embedding, norms, error)


def _has_scales(loadout: Loadout) -> bool:
    parts = [item.part for items in loadout.by_target.values() for _, item in items]
    return any(part.is_dora or part.kind == "ia3" for part in parts)


def _is_saved(gated: Gated) -> bool:
    return any(delta.saved is not None for _, delta in gated)


def _saved(name: str, target: Target, gated: Gated, reader: TensorReader, bias: Tensor | None) -> Module:
    """A module that the adapter brings whole: the base's own, blended."""
    stored = reader.tensor(target.tensor)
    if stored.dim() == 2 and not _is_saved(gated):
        raise _inexpressible(f"{name}: its bias was trained without the module itself")
    matrix = stored if stored.dim() == 2 else stored[:, None]
    total = update(gated, transposed=target.transposed)
    blended = (matrix.float() if total is None else total.block(matrix, 0)).view_as(stored)
    saved = {"saved_weight": blended}
    if bias is not None:
        change = bias_update(gated)
        saved["saved_bias"] = bias if change is None else bias + change
    return Module(name, saved=saved)


def _for_vllm(modules: list[Module]) -> list[Module]:
    """One rank for all modules, of those that vLLM takes."""
    if any(module.scale is not None or module.bias is not None or module.saved for module in modules):
        raise _inexpressible("vLLM takes neither DoRA nor biases nor saved modules in an adapter")
    needed = max(module.a.shape[0] for module in modules if module.a is not None)
    rank = next((size for size in VLLM_RANKS if size >= needed), None)
    if rank is None:
        hint = f"--rank {VLLM_RANKS[-1]} or less"
        raise UsageError("adapter-inexpressible", f"vLLM takes no rank of {needed}", hint=hint)
    return [
        Module(item.name, *padded(item.a, item.b, rank), is_embedding=item.is_embedding, error=item.error)
        for item in modules
        if item.a is not None and item.b is not None
    ]


def _config(loadout: Loadout, modules: list[Module]) -> dict[str, Any]:
    adapted = [module for module in modules if module.a is not None]
    names = [module.name for module in adapted]
    leaves = {name.rpartition(".")[2] for name in names}
    everywhere = {
        name.removesuffix(".weight")
        for name, stored in loadout.base.stored.items()
        if name.removesuffix(".weight").rpartition(".")[2] in leaves and len(stored.info.shape) == 2
    }
    config = lora_config(
        base_name(loadout.base),
        {module.name: module.a.shape[0] for module in adapted if module.a is not None},
        leaves if len(everywhere) == len(names) else names,
        saved=[module.name for module in modules if module.saved],
        use_dora=any(module.scale is not None for module in adapted),
        lora_bias=any(module.bias is not None for module in adapted),
        fan_in_fan_out=not leaves.isdisjoint(CONV1D.get(loadout.base.model_type, ())),
    )
    return {**config, "revision": loadout.base.source.revision}


def base_name(base: Base) -> str:
    """What other programs find the base by: a repository of the Hub, or the full path of a folder."""
    source = base.source
    return source.repository_name or (str(source.path.resolve()) if source.path else base.ref)


def _entries(module: Module, dtype: str, config: Mapping[str, Any]) -> Iterator[Entry]:
    def entry(role: str, tensor: Tensor) -> Entry:
        rounded = tensor.to(getattr(torch, dtype)).contiguous()
        if not torch.isfinite(rounded).all():
            hint = "try --dtype float32, or smaller weights"
            raise InvalidFileError("bake-overflow", f"{module.name}: a blended factor does not fit {dtype}", hint=hint)
        shape = Shape(STORED_AS[dtype], tuple(rounded.shape))
        return Entry(module.name, role, shape, raw(rounded))

    for role, tensor in (module.saved or {}).items():
        yield entry(role, tensor)
    if module.a is None or module.b is None:
        return
    prefix = "lora_embedding_" if module.is_embedding else "lora_"
    yield entry(f"{prefix}A", module.a)
    yield entry(f"{prefix}B", module.b)
    if config["use_dora"] and module.norms is not None:
        scale = torch.ones_like(module.norms) if module.scale is None else module.scale
        yield entry("magnitude", scale * module.norms)
    if config["lora_bias"]:
        yield entry("lora_B_bias", torch.zeros(module.b.shape[0]) if module.bias is None else module.bias)
