"""What is told of a bake, and how it is compared with what runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from lmoe_cli.cli.output import Output

if TYPE_CHECKING:
    from lmoe_cli.loadout.loadout import Loadout

Comparison = Callable[[Path], dict[str, Any]]
"""Looks at a finished folder before it gets its name."""


def comparison(out: Output, loadout: Loadout, kind: str, *, trusts: bool) -> Comparison:
    """What compares a finished folder with the live blend."""
    from lmoe_cli.bake.verify import verify, verify_adapter

    compare = verify_adapter if kind == "adapter" else verify

    def compared(written: Path) -> dict[str, Any]:
        out.say("comparing with the live blend …")
        return compare(loadout, written, trust_remote_code=trusts).as_dict()

    return compared


def say_verified(out: Output, report: dict[str, Any]) -> None:
    """Tell how near what was baked is to what ran, where that was looked at."""
    if seen := report.get("verify"):
        out.say(
            f"verified on {seen['positions']} tokens: logits {seen['difference']:.1e} from the live blend "
            f"(rounding allows {seen['allowed']:.1e}, the blend changes {seen['effect']:.1e})"
        )


def serve_line(loadout: Loadout, folder: Path, kind: str, report: dict[str, Any]) -> str:
    """The command line that serves what was baked."""
    if kind == "model":
        return f"vllm serve {quote(str(folder))}"
    from lmoe_cli.bake.adapter import base_name

    rank = max(item["rank"] for item in report["modules"])
    module = quote(f"{loadout.recipe.name or folder.name}={folder}")
    return f"vllm serve {quote(base_name(loadout.base))} --enable-lora --max-lora-rank {rank} --lora-modules {module}"
