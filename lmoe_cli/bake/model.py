"""Bake a loadout into an ordinary checkpoint that appears whole or not at all."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lmoe_cli import files
from lmoe_cli.bake.plan import Plan, config_text, make_plan
from lmoe_cli.bake.report import facts, file_hashes
from lmoe_cli.bake.rows import Advance
from lmoe_cli.bake.unit import has_matrix_unit
from lmoe_cli.bake.write import Written, write_model
from lmoe_cli.checkpoint.index import INDEX_SUFFIX
from lmoe_cli.disk import refuse_input
from lmoe_cli.loadout.about_router import require_fixed
from lmoe_cli.loadout.base import STEM
from lmoe_cli.loadout.loadout import Loadout

SPARE = 1 << 20
"""Bytes that the report and the index need."""

Rounding = Literal["exact", "fused"]

Verify = Callable[[Path], dict[str, Any]]
"""Compares a baked folder with the live blend; raises where they differ, tells what it saw."""


def bake_model(
    loadout: Loadout,
    out: Path,
    *,
    dtype: str | None = None,
    shard_size: int | None = None,
    jobs: int = 1,
    rounding: Rounding | None = None,
    force: bool = False,
    verify: Verify | None = None,
    base_weights: Mapping[str, Any] | None = None,
    routed: Mapping[str, Any] | None = None,
    advance: Advance = lambda _: None,
    begin: Callable[[Plan], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a loadout as one model.

    Args:
        loadout: Checked; its files are on this machine.
        out: Folder to be made.
        dtype: Of floating-point tensors; overrides the recipe's.
        shard_size: Most bytes in a file; as the base when None.
        jobs: Files written at a time.
        rounding: ``exact`` adds up in float32; ``fused`` leaves it to the processor's matrix unit where weights are and
            stay bfloat16. What is quicker on this processor when None.
        force: Replace what stands at ``out``.
        verify: Called with the finished folder before it gets its name.
        base_weights: What the report shall tell of a choice of them; see `base_weights.BaseWeights`.
        routed: What the report shall tell of the router in whose place fixed weights are; see `routed`.
        advance: Told the bytes that were written.
        begin: Told the plan before anything is written.

    Returns:
        The report that also stands in the folder.

    Raises:
        UsageError: ``out`` exists, or lies in a folder of the loadout; or a router decides per prompt or token.
        RefusedError: The loadout cannot be baked.
        ResourceError: The disk is full.
        LmoeError: Verification failed. Nothing is left at ``out`` in any of these cases.
    """
    started = time.perf_counter()
    require_fixed(loadout)
    refuse_out(loadout, out, force=force)
    settings = loadout.recipe.bake
    plan = make_plan(loadout, dtype or settings.dtype, shard_size)
    beside = sum(loadout.base.source.sizes[name] for name in loadout.base.side_files)
    files.require_space(out.parent, plan.size + beside + SPARE)
    begin(plan)
    weights = {expert.name: expert.weight for expert in loadout.experts}
    way: Rounding = rounding or ("fused" if has_matrix_unit() else "exact")
    with files.new_folder(out, force=force) as folder, _base_hashed_meanwhile(loadout) as base_hashes:
        written = write_model(
            plan, loadout, weights, settings, folder, jobs=jobs, is_fused=way == "fused", advance=advance
        )
        _side_files(loadout, plan, folder)
        report = facts(loadout, plan, written, base_hashes())
        if base_weights:
            report["base_weights"] = dict(base_weights)
        if routed:
            report["routed"] = dict(routed)
        report["rounding"] = _rounding(way, written)
        report["tensors"] = [asdict(tensor) for file in written for tensor in file.tensors]
        report["seconds"] = round(time.perf_counter() - started, 3)
        if verify:
            report["verify"] = verify(folder)
        files.write_file(folder / files.REPORT, json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
    return report


def _rounding(way: Rounding, written: Sequence[Written]) -> dict[str, Any]:
    """How sums were rounded, and how many of the elements that were compared differ from the float32 sum, rounded."""
    tensors = [tensor for file in written for tensor in file.tensors]
    compared = sum(tensor.compared for tensor in tensors)
    if not compared:
        return {"way": "exact"}
    return {"way": way, "compared": compared, "differing": sum(tensor.differing for tensor in tensors) / compared}


@contextmanager
def _base_hashed_meanwhile(loadout: Loadout) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash the base's weight files in a thread. Yields what waits for them and gives file name → SHA-256."""
    source = loadout.base.source
    pool = ThreadPoolExecutor(1)
    pending = [pool.submit(file_hashes, source, (name,)) for name in loadout.base.weight_files]
    try:
        yield lambda: {name: digest for future in pending for name, digest in future.result().items()}
    finally:
        pool.shutdown(cancel_futures=True)


def refuse_out(loadout: Loadout, out: Path, *, force: bool) -> None:
    """Refuse to replace what a loadout is made of, or a folder around it.

    Raises:
        UsageError: That would be so, or ``out`` exists and may not be replaced.
    """
    refuse_input(out, loadout.places)
    files.refuse_existing(out, force=force)


def _side_files(loadout: Loadout, plan: Plan, folder: Path) -> None:
    base = loadout.base
    for name in base.side_files:
        if name == "config.json" and plan.config:
            files.write_file(folder / name, config_text(base, plan.config))
        else:
            files.copy_file(base.source.require(name), folder / name)
    if plan.index:
        text = json.dumps(plan.index, indent=2).encode() + b"\n"
        files.write_file(folder / f"{STEM}{INDEX_SUFFIX}", text)
