"""How an evaluation looks to a person."""

from __future__ import annotations

from typing import Any

from lmoe_cli.cli.output import Output

MAX_CHANGES = 5
"""Tokens of a domain whose change a person is shown."""
TITLES = {"nats_per_token": "nats per token", "bits_per_byte": "bits per byte", "exact_match": "exact match"}


def show(out: Output, data: dict[str, Any]) -> None:
    """Print an evaluation for a person."""
    if out.as_json:
        return
    domains = list(data["domains"])
    columns = [*domains, *(["mean"] if len(domains) > 1 else [])]
    for key, title in TITLES.items():
        cell = _beside_recipe if key != "bits_per_byte" else _alone
        rows = [
            [one["name"], *(cell(one["domains"].get(name, one["mean"]), key) for name in columns)]
            for one in data["variants"]
        ]
        if any(cell for row in rows for cell in row[1:]):
            out.table(title, ("", *columns), rows)
    if data["experts"] and domains:
        out.say("in brackets: less the recipe's, ± half of the 95 % interval of a paired bootstrap over records")
    if data["oracle"] and data["oracle"]["chosen"]:
        told = ", ".join(f"{name} on {domain}" for domain, name in data["oracle"]["chosen"].items())
        on_same = data["oracle"]["on"] == "the same data"
        out.say(f"oracle: {told}; chosen on {'the same data, --select chooses on other' if on_same else 'other data'}")
    for name, own in data["without"].items():
        _show_changes(out, name, own)
    for name, own in (data["tasks"] or {}).items():
        rows = [
            [task, key, f"{value:.4f}", _stderr(found, key)]
            for task, found in own.items()
            for key, value in found.items()
            if not key.endswith("_stderr")
        ]
        out.table(name, ("task", "metric", "value", "±"), rows)
    if data["baseline"]:
        for name, one in data["baseline"]["domains"].items():
            out.say(f"{name}: {one['before']:.4f} before, {one['now']:.4f} now ({one['worse_by']:+.4f} nats per token)")


def _show_changes(out: Output, expert: str, domains: dict[str, Any]) -> None:
    """What an expert does to the tokens: how many it changes, and those that it changes most."""
    from lmoe_cli.evaluate.changes import domain_rows, token_rows

    out.table(f"log-probabilities of tokens with {expert}, less those without, in nats", *domain_rows(domains))
    out.table("", *token_rows(expert, domains, MAX_CHANGES))


def _alone(values: dict[str, Any], key: str) -> str | None:
    return None if values[key] is None else f"{values[key]:.3f}"


def _beside_recipe(values: dict[str, Any], key: str) -> str | None:
    told, difference = _alone(values, key), values["difference"][key]
    if not told or not difference or not difference["value"]:
        return told
    low, high = difference["low"], difference["high"]
    spread = "" if low is None else f" ±{(high - low) / 2:.3f}"
    return f"{told} ({difference['value']:+.3f}{spread})"


def _stderr(found: dict[str, float], key: str) -> str | None:
    error = found.get(f"{key}_stderr")
    return None if error is None else f"{error:.4f}"
