"""docs/benchmarks.md, made from page.md and from what was measured."""

from __future__ import annotations

from pathlib import Path
from string import Template
from typing import Any

from benchmarks import activations, baking, folding, gpu, kinds, profiles, routed, speed, starting, training
from benchmarks.experiment import telling

PATH = Path(__file__).parents[1] / "docs" / "benchmarks.md"
FRAME = Path(__file__).with_name("page.md")
TEXTS = {
    "activations": activations.text,
    "profile": profiles.text,
    "kinds": kinds.text,
    "fold": folding.text,
    "start": starting.text,
    "bake": baking.text,
    "routed": routed.text,
    "training": training.text,
    "experiment": telling.text,
    "gpu": gpu.text,
}
SECTIONS = (*speed.GROUPS, *TEXTS)
NO_GPU = f"""No GPU was at hand. `python -m benchmarks gpu` makes these tables; it has not run on one yet.
It begins no new table after {gpu.BUDGET_S} seconds, and goes on after one that fails.
"""


def page(kept: dict[str, Any]) -> str:
    """The page as Markdown.

    Args:
        kept: As `benchmarks.results` keeps it.
    """
    return Template(FRAME.read_text()).substitute({name: _section(name, kept.get(name)) for name in SECTIONS})


def _section(name: str, kept: dict[str, Any] | None) -> str:
    if kept is None:
        return NO_GPU if name == "gpu" else "Not measured yet.\n"
    found = kept["found"]
    text = TEXTS[name](found) if name in TEXTS else _tables(name, found)
    told = kept["machine"]
    place = (
        f"{kept['date']}: {told['device']}, {told['threads']} threads, {told['bandwidth_gb_s']} GB/s by a copy, "
        f"torch {told['torch']}, transformers {told['transformers']}, peft {told['peft']}; seed 0."
    )
    return f"{text}\n*{place}*\n"


def _tables(group: str, found: dict[str, Any]) -> str:
    return "".join(table.text(found[name]) for name, table in speed.GROUPS[group].items() if name in found)
