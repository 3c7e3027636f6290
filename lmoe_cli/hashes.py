"""SHA-256 of large files, remembered until they change: to read a base for its hash alone takes as long as a bake."""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from lmoe_cli import files
from lmoe_cli.errors import LmoeError

SMALL = 16 << 20
"""Bytes under which a file is hashed each time."""
SETTLED_NS = 2_000_000_000
"""A file changed so lately could change once more without a difference in its times, where clocks are coarse."""


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal; remembered by path, size, times, inode and device.

    The memory is one small file per path in lmoe's cache folder. Where that cannot be read or written, the file is
    hashed.
    """
    where = path.resolve()
    identity = _identity(where)
    if identity["size"] < SMALL:
        return files.sha256(path)
    memory = _memory(where)
    if known := _recall(memory, identity):
        return known
    digest = files.sha256(path)
    changed = max(identity["mtime_ns"], identity["ctime_ns"])
    if _identity(where) == identity and time.time_ns() - changed > SETTLED_NS:
        _remember(memory, {"file": identity, "sha256": digest})
    return digest


def _identity(path: Path) -> dict[str, int]:
    with files.reading(path):
        found = path.stat()
    return {key: getattr(found, f"st_{key}") for key in ("size", "mtime_ns", "ctime_ns", "ino", "dev")}


def _memory(path: Path) -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("lmoe") / "hashes" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"


def _recall(memory: Path, identity: dict[str, int]) -> str | None:
    try:
        known = json.loads(memory.read_bytes())
        digest = known["sha256"] if known["file"] == identity else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _remember(memory: Path, known: dict[str, Any]) -> None:
    try:
        files.write_file(memory, json.dumps(known).encode() + b"\n", force=True)
    except LmoeError:  # a full disk or a read-only home costs time, not the bake
        return
