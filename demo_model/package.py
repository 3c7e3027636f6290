"""Files of the demo: the base and its adapters as package data, whole or not at all."""

import os
import shutil
from pathlib import Path

from demo_model.demo import Demo
from demo_model.party import PARTY
from demo_model.stored import BASE, write_adapter, write_base
from demo_model.tables import CLASSES

MOST_BYTES = 10_000_000
"""Upper limit of all files together."""
INIT = '"""The embedded demo: an adventurer and three classes, as package data."""\n'


_PARTS = frozenset({"__init__.py", "__pycache__", "demo-matrix.md", BASE, *CLASSES, PARTY})


class RefusedError(Exception):
    """The demo does not fit into a package, or would replace something else."""


def write_demo(demo: Demo, target: Path) -> int:
    """Write the demo beside its place and swap it in.

    Args:
        demo: what was trained.
        target: folder that holds the demo afterwards, and nothing else.

    Returns:
        Size of all files, in bytes.

    Raises:
        RefusedError: the files take more than `MOST_BYTES`, or the target holds something else. It is as it was.
    """
    require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, aside = (target.with_name(f".{target.name}.{os.getpid()}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        (partial / "__init__.py").write_text(INIT, encoding="utf-8")
        write_base(demo.base, demo.tokenizer, partial / BASE)
        for name, expert in demo.experts.items():
            write_adapter(expert, partial / name)
        files = [path for path in partial.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        if size > MOST_BYTES:
            raise RefusedError(f"the demo takes {size:,} bytes, at most {MOST_BYTES:,} are allowed")
        _give_usual_modes(files)
        if target.exists():
            target.rename(aside)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
    return size


def require_replaceable(target: Path) -> None:
    """Refuse a folder that holds anything but a demo."""
    if target.exists():
        strange = (
            sorted(path.name for path in target.iterdir() if path.name not in _PARTS)
            if target.is_dir()
            else [target.name]
        )
        if strange:
            raise RefusedError(f"{target} holds '{strange[0]}', which is no part of a demo; choose another folder")


def _give_usual_modes(files: list[Path]) -> None:
    umask = os.umask(0o077)
    os.umask(umask)
    for path in files:
        path.chmod(0o666 & ~umask)
