"""Files of a repository brought into the local cache, and checked against what the Hub announced."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from lmoe_cli import files
from lmoe_cli.errors import AccessError, NetworkError
from lmoe_cli.hub.cache import cached_path, discard, remember, repository_folder, snapshot_folder
from lmoe_cli.hub.client import GaveUpError, client, offline, translated
from lmoe_cli.hub.repository import RemoteFile, Repository


class Progress(Protocol):
    """Told how a download goes."""

    def start(self, name: str, size: int) -> None: ...

    def advance(self, size: int) -> None: ...


def download(
    repository: Repository, names: Collection[str], token: str | None = None, progress: Progress | None = None
) -> Path:
    """Bring files of a repository into the local cache and check them against what the Hub announced.

    Args:
        repository: What `look_up` found.
        names: Files of ``repository.files``.
        token: Overrides the stored one.
        progress: Told how it goes.

    Returns:
        The folder of this commit in the cache; it holds at least ``names``.

    Raises:
        NetworkError: A file did not arrive, or is not the one the Hub announced; it is not kept.
        ResourceError: The disk is full.
    """
    folder = snapshot_folder(repository.name, repository.commit)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing and not repository.online:
        raise offline(f"{repository.name}/{missing[0]}")
    discard_damaged(repository, missing)
    files.require_space(folder, sum(repository.files[name].size for name in missing))
    for name in missing:
        _download_file(repository, name, token, progress)
    if repository.online:
        with contextlib.suppress(AccessError):  # a cache that may only be read still serves
            remember(repository.name, repository.revision, repository.commit)
    return folder


def discard_damaged(repository: Repository, names: Collection[str]) -> list[str]:
    """Remove cached files that are not what the Hub announced, such as those that another program let pass.

    Returns:
        Names of the removed files.
    """
    found = damaged(repository, names)
    for path in found.values():
        discard(repository.name, path)
    return list(found)


def damaged(repository: Repository, names: Collection[str]) -> dict[str, Path]:
    """Cached files that are not what the Hub announced: name → where it stands."""
    found = {}
    for name in names:
        announced = repository.files[name]
        content = repository_folder(repository.name) / "blobs" / (announced.content_name or "")
        path = cached_path(repository.name, repository.commit, name) or (content if content.is_file() else None)
        if path and _difference(path, announced):
            found[name] = path
    return found


def _download_file(repository: Repository, name: str, token: str | None, progress: Progress | None) -> None:
    announced, where = repository.files[name], f"{repository.name}/{name}"
    if progress:
        progress.start(name, announced.size)
    with translated(where):
        path = Path(
            client().hf_hub_download(
                repository.name,
                name,
                revision=repository.commit,
                token=token,
                tqdm_class=_bar(announced.size, progress),
            )
        )
    if difference := _difference(path, announced):
        discard(repository.name, path)
        message = f"{where}: {difference}"
        raise NetworkError("hash-mismatch", message, hint="nothing was kept: pull it again", where=where)


def _difference(path: Path, announced: RemoteFile) -> str | None:
    """How a file differs from what the Hub announced of it."""
    size = path.stat().st_size
    seen, due = f"{size} bytes", f"{announced.size} bytes"
    if size == announced.size and announced.sha256:
        seen, due = f"SHA-256 {files.sha256(path)}", f"SHA-256 {announced.sha256}"
    elif size == announced.size and announced.git_sha1:
        seen, due = f"git blob {git_blob_sha1(path)}", f"git blob {announced.git_sha1}"
    return None if seen == due else f"arrived as {seen}, the Hub announced {due}"


def git_blob_sha1(path: Path) -> str:
    """The name git gives a file's bytes, in hexadecimal: what the Hub announces where it has no SHA-256."""
    with files.opened(path) as file:
        head = b"blob %d\0" % os.fstat(file.fileno()).st_size
        return hashlib.file_digest(file, lambda: hashlib.sha1(head, usedforsecurity=False)).hexdigest()


def _bar(size: int, progress: Progress | None) -> type:
    """What the client takes for a tqdm class: tells `progress`, and ends a download that starts over and over."""

    class Bar:
        n = 0
        total: int | None = None

        def __init__(self, *_: Any, **__: Any) -> None:
            self.received = 0

        def update(self, amount: float = 1) -> None:
            if progress:
                progress.advance(int(amount))
            self.received += max(0, int(amount))
            if self.received > 3 * size + (1 << 20):
                raise GaveUpError("unreachable", f"the connection breaks again and again, after {self.received} bytes")

        def update_transfer(self, amount: float = 1) -> None:
            """What came over the wire for bytes that `update` tells when they are whole."""

        def set_postfix_str(self, *_: object, **__: object) -> None: ...

        def set_transfer_postfix_str(self, *_: object, **__: object) -> None: ...

        def close(self) -> None: ...

        def __enter__(self) -> Bar:
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None: ...

    return Bar
