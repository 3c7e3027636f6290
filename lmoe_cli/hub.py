"""The one module that talks to the Hugging Face Hub.

Files live in the ordinary Hugging Face cache. The client checks sizes only, so everything downloaded here is hashed
against what the Hub announced, and removed again when it differs.
"""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from lmoe_cli import files
from lmoe_cli.errors import AccessError, LmoeError, NetworkError, NotFoundError, UsageError

TIMEOUT_S = 20.0
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository and what the Hub announces of it."""

    size: int
    """Bytes."""
    sha256: str | None = None
    """Of the content, for files in large-file storage."""
    git_sha1: str | None = None
    """Name of the git blob, for the others."""


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    name: str
    """``organisation/name``."""
    commit: str
    files: Mapping[str, RemoteFile]
    online: bool
    """False where only the local cache was asked."""


@dataclass(frozen=True)
class CachedRepository:
    """One commit of a repository in the local cache."""

    name: str
    commit: str
    refs: tuple[str, ...]
    folder: Path
    size: int
    """Bytes on the disk."""


class Progress(Protocol):
    """Told how a download goes."""

    def start(self, name: str, size: int) -> None: ...

    def advance(self, size: int) -> None: ...


@cache
def _client() -> Any:
    """The library, imported late because that takes a third of a second, with a bound on every request."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, logging
    from huggingface_hub.utils._http import default_client_factory

    def bounded() -> Any:
        session = default_client_factory()
        session.timeout = TIMEOUT_S
        return session

    huggingface_hub.set_client_factory(bounded)
    logging.set_verbosity_error()
    disable_progress_bars()
    return huggingface_hub


def look_up(name: str, revision: str | None = None, token: str | None = None) -> Repository:
    """Find a repository and list its files, from the Hub or, offline, from the local cache.

    Args:
        name: ``organisation/name``.
        revision: Branch, tag or commit; the default branch when None.
        token: Overrides the one stored by ``hf auth login``.

    Raises:
        UsageError: The name cannot be one of a repository.
        NotFoundError: No such repository or revision.
        AccessError: Gated, or the token is not accepted.
        NetworkError: No network and not in the cache.
    """
    if not NAME.fullmatch(name):
        raise UsageError(
            "bad-reference", f"{name!r} is not a repository name", hint="write organisation/name", where=name
        )
    client = _client()
    try:
        with _translated(name, revision):
            api = client.HfApi(token=token)
            commit = api.model_info(name, revision=revision, timeout=TIMEOUT_S).sha
            tree = api.list_repo_tree(name, recursive=True, revision=commit)
            found = {entry.path: _announced(entry) for entry in tree if isinstance(entry, client.hf_api.RepoFile)}
    except NetworkError as error:
        cached = _from_cache(name, revision)
        if cached is None:
            raise
        if error.code == "hub-busy":
            raise
        return cached
    return Repository(name, commit, found, online=True)


def _announced(entry: Any) -> RemoteFile:
    sha256 = entry.lfs.sha256 if entry.lfs else None
    return RemoteFile(entry.size, sha256, None if sha256 else entry.blob_id)


def _from_cache(name: str, revision: str | None) -> Repository | None:
    folder = _repository_folder(name)
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision or ""
    snapshot = folder / "snapshots" / commit
    if not commit or not snapshot.is_dir():
        return None
    listed = {
        path.relative_to(snapshot).as_posix(): RemoteFile(path.stat().st_size)
        for path in snapshot.rglob("*")
        if path.is_file()
    }
    return Repository(name, commit, listed, online=False)


def _repository_folder(name: str) -> Path:
    return Path(_client().constants.HF_HUB_CACHE) / ("models--" + name.replace("/", "--"))


def is_cached(path: Path) -> bool:
    """Whether a resolved path lies in the cache of the Hub client, wherever ``HF_*`` variables put it."""
    constants = _client().constants
    return any(path.is_relative_to(Path(root).resolve()) for root in (constants.HF_HUB_CACHE, constants.HF_HOME))


def cached_path(repository: Repository, name: str) -> Path | None:
    """Where a file of a repository stands in the local cache, if it is there."""
    path = _repository_folder(repository.name) / "snapshots" / repository.commit / name
    return path if path.is_file() else None


def read_range(repository: Repository, name: str, start: int, length: int, token: str | None = None) -> bytes:
    """Read some bytes of a file without downloading it.

    Returns:
        ``length`` bytes from ``start``, fewer only where the file ends.
    """
    client = _client()
    with _translated(f"{repository.name}/{name}", None):
        url = client.hf_hub_url(repository.name, name, revision=repository.commit)
        headers = client.utils.build_hf_headers(token=token)
        headers |= {"Range": f"bytes={start}-{start + length - 1}", "Accept-Encoding": "identity"}
        with client.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT_S) as response:
            if response.status_code >= 400:
                response.read()
            client.utils.hf_raise_for_status(response)
            skip = 0 if response.status_code == 206 else start
            data = bytearray()
            for chunk in response.iter_bytes(chunk_size=1 << 16):
                data += chunk
                if len(data) >= skip + length:
                    break
    return bytes(data[skip : skip + length])


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
    folder = _repository_folder(repository.name) / "snapshots" / repository.commit
    missing = [name for name in names if cached_path(repository, name) is None]
    if missing and not repository.online:
        hint = "connect to the network, or unset HF_HUB_OFFLINE"
        message = f"{repository.name}: {missing[0]} is not in the local cache"
        raise NetworkError("offline", message, hint=hint, where=repository.name)
    files.require_space(folder, sum(repository.files[name].size for name in missing))
    for name in missing:
        _download_file(repository, name, token, progress)
    return folder


def _download_file(repository: Repository, name: str, token: str | None, progress: Progress | None) -> None:
    announced = repository.files[name]
    if progress:
        progress.start(name, announced.size)
    with _translated(f"{repository.name}/{name}", None), files.writing(_repository_folder(repository.name)):
        path = _client().hf_hub_download(
            repository.name,
            name,
            revision=repository.commit,
            token=token,
            tqdm_class=_bar(progress),
        )
    _verify(Path(path), announced, f"{repository.name}/{name}")


def _verify(path: Path, announced: RemoteFile, where: str) -> None:
    blob = path.resolve()
    size = blob.stat().st_size
    seen, due = f"{size} bytes", f"{announced.size} bytes"
    if size == announced.size and announced.sha256:
        seen, due = f"SHA-256 {files.sha256(blob)}", f"SHA-256 {announced.sha256}"
    elif size == announced.size and announced.git_sha1:
        seen, due = f"git blob {files.git_blob_sha1(blob)}", f"git blob {announced.git_sha1}"
    if seen != due:
        files.remove(path)
        files.remove(blob)
        message = f"{where}: arrived as {seen}, the Hub announced {due}"
        raise NetworkError("hash-mismatch", message, hint="nothing was kept: pull it again", where=where)


def _bar(progress: Progress | None) -> type:
    """What the client takes for a tqdm class."""

    class Bar:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def update(self, size: float = 1) -> None:
            if progress:
                progress.advance(int(size))

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    return Bar


def cached_repositories() -> list[CachedRepository]:
    """Every commit of every model repository in the local cache, by name."""
    client = _client()
    try:
        scanned = client.scan_cache_dir().repos
    except client.errors.CacheNotFound:
        return []
    found = [
        CachedRepository(
            repository.repo_id,
            revision.commit_hash,
            tuple(sorted(revision.refs)),
            Path(revision.snapshot_path),
            revision.size_on_disk,
        )
        for repository in scanned
        if repository.repo_type == "model"
        for revision in repository.revisions
    ]
    return sorted(found, key=lambda item: (item.name, item.commit))


def delete(commits: Collection[str]) -> int:
    """Delete commits from the local cache.

    Returns:
        Bytes freed.
    """
    with files.writing(Path(_client().constants.HF_HUB_CACHE)):
        strategy = _client().scan_cache_dir().delete_revisions(*commits)
        freed = int(strategy.expected_freed_size)
        strategy.execute()
    return freed


@contextlib.contextmanager
def _translated(name: str, revision: str | None) -> Iterator[None]:
    """Turn what the client raises into errors a user can act on."""
    kinds = _client().errors
    try:
        yield
    except LmoeError:
        raise
    except kinds.GatedRepoError as error:
        hint = f"accept its terms on https://huggingface.co/{name}, then 'hf auth login' or --token"
        raise AccessError("gated", f"{name}: access is restricted", hint=hint, where=name) from error
    except kinds.RevisionNotFoundError as error:
        raise NotFoundError("revision-not-found", f"{name}: no revision {revision!r}", where=name) from error
    except kinds.RepositoryNotFoundError as error:
        hint = "check the spelling; a private repository needs 'hf auth login' or --token"
        raise NotFoundError("repository-not-found", f"{name}: no such repository", hint=hint, where=name) from error
    except kinds.LocalEntryNotFoundError as error:
        raise _unreachable(name, error.__cause__ or error) from error
    except kinds.EntryNotFoundError as error:
        raise NotFoundError("not-found", f"{name}: no such file in the repository", where=name) from error
    except kinds.OfflineModeIsEnabled as error:
        hint = "unset HF_HUB_OFFLINE, or pull it while there is a network"
        raise NetworkError("offline", f"{name}: not in the local cache, and offline", hint=hint, where=name) from error
    except kinds.HfHubHTTPError as error:
        raise _refused(name, error) from error
    except (kinds.HTTPError, TimeoutError) as error:
        raise _unreachable(name, error) from error
    except kinds.HFValidationError as error:
        raise UsageError("bad-reference", f"{name}: {error}", hint="write organisation/name", where=name) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise _unreachable(name, error) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        message = f"{name}: the server's answer is not one of a Hub"
        raise NetworkError("hub-answer", message, hint="check HF_ENDPOINT", where=name) from error


def _refused(name: str, error: Any) -> LmoeError:
    status = error.response.status_code
    if status in (401, 403):
        hint = "check the token: 'hf auth whoami', 'hf auth login'"
        return AccessError(
            "not-authorised", f"{name}: the Hub does not accept these credentials", hint=hint, where=name
        )
    code = "hub-busy" if status in (408, 429) or status >= 500 else "hub-answer"
    return NetworkError(code, f"{name}: the Hub answered {status}", hint="try again in a while", where=name)


def _unreachable(name: str, error: BaseException) -> NetworkError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    hint = "check the network and HF_ENDPOINT; what is in the local cache works with HF_HUB_OFFLINE=1"
    return NetworkError("unreachable", f"{name}: cannot reach the Hub: {reason}", hint=hint, where=name)
