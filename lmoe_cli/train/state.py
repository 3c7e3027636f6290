"""What a training was begun with: it goes on with the same, or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lmoe_cli import files, hashes
from lmoe_cli.adapter.adapter import read_adapter
from lmoe_cli.adapter.config import CONFIG
from lmoe_cli.errors import NotFoundError, UsageError
from lmoe_cli.loadout.base import Base
from lmoe_cli.loadout.trained import fingerprint, weights_hash
from lmoe_cli.source import Source, open_source
from lmoe_cli.strict_json import parse_object
from lmoe_cli.train.order import Order
from lmoe_cli.train.outcome import DONE

STATE = "state.json"
MAX_STATE_BYTES = 16 << 20
PARTS = ("config", "data", "weights")
"""Of the state, that must be the same."""


def state_of(order: Order, base: Base, data: Mapping[str, str], processes: int) -> dict[str, Any]:
    """Everything that a training depends on, and that must be the same when it goes on."""
    texts = [name for name in base.files if name not in base.weight_files]
    weights = {order.config.base: base.source.revision or _identity(base.source, texts, fingerprint(base))}
    for name, expert in order.config.experts.items():
        if expert.adapter:
            source = open_source(expert.adapter, token=order.token, beside=order.folder)
            weights[f"{name} ({expert.adapter})"] = source.revision or _identity(
                source, [CONFIG], weights_hash(read_adapter(source))
            )
    config = order.config.model_dump(mode="json")
    return {"config": config, "data": dict(data), "weights": weights, "processes": processes}


def _identity(source: Source, texts: Collection[str], weights: str | None) -> str:
    """A hash over text files of a folder, and what tells its weights."""
    found = {name: hashes.sha256(path) for name in sorted(texts) if (path := source.local(name))}
    return hashlib.sha256(json.dumps([found, weights]).encode()).hexdigest()


def begin(order: Order, work: Path, told: Mapping[str, Any]) -> None:
    """Start a folder of work, or find that what stands there may be gone on with."""
    if not (work / STATE).is_file():
        if work.exists() and any(work.iterdir()):
            message = f"{work}: not a folder that lmoe wrote, and the training would be done there"
            raise UsageError("output-not-ours", message, hint="choose another --out")
        if order.resume:
            hint = "leave --resume out to begin"
            raise NotFoundError("nothing-to-resume", f"{work}: nothing was begun there", hint=hint, where=str(work))
        _write(work, told)
        return
    if not order.resume and not order.force and _has_trained(work):
        message = f"{work}: a training was begun there and is not done"
        raise UsageError("training-unfinished", message, hint="--resume goes on with it, --force begins again")
    if not order.resume:
        files.remove_folder(work)
        _write(work, told)
        return
    before = parse_object(files.read_bytes(work / STATE, MAX_STATE_BYTES), str(work / STATE))
    known = {kind: found if isinstance(found := before.get(kind), dict) else {} for kind in PARTS}
    changed = [
        f"config ({name})" if kind == "config" else name
        for kind in PARTS
        for name, value in told[kind].items()
        if known[kind].get(name) != value
    ]
    if before.get("processes") != told["processes"]:
        changed.append(f"number of processes ({before.get('processes')})")
    if changed:
        message = f"{work}: begun with another {', '.join(changed)}"
        raise UsageError("resume-differs", message, hint="put back what was changed, or --force to begin again")


def _write(work: Path, told: Mapping[str, Any]) -> None:
    files.write_file(work / STATE, json.dumps(told, indent=2).encode() + b"\n", force=True)


def _has_trained(work: Path) -> bool:
    """Whether there is something to go on from."""
    return any(work.glob("*/checkpoint-*")) or any(work.glob(f"*/{DONE}"))
