"""The experiment as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.experiment.embedding import BEFORE, EVEN
from benchmarks.table import markdown

STATIC = {"base": "base", "oracle": "best single expert per domain", "uniform": "uniform", "random": "random experts"}
NAMES = {
    "static": "all experts at weight 1",
    "one LoRA": "one LoRA of the same size, retrained",
    "fitted": "fixed weights, fitted",
}
ALONE = "one LoRA"
"""Is its own uniform blend and its own best expert."""
OTHERS = {
    "uniform": "uniform", "random": "random experts", "oracle": "best single", ALONE: "one LoRA"
}  # fmt: skip
"""Variant of an evaluation → its name where it is compared with the evaluation's recipe."""


def text(found: dict[str, Any]) -> str:
    """Loss per domain and overall, with what else was measured, in Markdown."""
    variants = found["variants"]
    rows = {row["name"]: row for row in variants["static"]["eval"]["variants"]}
    domains = list(rows["base"]["domains"])
    head = ("variant", *domains, "mean", "in use", "agrees", "tokens/s")
    cells = []
    for name, said in STATIC.items():
        told = rows[name]
        speed = f"{found['tokens_per_s']['base']:.0f}" if name == "base" else ""
        cells.append((said, *_losses(told, domains), "", "", speed))
    for name, told in rows.items():
        if told["kind"] == "expert":
            cells.append((name, *_losses(told, domains), "", "", ""))
    for name, own in variants.items():
        if name == "static":
            continue
        mine = next(row for row in own["eval"]["variants"] if row["name"] == "recipe")
        used, agrees = own.get("in_use"), own.get("agreement")
        cells.append(
            (
                NAMES.get(name, name), *_losses(mine, domains),
                f"{used:.2f}" if used else "",
                f"{sum(agrees.values()) / len(agrees):.0%}" if agrees else "",
                f"{found['tokens_per_s'][name]:.0f}",
            )
        )  # fmt: skip
    epochs, records = found["epochs"], found["records"]
    often = ", ".join(["once", *(f"{name}'s {times} times" for name, times in found["repeats"].items() if times > 1)])
    told = (
        f"Base: {epochs['base']} passes over {records['train']} conversations of each domain, every token learned "
        f"({found['base_loss']:.2f} nats per token at the end). Experts: {epochs['experts']} passes, the one LoRA "
        f"{epochs['one']}, gates {epochs['gate']}, joint {epochs['joint']} after the experts'. "
        f"In a pass over all domains their conversations come {often}. Judged on "
        f"{records['valid']} held-out conversations of each domain at most. "
        f"Seed {found['seed']}; {found['seconds'] / 60:.0f} minutes in all.\n"
    )
    return f"{markdown(head, cells)}\n{told}\n{_compared(variants, domains)}\n{_embedded(found['embedding'])}"


def _embedded(found: Mapping[str, Mapping[str, float]]) -> str:
    """What an encoder would decide by another pass than the base's own."""
    base, even, before = found["base"], found[EVEN], found[BEFORE]
    return (
        f"The encoder reads prompts by the base alone and sends {base['agreement']:.1%} to the expert of their domain. "
        f"By a pass with all experts on evenly it would be {even['agreement']:.1%}; by the one that reads the prompt "
        f"anyway, under the blend of the prompt before, {before['agreement']:.1%}, and {before['elsewhere']:.1%} of "
        "prompts would go to another expert than they do, because of what was asked before.\n"
    )


def _compared(variants: Mapping[str, Any], domains: list[str]) -> str:
    """How much more others lose than each variant, per domain and overall, with intervals."""
    cells = []
    for name, own in variants.items():
        judged = {row["name"]: row for row in own["eval"]["variants"]}
        others = [
            other for other in OTHERS if other in judged and not (name == ALONE and other in ("uniform", "oracle"))
        ]
        for other in others:
            row = judged[other]
            less = [_difference(values) for values in (*(row["domains"][domain] for domain in domains), row["mean"])]
            cells.append((NAMES.get(name, name), f"{OTHERS[other]} less it", *less))
    return markdown(("variant", "difference", *domains, "mean"), cells)


def _losses(row: Mapping[str, Any], domains: list[str]) -> list[str]:
    return [
        *(f"{row['domains'][domain]['nats_per_token']:.3f}" for domain in domains),
        f"{row['mean']['nats_per_token']:.3f}",
    ]


def _difference(values: Mapping[str, Any]) -> str:
    """How much more another's loss is than the recipe's, with its interval."""
    found = values["difference"]["nats_per_token"]
    return f"{found['value']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"
