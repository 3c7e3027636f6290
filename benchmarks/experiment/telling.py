"""The experiment as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.table import markdown

STATIC = {"base": "base", "oracle": "best single expert per domain", "uniform": "uniform", "random": "random experts"}
NAMES = {"one LoRA": "one LoRA of the same size, retrained", "fitted": "fixed weights, fitted"}


def text(found: dict[str, Any]) -> str:
    """Loss per domain and overall, with what else was measured, in Markdown."""
    variants = found["variants"]
    rows = {row["name"]: row for row in variants["static"]["eval"]["variants"]}
    domains = list(rows["base"]["domains"])
    head = (
        "variant",
        *domains,
        "mean",
        "uniform less it",
        "best single less it",
        "in use",
        "agrees",
        "tokens/s",
    )
    cells = []
    for name, said in STATIC.items():
        told = rows[name]
        speed = f"{found['tokens_per_s']['base']:.0f}" if name == "base" else ""
        cells.append((said, *_losses(told, domains), "", "", "", "", speed))
    for name, own in variants.items():
        if name == "static":
            continue
        judged = {row["name"]: row for row in own["eval"]["variants"]}
        mine = "recipe"
        used = [run["effective"] for run in own.get("training", {}).get("runs", {}).values() if "effective" in run]
        agrees = own.get("agreement")
        cells.append(
            (
                NAMES.get(name, name), *_losses(judged[mine], domains),
                _less(judged.get("uniform")) if name != "one LoRA" else "",
                _less(judged.get("oracle")) if name != "one LoRA" else "",
                f"{used[-1]:.2f}" if used else "",
                f"{sum(agrees.values()) / len(agrees):.0%}" if agrees else "",
                f"{found['tokens_per_s'][name]:.0f}",
            )
        )  # fmt: skip
    epochs, records = found["epochs"], found["records"]
    told = (
        f"Base: {epochs['base']} passes over {records['train']} conversations of each domain, every token learned "
        f"({found['base_loss']:.2f} nats per token at the end). Experts: {epochs['experts']} passes, the one LoRA "
        f"{epochs['one']}, gates {epochs['gate']}, joint {epochs['joint']} after the experts'. Judged on "
        f"{records['valid']} held-out conversations of each domain at most. "
        f"Seed {found['seed']}; {found['seconds'] / 60:.0f} minutes in all.\n"
    )
    return f"{markdown(head, cells)}\n{told}"


def _losses(row: Mapping[str, Any], domains: list[str]) -> list[str]:
    return [
        *(f"{row['domains'][domain]['nats_per_token']:.3f}" for domain in domains),
        f"{row['mean']['nats_per_token']:.3f}",
    ]


def _less(other: Mapping[str, Any] | None) -> str:
    """How much more another's loss is than the recipe's, with its interval."""
    if other is None or (found := other["mean"]["difference"]["nats_per_token"]) is None:
        return ""
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
