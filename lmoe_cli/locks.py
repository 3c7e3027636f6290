"""One process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lmoe_cli import files
from lmoe_cli.disk import writing
from lmoe_cli.errors import UsageError


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Be the only process of lmoe that works in a folder, which need not be there yet.

    Raises:
        UsageError: Another one is at it.
    """
    path = folder.parent / f".{folder.name}.lock"
    files.make_folder(folder.parent)
    lock = FileLock(path)
    with writing(folder), contextlib.suppress(NotImplementedError):  # a network file system without locks
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            hint, message = "wait for its end, or choose another --out", f"{folder}: another process is at work there"
            raise UsageError("output-busy", message, hint=hint, where=str(folder)) from error
    try:
        yield
    finally:
        files.remove(path)
        lock.release()
