"""A place with files: a folder, a repository of the Hub at one commit, or what comes with lmoe.

Everything above this module reads adapters and bases through a `Source` and does not know where they are.
"""

from __future__ import annotations

import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath

from lmoe_cli import files, hub
from lmoe_cli.checkpoint.header import Header, parse_header, read_header
from lmoe_cli.disk import READABLE
from lmoe_cli.errors import AccessError, InvalidFileError, NotFoundError, UsageError

DEMO = Path(__file__).parent / "demo"
DEMO_FILES = ("config.json", "adapter_config.json", "router.json")
"""Of which any demo has one: it is a base, an adapter or a trained router."""
REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,200}")
MAX_FILES = 100_000


class Source(ABC):
    """Files by name, read whole or in part.

    Args:
        ref: As the user wrote it.
        revision: Commit, for a repository of the Hub.
        path: Folder on this machine; None while it is only on the Hub.
    """

    def __init__(self, ref: str, revision: str | None, path: Path | None) -> None:
        self.ref = ref
        self.revision = revision
        self.path = path

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Bytes of every file, by its name relative to the source."""
        return self._list()

    @abstractmethod
    def _list(self) -> Mapping[str, int]: ...

    @abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """Read a small file whole.

        Args:
            name: One of `sizes`.
            limit: Most bytes to accept.
        """

    @abstractmethod
    def header(self, name: str) -> Header:
        """Read the header of a safetensors file."""

    @abstractmethod
    def fetch(self, names: Collection[str], progress: hub.Progress | None = None) -> Path:
        """Make files stand in a folder on this machine and return that folder."""

    @abstractmethod
    def local(self, name: str) -> Path | None:
        """Where a file stands on this machine, if it does."""

    def disregard_damaged(self) -> list[str]:
        """Take downloaded files that are not what was announced for not there.

        Returns:
            Their names.
        """
        return []

    def discard_damaged(self) -> list[str]:
        """Remove such files, so that `fetch` brings them again.

        Returns:
            Names of the removed files.
        """
        return []

    def require(self, name: str) -> Path:
        """Where a file stands on this machine.

        Raises:
            NotFoundError: It was not fetched.
        """
        path = self.local(name)
        if path is None:
            where = self.where(name)
            raise NotFoundError("not-found", f"{where}: not on this machine", hint=f"lmoe pull {self.ref}", where=where)
        return path

    @property
    def repository_name(self) -> str | None:
        """``organisation/name`` on the Hub, if it is from there."""
        return None

    @property
    def pinned(self) -> str:
        """A reference that means the same files later: of the Hub, its commit."""
        return self.ref

    def has(self, name: str) -> bool:
        return name in self.sizes

    def where(self, name: str) -> str:
        """How messages name a file of this source."""
        return f"{self.ref}/{name}"


class Folder(Source):
    """A folder on this machine."""

    path: Path

    def __init__(self, ref: str, path: Path) -> None:
        super().__init__(ref, None, path)

    def _list(self) -> Mapping[str, int]:
        found: dict[str, int] = {}
        with files.reading(self.path):
            os.scandir(self.path).close()  # folders inside that may not be read are as good as not there
            for parent, folders, names in os.walk(self.path):
                folders[:] = [name for name in folders if not name.startswith(".")]
                for name in names:
                    path = Path(parent, name)
                    try:
                        status = path.stat()
                    except OSError:  # a dangling link is a file that is not there
                        continue
                    if stat.S_ISREG(status.st_mode):
                        found[path.relative_to(self.path).as_posix()] = status.st_size
                if len(found) > MAX_FILES:
                    hint = "name the folder of one adapter or model"
                    raise UsageError("too-many-files", f"{self.ref}: over {MAX_FILES} files", hint=hint, where=self.ref)
        return found

    def file(self, name: str) -> Path:
        """The path of a file, refused where its name or a link leads out of the folder."""
        inside(name, self.where(name))
        path = self.path / name
        try:
            real, root = path.resolve(), self.path.resolve()
        except (OSError, RuntimeError) as error:  # links that lead in a circle, a name that is too long
            raise InvalidFileError(
                "bad-path", f"{self.where(name)}: cannot be followed", where=self.where(name)
            ) from error
        if real.is_relative_to(root) or self._is_cached(real):
            return path
        message = f"{self.where(name)}: a link to {real}, outside its folder"
        raise InvalidFileError("path-outside", message, hint="copy the file into the folder", where=self.where(name))

    def _is_cached(self, real: Path) -> bool:
        """Snapshots of the Hub cache are links to blobs elsewhere in that cache."""
        here = self.path.resolve()
        return "snapshots" in here.parts and hub.is_cached(here) and hub.is_cached(real)

    def local(self, name: str) -> Path | None:
        path = self.file(name)
        return path if path.is_file() else None

    def read(self, name: str, limit: int) -> bytes:
        return files.read_bytes(self.file(name), limit)

    def header(self, name: str) -> Header:
        return read_header(self.file(name))

    def fetch(self, names: Collection[str], progress: hub.Progress | None = None) -> Path:
        for name in names:
            if not self.file(name).is_file():
                raise NotFoundError("not-found", f"{self.where(name)}: no such file", where=self.where(name))
        return self.path


class Remote(Source):
    """A repository of the Hub at one commit, read over the network until it is fetched."""

    def __init__(self, ref: str, repository: hub.Repository, token: str | None = None) -> None:
        super().__init__(ref, repository.commit, None)
        self.repository = repository
        self.token = token
        self._disregarded: frozenset[str] = frozenset()

    @property
    def repository_name(self) -> str:
        return self.repository.name

    @property
    def pinned(self) -> str:
        return f"hf://{self.repository.name}@{self.repository.commit}"

    def _list(self) -> Mapping[str, int]:
        return {name: file.size for name, file in self.repository.files.items()}

    def local(self, name: str) -> Path | None:
        if name in self._disregarded:
            return None
        return hub.cached_path(self.repository.name, self.repository.commit, name)

    def read(self, name: str, limit: int) -> bytes:
        size = self.sizes[name]
        if size > limit:
            where = self.where(name)
            raise InvalidFileError("file-too-large", f"{where}: {size} bytes, at most {limit}", where=where)
        return self._range(name, 0, size) if size else b""

    def header(self, name: str) -> Header:
        return parse_header(lambda start, length: self._range(name, start, length), self.sizes[name], self.where(name))

    def _range(self, name: str, start: int, length: int) -> bytes:
        cached = self.local(name)
        if cached is None:
            return hub.read_range(self.repository, name, start, length, self.token)
        with files.reading(cached), cached.open("rb") as file:
            return os.pread(file.fileno(), length, start)

    def disregard_damaged(self) -> list[str]:
        self._disregarded = frozenset(hub.damaged(self.repository, self._cached()))
        return sorted(self._disregarded)

    def discard_damaged(self) -> list[str]:
        return hub.discard_damaged(self.repository, self._cached())

    def _cached(self) -> list[str]:
        return [name for name in self.sizes if self.local(name)]

    def fetch(self, names: Collection[str], progress: hub.Progress | None = None) -> Path:
        for name in names:
            inside(name, self.where(name))
        self.path = hub.download(self.repository, names, self.token, progress)
        return self.path


def open_source(
    ref: str, *, revision: str | None = None, token: str | None = None, beside: Path | None = None
) -> Source:
    """Find what a reference means.

    Args:
        ref: ``org/name[@revision]``, ``hf://org/name[@revision]``, a folder, or ``demo:NAME``.
        revision: Branch, tag or commit; overrides one in ``ref``.
        token: For the Hub; overrides the stored one.
        beside: Folder of the recipe that holds the reference; relative folders are looked for there first.

    Raises:
        UsageError: It can be none of these.
        NotFoundError: No such folder, repository or demo.
        AccessError, NetworkError: The Hub does not give it.
    """
    if not ref.strip():
        raise UsageError("bad-reference", "an empty reference", hint="write a folder, org/name or demo:NAME")
    if ref.startswith("demo:"):
        return _demo(ref)
    forced = ref.startswith("hf://")
    if not forced and (found := _folder(ref, beside)):
        return Folder(ref.rstrip("/") or ref, found)
    name, _, written = ref.removeprefix("hf://").removeprefix("models/").partition("@")
    looks_like_path = ref.startswith((".", "/", "~")) or "\\" in ref or name.count("/") != 1
    if not forced and looks_like_path:
        hint = "write organisation/name for a repository of the Hub" if "/" not in ref else "check the path"
        raise NotFoundError("not-found", f"{ref}: no such folder", hint=hint, where=ref)
    revision = revision or written or None
    if revision and (not REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError("bad-reference", f"{ref}: {revision!r} cannot be a revision", where=ref)
    return Remote(ref, hub.look_up(name, revision, token), token)


def _folder(ref: str, beside: Path | None) -> Path | None:
    path = Path(ref)
    for folder in [beside, None] if beside else [None]:
        try:
            candidate = (folder / path if folder else path).expanduser()
            if candidate.is_dir():
                return candidate
            if candidate.exists():
                hint = f"name its folder: {candidate.parent}"
                raise UsageError("not-a-folder", f"{ref}: a file, not a folder", hint=hint, where=ref)
        except PermissionError as error:
            raise AccessError("unreadable", f"{ref}: no permission to read it", hint=READABLE, where=ref) from error
        except (OSError, ValueError, RuntimeError) as error:
            raise UsageError("bad-reference", f"{ref[:80]!r} cannot be a path", where=ref[:80]) from error
    return None


def _demo(ref: str) -> Folder:
    name = ref.removeprefix("demo:")
    known = demos()
    if name not in known:
        hint = "one of " + ", ".join(f"demo:{other}" for other in known)
        raise NotFoundError("not-found", f"{ref}: no such demo", hint=hint, where=ref)
    return Folder(ref, DEMO / name)


def demos() -> list[str]:
    """Names of what comes with lmoe."""
    if not DEMO.is_dir():
        return []
    return sorted(path.name for path in DEMO.iterdir() if any((path / name).is_file() for name in DEMO_FILES))


def inside(name: str, where: str) -> None:
    """Refuse a relative file name that would leave its folder."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise InvalidFileError("path-outside", f"{where}: the file name leads out of its folder", where=where)
