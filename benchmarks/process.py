"""Run whole programs and measure their time and the memory that is theirs alone."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

M_MMAP_THRESHOLD = -3
"""Of mallopt(3): bytes from which on an allocation is a mapping of its own. Said once, it stays as it is."""


class Run(NamedTuple):
    """A program that ran."""

    seconds: float
    first_output_seconds: float
    """Until the first byte came out of it; as `seconds` where nothing did."""
    anonymous_bytes: int
    """Peak of its anonymous memory: what is not the page cache's."""
    resident_bytes: int
    """Peak of its resident memory, with the pages of files that it maps."""


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
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    peaks = {"RssAnon": 0, "VmHWM": 0}
    first = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.02):
            _raise_peaks(peaks, process.pid)

    def wait_for_output() -> None:
        assert process.stdout
        if process.stdout.read(1):
            first.append(time.perf_counter() - started)
        process.stdout.read()

    def keep_errors() -> None:
        assert process.stderr
        errors.append(process.stderr.read())

    errors: list[bytes] = []
    helpers = [threading.Thread(target=target, daemon=True) for target in (watch, wait_for_output, keep_errors)]
    for helper in helpers:
        helper.start()
    process.wait()
    seconds = time.perf_counter() - started
    stop.set()
    for helper in helpers:
        helper.join()
    if process.returncode:
        raise RuntimeError(f"{command}: exit {process.returncode}: {errors[0].decode()[-2000:]}")
    return Run(seconds, first[0] if first else seconds, peaks["RssAnon"], peaks["VmHWM"])


def _raise_peaks(peaks: dict[str, int], process: int) -> None:
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        if name in peaks:
            peaks[name] = max(peaks[name], int(rest.split()[0]) * 1024)


def peak_mb(work: Callable[[], object]) -> float:
    """Resident memory of this process during some work, at most, above what it was before; in MB.

    From here on this process gives memory back as soon as it is free: none that it kept hides what the work takes.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    before, peak, stop = _resident_bytes(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], _resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    work()
    stop.set()
    watcher.join()
    return (peak[0] - before) / 1e6


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def child(module: str, *arguments: str | Path) -> Any:
    """What a module of this package prints as JSON when it is run as a program."""
    return json.loads(_output("-m", module, *arguments))


def lmoe_bench(*arguments: str) -> dict[str, Any]:
    """What `lmoe bench --json` tells."""
    data: dict[str, Any] = json.loads(_output("-m", "lmoe_cli", "bench", *arguments, "--json"))["data"]
    return data


def _output(*arguments: str | Path) -> str:
    command = [sys.executable, *(str(word) for word in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command}: exit {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout
