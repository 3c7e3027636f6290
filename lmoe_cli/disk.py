"""What the operating system says about files, as errors a user can act on."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path

from lmoe_cli.errors import AccessError, InvalidFileError, LmoeError, NotFoundError, ResourceError, UsageError

FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "a file so large may not be written there (ulimit -f, or the file system)",
}
"""Why nothing more can be written."""
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
NAME_A_FILE = "name the file itself"
READABLE = "look at its permissions with ls -l, and at those of the folders it is in"


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system says about reading ``path`` into errors a user can act on."""
    try:
        yield
    except FileNotFoundError as error:
        raise NotFoundError("not-found", f"{path}: no such file", where=str(path)) from error
    except IsADirectoryError as error:
        message = f"{path}: is a folder, not a file"
        raise InvalidFileError("not-a-file", message, hint=NAME_A_FILE, where=str(path)) from error
    except PermissionError as error:
        raise AccessError("unreadable", f"{path}: no permission to read it", hint=READABLE, where=str(path)) from error
    except OSError as error:
        raise _unusual(error, path, "read") from error


def is_there(path: Path) -> bool:
    """Whether something stands at a path. See `reading` for errors, such as that a folder may not be looked into."""
    with reading(path):
        return path.exists()


def expanded(path: str) -> Path:
    """A path as a user writes it, with ``~`` for a home.

    Raises:
        InvalidFileError: ``~somebody`` whom nobody knows.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        hint = "check the path, or choose another one"
        raise InvalidFileError("bad-path", f"{path}: no home of that name", hint=hint, where=path) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing ``path`` into errors a user can act on."""
    try:
        yield
    except OSError as error:
        path = whole_name(path)
        if error.errno in FULL:
            hint = "free some space or choose another place"
            raise ResourceError("disk-full", f"{path}: {FULL[error.errno]}", hint=hint, where=str(path)) from error
        if error.errno in FORBIDDEN:
            hint, message = "choose another place", f"{path}: no permission to write there"
            raise AccessError("not-writable", message, hint=hint, where=str(path)) from error
        raise _unusual(error, path, "write") from error


def _unusual(error: OSError, path: Path, verb: str) -> LmoeError:
    if error.errno == errno.ENOMEM:
        hint = "close other programs, or use a smaller model"
        return ResourceError("out-of-memory", f"{path}: not enough memory to {verb} it", hint=hint, where=str(path))
    message = f"cannot {verb} {path}: {error.strerror or error}"
    return InvalidFileError("bad-path", message, hint="check the path, or choose another one", where=str(path))


def partial_name(path: Path) -> Path:
    """A name beside ``path`` for what is not whole yet; it tells who writes it."""
    return path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.partial"


def whole_name(path: Path) -> Path:
    """The path that something will have once it is whole; the same where it is no partial name."""
    mark = re.compile(rf"\.(.+)\.{re.escape(socket.gethostname())}\.\d+\.[0-9a-f]{{8}}\.partial")
    return Path(*[found[1] if (found := mark.fullmatch(part)) else part for part in path.parts])


def abandoned(path: Path) -> list[Path]:
    """What stands beside ``path`` under partial names of processes on this machine that run no more."""
    prefix = f".{path.name}.{socket.gethostname()}."
    found = []
    for entry in path.parent.iterdir():
        if entry.name.startswith(prefix) and entry.name.endswith(".partial"):
            process = entry.name.removeprefix(prefix).split(".")[0]
            if process.isdigit() and not _is_running(int(process)):
                found.append(entry)
    return found


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def refuse_input(out: Path, read: Mapping[str, Path | None]) -> None:
    """Refuse to replace what is read from, or a folder around it.

    Args:
        out: To be written.
        read: How messages name it → file or folder on this machine, if it is on it.

    Raises:
        UsageError: ``out`` is, or holds, one of these.
    """
    here = out.absolute().resolve()
    for name, path in read.items():
        if path and here in (path.resolve(), *path.resolve().parents):
            hint = "choose another --out"
            raise UsageError("output-is-input", f"{out}: {name} is read from there", hint=hint, where=str(out))
