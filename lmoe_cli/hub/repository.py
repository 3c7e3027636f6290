"""A repository at one commit: what it holds, and its files read in part."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from lmoe_cli.errors import NetworkError, UsageError
from lmoe_cli.hub.cache import cached_commit, snapshot_folder
from lmoe_cli.hub.client import client, headers, translated

NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]{0,95}/)?[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""A name of a repository; the oldest ones have no organisation."""
COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT_BRANCH = "main"
MAX_FILES = 100_000
RETRIES = 3


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository and what the Hub announces of it."""

    size: int
    """Bytes."""
    sha256: str | None = None
    """Of the content, for files in large-file storage."""
    git_sha1: str | None = None
    """Name of the git blob, for the others."""

    @property
    def content_name(self) -> str | None:
        """How the cache names the content."""
        return self.sha256 or self.git_sha1


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: str
    """``organisation/name``."""
    revision: str
    """Branch, tag or commit that was asked for."""
    commit: str
    files: Mapping[str, RemoteFile]
    online: bool
    """False where only the local cache was asked."""


def look_up(name: str, revision: str | None = None, token: str | None = None) -> Repository:
    """Find a repository and list its files, from the Hub or, where that gives no answer, from the local cache.

    Args:
        name: ``organisation/name``.
        revision: Branch, tag or commit; the default branch when None.
        token: Overrides the one stored by ``hf auth login``.

    Raises:
        UsageError: The name cannot be one of a repository.
        NotFoundError: No such repository or revision.
        AccessError: Gated, or the token is not accepted.
        NetworkError: No network, or a Hub that does not work, and not in the cache.
    """
    if not NAME.fullmatch(name):
        message = f"{name!r} is not a repository name"
        raise UsageError("bad-reference", message, hint="write organisation/name", where=name)
    revision = revision or DEFAULT_BRANCH
    try:
        with translated(name, revision):
            commit = _commit(name, revision, token)
            tree = client().HfApi(token=token).list_repo_tree(name, recursive=True, revision=commit)
            found: dict[str, RemoteFile] = {}
            for entry in tree:
                if isinstance(entry, client().hf_api.RepoFile):
                    found[entry.path] = _announced(entry)
                if len(found) > MAX_FILES:
                    raise UsageError("too-many-files", f"{name}: over {MAX_FILES} files", where=name)
    except NetworkError:
        cached = _from_cache(name, revision)
        if cached is None:
            raise
        return cached
    return Repository(name, revision, commit, found, online=True)


def _commit(name: str, revision: str, token: str | None) -> str:
    library = client()
    library.utils.validate_repo_id(name)
    response = library.utils.http_backoff(
        "GET",
        f"{library.constants.ENDPOINT}/api/models/{name}/revision/{quote(revision, safe='')}",
        headers=headers(token),
        max_retries=RETRIES,
        retry_on_exceptions=(),  # without a network the cache is asked at once
    )
    library.utils.hf_raise_for_status(response)
    commit = response.json()["sha"]
    if not COMMIT.fullmatch(commit):
        raise ValueError(f"a commit called {commit!r}")
    return str(commit)


def _announced(entry: Any) -> RemoteFile:
    if type(entry.size) is not int or entry.size < 0:
        raise ValueError(f"a file of {entry.size!r} bytes")
    sha256 = entry.lfs.sha256 if entry.lfs else None
    return RemoteFile(entry.size, sha256, None if sha256 else entry.blob_id)


def _from_cache(name: str, revision: str) -> Repository | None:
    commit = cached_commit(name, revision)
    if commit is None:
        return None
    folder = snapshot_folder(name, commit)
    listed = {
        path.relative_to(folder).as_posix(): RemoteFile(path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }
    return Repository(name, revision, commit, listed, online=False)


def read_range(repository: Repository, file: str, start: int, length: int, token: str | None = None) -> bytes:
    """Read some bytes of a file without downloading it.

    Returns:
        ``length`` bytes from ``start``, fewer only where the file ends.

    Raises:
        AccessError: Gated, or the token is not accepted.
        NetworkError: They did not arrive.
    """
    library, where = client(), f"{repository.name}/{file}"
    due = max(0, min(length, repository.files[file].size - start))
    if due == 0:
        return b""
    data = bytearray()
    with translated(where):
        url = library.hf_hub_url(repository.name, file, revision=repository.commit)
        asked = headers(token) | {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        with library.utils.http_stream_backoff(
            "GET", url, headers=asked, max_retries=RETRIES, retry_on_exceptions=()
        ) as response:
            if response.status_code >= 400:
                response.read()
            library.utils.hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start  # a server that knows no ranges sends the whole file
            for chunk in response.iter_bytes(chunk_size=1 << 16):
                data += chunk
                if len(data) >= skip + length:
                    break
    if len(data) - skip < due:
        message = f"{where}: {max(0, len(data) - skip)} bytes arrived where {due} are due"
        raise NetworkError("unreachable", message, hint="try again", where=where)
    return bytes(data[skip : skip + length])
