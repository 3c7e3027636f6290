"""What was measured, kept section by section in docs/benchmarks.json."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parents[1] / "docs" / "benchmarks.json"


def load() -> dict[str, Any]:
    """Section → what was measured last."""
    found: dict[str, Any] = json.loads(PATH.read_text()) if PATH.is_file() else {}
    return found


def keep(section: str, found: dict[str, Any], machine: dict[str, Any]) -> None:
    """Replace one section, with the day and the machine."""
    measured = {"date": datetime.date.today().isoformat(), "machine": machine, "found": found}
    PATH.write_text(json.dumps(load() | {section: measured}, indent=1) + "\n")
