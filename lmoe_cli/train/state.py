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
from lmoe_cli.loadout.base import read_base
from lmoe_cli.loadout.trained import fingerprint, weights_hash
from lmoe_cli.source import Source, open_source
from lmoe_cli.strict_json import parse_object
from lmoe_cli.train.config import TrainConfig
from lmoe_cli.train.order import Order
from lmoe_cli.train.outcome import DONE

STATE = "state.json"
MAX_STATE_BYTES = 16 << 20
PARTS = ("config", "data", "weights")
"""Of the state, that must be the same."""


def begin(order: Order, work: Path, data: Mapping[str, str], processes: int) -> None:
    """Start a folder of work, or find that what stands there may be gone on with.

    Args:
        order: The training.
        work: The folder.
        data: Data file → SHA-256.
        processes: That train.

    Raises:
        UsageError: Something else stands there, or it was begun with something else, or unfinished and not resumed.
        NotFoundError: Nothing was begun there that could be resumed.
    """
    if not (work / STATE).is_file():
        if work.exists() and any(work.iterdir()):
            raise _not_ours(work)
        if order.resume:
            hint = "leave --resume out to begin"
            raise NotFoundError("nothing-to-resume", f"{work}: nothing was begun there", hint=hint, where=str(work))
    elif order.resume:
        before = _read(work)
        _require_same(before, _state_of(order, _pins(before), data, processes), work)
        return
    elif not all(_part(_read(work), kind) for kind in ("config", "data")):
        raise _not_ours(work)
    elif not order.force and has_trained(work):
        message = f"{work}: a training was begun there and is not done"
        raise UsageError("training-unfinished", message, hint="--resume goes on with it, --force begins again")
    else:
        files.remove_folder(work)
    state = json.dumps(_state_of(order, {}, data, processes), indent=2).encode() + b"\n"
    files.write_file(work / STATE, state, force=True)


def _not_ours(work: Path) -> UsageError:
    message = f"{work}: not a folder that lmoe wrote, and the training would be done there"
    return UsageError("output-not-ours", message, hint="choose another --out", where=str(work))


def pinned(config: TrainConfig, work: Path) -> TrainConfig:
    """A config with the commits that its training was begun with, where it names branches of the Hub."""
    return config.with_references(_pins(_read(work)))


def _state_of(order: Order, pins: Mapping[str, str], data: Mapping[str, str], processes: int) -> dict[str, Any]:
    """Everything that a training depends on, and that must be the same when it goes on."""
    sources = {
        ref: open_source(pins.get(ref, ref), token=order.token, beside=order.folder) for ref in order.config.references
    }
    base = read_base(sources[order.config.base])
    texts = [name for name in base.files if name not in base.weight_files]
    weights = {order.config.base: base.source.revision or _identity(base.source, texts, fingerprint(base))}
    for name, expert in order.config.experts.items():
        if expert.adapter:
            source = sources[expert.adapter]
            weights[f"{name} ({expert.adapter})"] = source.revision or _identity(
                source, [CONFIG], weights_hash(read_adapter(source))
            )
    return {
        "config": order.config.model_dump(mode="json"),
        "data": dict(data),
        "weights": weights,
        "pins": {ref: source.pinned for ref, source in sources.items() if source.revision},
        "processes": processes,
    }


def _identity(source: Source, texts: Collection[str], weights: str | None) -> str:
    """A hash over text files of a folder, and what tells its weights."""
    found = {name: hashes.sha256(path) for name in sorted(texts) if (path := source.local(name))}
    return hashlib.sha256(json.dumps([found, weights]).encode()).hexdigest()


def _require_same(before: Mapping[str, Any], told: Mapping[str, Any], work: Path) -> None:
    changed = [
        f"config ({name})" if kind == "config" else name
        for kind in PARTS
        for name, value in told[kind].items()
        if _part(before, kind).get(name) != value
    ]
    if list(_part(_part(before, "config"), "experts")) != list(told["config"]["experts"]):
        changed.append("order of experts")  # by which checkpoints hold what is trained
    if before.get("processes") != told["processes"]:
        changed.append(f"number of processes ({before.get('processes')})")
    if changed:
        message = f"{work}: begun with another {', '.join(changed)}"
        raise UsageError("resume-differs", message, hint="put back what was changed, or --force to begin again")


def _read(work: Path) -> dict[str, Any]:
    return parse_object(files.read_bytes(work / STATE, MAX_STATE_BYTES), str(work / STATE))


def _part(state: Mapping[str, Any], kind: str) -> dict[str, Any]:
    return found if isinstance(found := state.get(kind), dict) else {}


def _pins(state: Mapping[str, Any]) -> dict[str, str]:
    """Reference as written → the same at the commit that it meant."""
    return {ref: pin for ref, pin in _part(state, "pins").items() if isinstance(pin, str)}


def has_trained(work: Path) -> bool:
    """Whether there is something to go on from."""
    return any(work.glob("*/checkpoint-*")) or any(work.glob(f"*/{DONE}"))
