"""How long something may take, in a unit that is as slow as the machine."""

from __future__ import annotations

import gc
import json
import time
from contextlib import contextmanager

TEXT = json.dumps([{"name": f"layers.{number}", "shape": [number, 8]} for number in range(20_000)])


def _cpu_s(work) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


@contextmanager
def within(units: float):
    """CPU time of the block is at most so many times that of reading a JSON text of a megabyte, measured right before
    and after it. What other tests left in memory is no work for the collector, meanwhile and from then on."""
    gc.collect()
    gc.freeze()
    before = min(_cpu_s(lambda: json.loads(TEXT)) for _ in range(3))
    began = time.process_time()
    yield
    taken = time.process_time() - began
    unit = max(before, min(_cpu_s(lambda: json.loads(TEXT)) for _ in range(3)))
    assert taken <= units * unit, f"{taken:.2f} s of CPU time are {taken / unit:.0f} units, {units} may be taken"
