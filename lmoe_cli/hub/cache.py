"""The local cache that the client shares with every other program that uses the Hub."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lmoe_cli import files
from lmoe_cli.errors import AccessError, InvalidFileError, LmoeError
from lmoe_cli.hub.client import client


@dataclass(frozen=True)
class CachedRepository:
    """One commit of a repository in the local cache."""

    name: str
    commit: str
    refs: tuple[str, ...]
    """Branches and tags that stood here when they were last looked up."""
    folder: Path
    size: int
    """Bytes on the disk."""


def root() -> Path:
    """Where the client keeps repositories, wherever ``HF_*`` variables put it."""
    return Path(client().constants.HF_HUB_CACHE)


def repository_folder(name: str) -> Path:
    """Where the client keeps one repository: its contents, and its commits as links to them."""
    return root() / ("models--" + name.replace("/", "--"))


def snapshot_folder(name: str, commit: str) -> Path:
    """The files of one commit; links to the contents on most systems."""
    return repository_folder(name) / "snapshots" / commit


def is_cached(path: Path) -> bool:
    """Whether a resolved path lies in the cache."""
    return path.is_relative_to(root().resolve())


def cached_path(name: str, commit: str, file: str) -> Path | None:
    """Where a file of a repository stands in the cache, if it is there."""
    path = snapshot_folder(name, commit) / file
    return path if path.is_file() else None


def cached_commit(name: str, revision: str) -> str | None:
    """The commit in the cache that a branch, tag or commit means, as far as the cache knows."""
    ref = repository_folder(name) / "refs" / revision
    commit = files.read_bytes(ref, 100).decode("ascii", "replace").strip() if ref.is_file() else revision
    return commit if commit and snapshot_folder(name, commit).is_dir() else None


def remember(name: str, revision: str, commit: str) -> None:
    """Note what a branch or tag means, so that it is found without a network."""
    ref = repository_folder(name) / "refs" / revision
    if revision != commit and cached_commit(name, revision) != commit:
        files.write_file(ref, commit.encode(), force=True)


def discard(name: str, path: Path) -> None:
    """Remove a content that is not what it is said to be, and every name that its repository gives it."""
    content = path.resolve()
    for folder in ("snapshots", "blobs"):
        for link in list((repository_folder(name) / folder).rglob("*")):
            if link.is_symlink() and link.resolve() == content:
                files.remove(link)
    files.remove(content)


def cached_repositories() -> list[CachedRepository]:
    """Every commit of every model repository in the cache, by name."""
    found = [
        CachedRepository(
            repository.repo_id,
            revision.commit_hash,
            tuple(sorted(revision.refs)),
            Path(revision.snapshot_path),
            revision.size_on_disk,
        )
        for repository in _scan()[0]
        for revision in repository.revisions
    ]
    return sorted(found, key=lambda item: (item.name, item.commit))


def damaged_repositories() -> list[LmoeError]:
    """What is wrong with the repositories of the cache that `cached_repositories` leaves out."""
    return _scan()[1]


def _scan() -> tuple[list[Any], list[LmoeError]]:
    """The client's own account of each model repository, and what is wrong with those it gives none of.

    Raises:
        InvalidFileError: A file stands where the cache should be.
    """
    if root().exists() and not root().is_dir():
        hint = "check HF_HUB_CACHE and HF_HOME"
        message = f"{root()}: a file where the Hub's cache should be"
        raise InvalidFileError("not-a-folder", message, hint=hint, where=str(root()))
    client()  # set up before it is used
    from huggingface_hub.utils._cache_manager import _scan_cached_repo

    sound: list[Any] = []
    damaged: list[LmoeError] = []
    with files.reading(root()):
        for folder in sorted(root().glob("models--*")):
            try:
                sound.append(_scan_cached_repo(folder))
            except client().errors.CorruptedCacheException:  # half of one, such as refs without files
                continue
            except (OSError, ValueError) as error:
                hint = "remove that folder, or pull it again after you did"
                message = f"{folder}: a damaged repository in the cache: {error}"
                damaged.append(InvalidFileError("cache-damaged", message, hint=hint, where=str(folder)))
    return sound, damaged


def delete(commits: Collection[str]) -> int:
    """Delete commits from the cache.

    Returns:
        Bytes freed.

    Raises:
        AccessError: They could not be deleted.
    """
    known = {"size_on_disk": 0, "incomplete_files": frozenset(), "warnings": [], "cache_dir": root()}
    kind = client().HFCacheInfo
    used = {field.name: known[field.name] for field in fields(kind) if field.name in known}
    strategy = kind(repos=frozenset(_scan()[0]), **used).delete_revisions(*commits)
    with files.writing(root()):
        strategy.execute()
    left = next((path for path in (*strategy.repos, *strategy.snapshots) if path.exists()), None)
    if left:  # the client only logs it
        raise AccessError("not-writable", f"{left}: no permission to remove it", where=str(left))
    return int(strategy.expected_freed_size)
