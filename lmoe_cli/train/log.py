"""What happens in a run: one line of JSON per step in a file, and whoever watches is told."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmoe_cli import files

Tell = Callable[[dict[str, Any]], None]
"""Is told of the beginning of a run, of every step and evaluation, and of what its user should know."""
COLLAPSED = 1.5
"""Effective number of experts under which routing has collapsed, where there are three or more."""
SETTLED = 20
"""Steps after which that is told, or at the end of a shorter run."""


class Log:
    """The log of one run.

    Args:
        path: Of its file; what is in it of steps after ``after`` is dropped.
        tell: Is told of the same.
        run: Name of the run.
        after: Step of the checkpoint that is gone on with; 0 at the beginning.
        experts: Of the run.
    """

    def __init__(self, path: Path, tell: Tell, run: str, *, after: int, experts: Sequence[str]) -> None:
        self._path, self._watcher, self._run, self._experts = path, tell, run, tuple(experts)
        self._after = after
        self._last: dict[str, Any] = {}
        self._told: frozenset[bytes] = frozenset()
        self._has_warned = False

    def begin(self, steps: int, told: str, damaged: Sequence[Path]) -> None:
        """Say that the run begins, or goes on.

        Args:
            steps: Of the optimiser, in all.
            told: What was cut or left out of the data.
            damaged: Checkpoints that were cut short and removed.
        """
        kept = self._kept()
        files.write_file(self._path, b"".join(kept), force=True)
        for line in kept:
            self._last |= json.loads(line)
        self._told = frozenset(kept)
        self._watcher({"run": self._run, "steps": steps, "step": self._after})
        if told:
            self._warn("data-cut", told)
        for path in damaged:
            self._warn("checkpoint-damaged", f"{path.name} was cut short, so an earlier one is gone on with")

    def tell(self, event: dict[str, Any]) -> None:
        """Write a step or an evaluation down, and tell of it."""
        line = json.dumps({"run": self._run, **event}).encode() + b"\n"
        if line not in self._told:  # as the last evaluation is, where a run is taken up at its end
            files.append(self._path, line)
        self._watcher({"run": self._run, **event})
        self._last |= event
        if event["step"] >= SETTLED:
            self._look_for_collapse()

    def _look_for_collapse(self) -> None:
        count = len(self._experts)
        used = self._last.get("effective", count)
        if count >= 3 and used < COLLAPSED and not self._has_warned:
            self._has_warned = True
            told = f"{used:.2f} of {count} experts are in use at step {self._last['step']}"
            advice = "raise 'balance', lower 'gate_learning_rate', or train experts longer before the gate"
            self._warn("routing-collapsed", f"routing has collapsed: {told}; {advice}")

    def summary(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """What came of the run: the last step's numbers, and those of the final evaluation."""
        self._look_for_collapse()
        known = ("step", "loss", "effective", "entropy", "load")
        return {**{name: self._last[name] for name in known if name in self._last}, **metrics}

    def _warn(self, code: str, message: str) -> None:
        self._watcher({"run": self._run, "code": code, "warning": message})

    def _kept(self) -> list[bytes]:
        if not self._path.exists() or not self._after:
            return []
        lines = files.read_bytes(self._path, 1 << 30).splitlines(keepends=True)
        return [line for line in lines if line.endswith(b"\n") and json.loads(line).get("step", 0) <= self._after]
