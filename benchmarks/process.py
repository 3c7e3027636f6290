"""Run whole programs and measure their time and the memory that is theirs alone."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple


class Run(NamedTuple):
    """A program that ran."""

    seconds: float
    anonymous_bytes: int
    """Peak of its anonymous memory: what is not the page cache's."""


def run(*command: str | Path, cache: Path | None = None) -> Run:
    """Run a program to its end, with a disk that has nothing left to write.

    Args:
        command: And its arguments.
        cache: Where it keeps what it remembers from run to run; the user's own folder when None.
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)} if cache else None
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment
    )
    peak = [0]
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            peak[0] = max(peak[0], _anonymous(process.pid))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    _, errors = process.communicate()
    seconds = time.perf_counter() - started
    stop.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"{command}: exit {process.returncode}: {errors.decode()[-2000:]}")
    return Run(seconds, peak[0])


def _anonymous(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    lines = (line.split() for line in text.splitlines() if line.startswith("RssAnon"))
    return next((int(words[1]) * 1024 for words in lines), 0)
