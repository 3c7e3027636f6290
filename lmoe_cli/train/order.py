"""What the user asked to be trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lmoe_cli.train.config import TrainConfig


@dataclass(frozen=True)
class Order:
    """A training: what, where to, and how to begin."""

    config: TrainConfig
    folder: Path
    """Of the config: where files that it names are looked for."""
    out: Path
    resume: bool = False
    force: bool = False
    device: str | None = None
    token: str | None = None
    trust_remote_code: bool = False

    @property
    def work(self) -> Path:
        """Where it is trained, until ``out`` appears whole."""
        return self.out.with_name(f"{self.out.name}.work")
