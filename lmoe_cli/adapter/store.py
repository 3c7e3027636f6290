"""The adapters on this machine: those in the cache of the Hub's client, and those that come with lmoe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from lmoe_cli import files, hub
from lmoe_cli.adapter.adapter import PICKLE, Adapter
from lmoe_cli.adapter.config import CONFIG
from lmoe_cli.adapter.converted import converted_folder
from lmoe_cli.adapter.soundness import inspect_adapter
from lmoe_cli.errors import LmoeError, NotFoundError, UsageError
from lmoe_cli.source import Folder, demos, open_source


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter on this machine."""

    ref: str
    revision: str | None
    """Commit; None for what comes with lmoe."""
    refs: tuple[str, ...]
    """Branches and tags that the commit was known by."""
    path: Path
    size: int
    """Bytes on the disk."""
    adapter: Adapter | None
    """None where it is damaged."""
    problem: LmoeError | None = None
    """What is wrong with a damaged one."""

    @property
    def is_demo(self) -> bool:
        return self.revision is None


def stored_adapters() -> list[StoredAdapter]:
    """Every adapter on this machine, by name."""
    found = [
        item
        for cached in hub.cached_repositories()
        if (item := _stored(Folder(cached.name, cached.folder), cached.commit, cached.refs, cached.size))
    ]
    for name in demos():
        source = open_source(f"demo:{name}")
        if isinstance(source, Folder) and source.has(CONFIG):
            item = _stored(source, None, (), sum(source.sizes.values()))
            found += [item] if item else []
    return found


def _stored(source: Folder, commit: str | None, refs: tuple[str, ...], size: int) -> StoredAdapter | None:
    try:
        adapter = inspect_adapter(source)
    except LmoeError as error:
        if error.code == "no-adapter":
            return None
        return StoredAdapter(source.ref, commit, refs, source.path, size, None, error)
    return StoredAdapter(source.ref, commit, refs, source.path, size, adapter)


def find_cached(ref: str) -> list[hub.CachedRepository]:
    """The commits in the cache that a reference means.

    Args:
        ref: ``org/name`` for all of them, ``org/name@REVISION`` for one, by branch, tag or the start of its hash.

    Raises:
        UsageError: It cannot mean something in the cache.
        NotFoundError: There is none.
    """
    name, _, revision = ref.removeprefix("hf://").partition("@")
    if ref.startswith("demo:") or not hub.NAME.fullmatch(name):
        message = f"{ref}: only what was pulled from the Hub can be removed"
        raise UsageError("usage", message, hint="name it as 'lmoe ls' does; remove folders of your own yourself")
    found = [
        item
        for item in hub.cached_repositories()
        if item.name == name and (not revision or revision in item.refs or item.commit.startswith(revision))
    ]
    if not found:
        raise NotFoundError("not-found", f"{ref}: not in the local cache", hint="lmoe ls", where=ref)
    return found


def remove(cached: Collection[hub.CachedRepository]) -> int:
    """Remove commits from the cache, and what was converted from their pickles.

    Returns:
        Bytes freed in the cache.
    """
    pickles = [path for item in cached if (path := item.folder / PICKLE).is_file()]
    converted = [converted_folder(path) for path in pickles]
    freed = hub.delete([item.commit for item in cached])
    for folder in converted:
        files.remove_folder(folder)
    return freed
