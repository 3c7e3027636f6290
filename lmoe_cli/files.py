"""The one module that writes. What is visible is whole: temp beside, fsync, rename."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from types import TracebackType

from lmoe_cli.disk import NAME_A_FILE, abandoned, partial_name
from lmoe_cli.disk import reading as reading
from lmoe_cli.disk import writing as writing
from lmoe_cli.errors import InvalidFileError, ResourceError, UsageError

CHUNK = 8 << 20
KEPT = 16 << 20
"""Bytes of a new file that the system's cache may hold before the disk is made to take them. Fresh memory for gigabytes
of cache costs more than the writing, and would push out what other programs read."""
REPORT = "bake-report.json"
TRAINED = "train-report.json"
ROUTER = "router.json"
"""What folders hold that lmoe baked or trained. Only such a folder, or an empty one, may be replaced by ``--force``."""


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a small file.

    Args:
        path: An ordinary file.
        limit: Most bytes to accept.

    Raises:
        NotFoundError: It is not there.
        AccessError: It may not be read.
        InvalidFileError: It is a folder or a device, or larger than ``limit``.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            hint, message = "is it the right file?", f"{path}: {size} bytes, at most {limit}"
            raise InvalidFileError("file-too-large", message, hint=hint, where=str(path))
        return file.read(limit)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BufferedReader]:
    """Open an ordinary file for reading. See `read_bytes` for the errors."""
    with reading(path):
        if not path.is_file() and path.exists():  # asked before it is opened: a pipe would wait for a writer
            kind = "a folder" if path.is_dir() else "a pipe or device"
            message = f"{path}: is {kind}, not a file"
            raise InvalidFileError("not-a-file", message, hint=NAME_A_FILE, where=str(path))
        with path.open("rb") as file:
            yield file


def require_space(folder: Path, size: int) -> None:
    """Refuse before writing ``size`` bytes into a folder (or the nearest parent that exists) without room for them."""
    while not folder.exists():
        folder = folder.parent
    disk = shutil.disk_usage(folder)
    free = disk.free
    if disk.total and free < size:  # what is no disk, such as /proc, says why when it is written to
        unit, name = (1e9, "GB") if size > 1e9 else (1e6, "MB")
        message = f"{folder}: {size / unit:.1f} {name} needed, {free / unit:.1f} {name} free"
        raise ResourceError("disk-full", message, hint="free some space or choose another place", where=str(folder))


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes, *, force: bool = False, mode: int = 0o666) -> None:
    """Write a whole file or nothing.

    Raises:
        UsageError: It exists and ``force`` is not set.
        ResourceError: The disk is full.
    """
    refuse_existing_file(path, force=force)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_name(path)
        try:
            with NewFile(partial, mode=mode) as file:
                file.write(data)
            partial.replace(path)
            _sync_folder(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends without an error.

    Args:
        target: Where it shall stand. Parents are made.
        force: Replace what stands there, if lmoe may have written it.

    Yields:
        An empty folder beside ``target`` to write into.

    Raises:
        UsageError: ``target`` exists, also by the time the block ends, and ``force`` is not set, or it is not one that
            lmoe writes.
    """
    refuse_existing(target, force=force)
    partial = partial_name(target)
    try:
        with writing(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            for left in abandoned(target):
                shutil.rmtree(left, ignore_errors=True)
            partial.mkdir()
        yield partial
        with writing(target):
            _sync_tree(partial)
        refuse_existing(target, force=force)
        with writing(target):
            _swap(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(target: Path, *, force: bool) -> None:
    """Stop early when `new_folder` would refuse ``target``."""
    if target.name in ("", ".."):
        message = f"{target}: no name for a new folder"
        raise UsageError("bad-path", message, hint="end it with a name of its own", where=str(target))
    if not os.path.lexists(target):
        return
    if not force:
        raise _exists(target)
    is_folder = target.is_dir() and not target.is_symlink()
    marks = (REPORT, TRAINED, ROUTER)
    ours = is_folder and (not any(target.iterdir()) or any((target / name).is_file() for name in marks))
    if not ours:
        hint = "choose another --out, or remove it yourself"
        raise UsageError("output-not-ours", f"{target}: not a folder that lmoe wrote", hint=hint, where=str(target))


def refuse_existing_file(path: Path, *, force: bool) -> None:
    """Stop early when `write_file` would refuse ``path``."""
    with writing(path):
        is_folder = path.is_dir()
    if is_folder:
        raise InvalidFileError("not-a-file", f"{path}: is a folder, not a file", hint=NAME_A_FILE, where=str(path))
    if os.path.lexists(path) and not force:
        raise _exists(path)


class NewFile:
    """A file being written, with the permissions the umask gives, synced to the disk when it is closed.

    Args:
        path: Must not exist.
        hashed: Compute the SHA-256 of what is written.
        mode: Permissions, before the umask.
    """

    def __init__(self, path: Path, *, hashed: bool = False, mode: int = 0o666) -> None:
        self.path = path
        self._hash = hashlib.sha256() if hashed else None
        self._kept = 0
        with writing(path):
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data).cast("B")
        if self._hash:
            self._hash.update(view)
        with writing(self.path):
            while view:
                written = os.write(self._descriptor, view)
                self._send_on(written)
                view = view[written:]

    def copy(self, source: Path, start: int, length: int) -> None:
        """Append a range of another file without passing it through this process where the system can."""
        with reading(source), source.open("rb") as file:
            while length > 0:
                if self._hash:  # what is hashed passes through here anyway
                    chunk = os.pread(file.fileno(), min(length, CHUNK), start)
                    self.write(chunk)
                    moved = len(chunk)
                else:
                    moved = _copy_range(file.fileno(), self._descriptor, start, length, self.path)
                    self._send_on(moved)
                if moved == 0:
                    message = f"{source}: ended while it was copied"
                    raise InvalidFileError("header-truncated", message, where=str(source))
                start, length = start + moved, length - moved

    def _send_on(self, written: int) -> None:
        """Have the disk take what was written, and the system's cache forget what the disk has."""
        self._kept += written
        if self._kept >= KEPT and hasattr(os, "posix_fadvise"):
            self._kept = 0
            with contextlib.suppress(OSError):  # advice, which a file system may refuse
                os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    @property
    def sha256(self) -> str:
        """Of everything written, in hexadecimal; empty where it was not asked for."""
        return self._hash.hexdigest() if self._hash else ""

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with writing(self.path):
                    os.fsync(self._descriptor)
        finally:
            os.close(self._descriptor)


def _copy_range(source: int, target: int, start: int, length: int, path: Path) -> int:
    with writing(path):
        try:
            return os.copy_file_range(source, target, min(length, 1 << 30), offset_src=start)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
        chunk = os.pread(source, min(length, CHUNK), start)
        view = memoryview(chunk)
        while view:
            view = view[os.write(target, view) :]
        return len(chunk)


def copy_file(source: Path, target: Path) -> None:
    """Copy a whole file's bytes to a new one, in a new folder where it needs one."""
    with writing(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    with NewFile(target) as file:
        file.copy(source, 0, source.stat().st_size)


def remove(path: Path) -> None:
    """Remove a file, if it is there."""
    with writing(path):
        path.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder for work in progress, and its parents, unless it is there."""
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)


def append(path: Path, line: bytes) -> None:
    """Add a line to the end of a log."""
    with writing(path), path.open("ab") as file:
        file.write(line)


def remove_folder(path: Path) -> None:
    """Remove a folder that lmoe made and all that is in it, if it is there."""
    with writing(path), contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def _exists(path: Path) -> UsageError:
    hint = "choose another name, or replace it with --force"
    return UsageError("output-exists", f"{path}: exists already", hint=hint, where=str(path))


def _swap(partial: Path, target: Path) -> None:
    if not os.path.lexists(target):
        partial.rename(target)
    else:
        aside = partial_name(target).with_suffix(".replaced")  # never taken for what may be cleared away
        target.rename(aside)
        try:
            partial.rename(target)
        except BaseException:  # also a signal between the two
            if not os.path.lexists(target):
                aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    _sync_folder(target.parent)


def _sync_tree(folder: Path) -> None:
    for parent, _, _ in os.walk(folder):
        _sync_folder(Path(parent))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)
