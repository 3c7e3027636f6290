"""Checkpoints of a run: which of them are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from lmoe_cli import files
from lmoe_cli.errors import LmoeError

WHOLE = "whole.json"
"""Written when all else of a checkpoint is there: the SHA-256 of its files."""
NAME = re.compile(r"checkpoint-(\d+)")


class Seal(TrainerCallback):  # type: ignore[misc]
    """Marks every checkpoint as whole once all processes have written their part of it, and then removes old ones.

    Args:
        keep: How many stay, and the best one.
    """

    def __init__(self, keep: int) -> None:
        self._keep = keep

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del control
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            seal(folder / f"checkpoint-{state.global_step}")
            best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else ""
            for _step, path in numbered(folder)[self._keep :]:
                if path.name != best:
                    files.remove_folder(path)


def seal(folder: Path) -> None:
    """Mark a checkpoint as whole."""
    found = {path.name: files.sha256(path) for path in sorted(folder.iterdir()) if path.name != WHOLE}
    files.write_file(folder / WHOLE, json.dumps(found, indent=2).encode() + b"\n", force=True)


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run by their steps, the newest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def last_whole(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest checkpoint of a run that is whole, and newer ones that are not."""
    damaged: list[Path] = []
    for _, path in numbered(folder):
        if is_whole(path):
            return path, damaged
        damaged.append(path)
    return None, damaged


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint holds what was written, to the last bit."""
    try:
        due = json.loads(files.read_bytes(folder / WHOLE, 1 << 20))
        return all(files.sha256(folder / name) == digest for name, digest in due.items())
    except (LmoeError, ValueError, AttributeError):
        return False
