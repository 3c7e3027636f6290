"""A comparison as one HTML page of its own: no script, no font, no request; colours say what the numbers say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lmoe_cli.findings import Finding
from lmoe_cli.html_page import cell, document, listing, row, section, table, text
from lmoe_cli.similarity.report import SIDES

Pair = dict[str, Any]
Shade = Callable[[float], str]

COSINE = (
    "Frobenius cosine of the deltas, from −1 (blue) to 1 (red). A module that only one of two adapters changes counts "
    "as zero in the other."
)
OVERLAP = (
    "Share of the smaller subspace that lies in the other, from 0 to 1; random subspaces of the same ranks have the "
    "number in brackets. Only modules that both change are counted."
)


def page(data: dict[str, Any], findings: Sequence[Finding]) -> str:
    """The page.

    Args:
        data: As `report.report` makes it.
        findings: To be told with it.
    """
    names, overall = list(data["adapters"]), data["overall"]
    parts = [_adapters(data)]
    if findings:
        parts.append(listing("Findings", [f"{item.severity}[{item.code}]: {item.message}" for item in findings]))
    parts.append(section("Cosine", COSINE, _square(names, overall["pairs"], "cosine", _signed, one=1.0)))
    for side, what in zip(SIDES, ("what the deltas read", "what the deltas write"), strict=True):
        table = _square(names, overall["pairs"], f"overlap_{side}", _unsigned, one=1.0, beside=f"chance_{side}")
        parts.append(section(f"Subspace overlap, {side} side: {what}", OVERLAP, table))
    for title, key, group in (("By layer", "layer", "layers"), ("By kind of module", "kind", "kinds")):
        parts.append(section(f"{title}: cosine", COSINE, _pairs(data[group], key, "cosine", _signed)))
        for side in SIDES:
            table = _pairs(data[group], key, f"overlap_{side}", _unsigned)
            parts.append(section(f"{title}: subspace overlap, {side} side", OVERLAP, table))
        parts.append(section(f"{title}: norm", "Frobenius norm of each delta.", _norms(names, data[group], key)))
    return document(f"Similarity of {', '.join(names)}", parts)


def _adapters(data: dict[str, Any]) -> str:
    rows = []
    for name, facts in data["adapters"].items():
        rank, ref = facts["rank"], facts["ref"] + (f" at {facts['revision']}" if facts["revision"] else "")
        ranks = (
            "–" if rank["min"] is None else f"{rank['min']}–{rank['max']}" if rank["min"] < rank["max"] else rank["max"]
        )
        words = (ref, facts["base"] or "–", facts["peft_type"], ", ".join(facts["variants"]) or "–", ranks)
        rows.append(row(name, [cell(text(str(word))) for word in (*words, facts["modules"], _number(facts["norm"]))]))
    heads = ("", "adapter", "trained on", "type", "variants", "rank", "modules", "norm of the delta")
    base = data["base"]
    how = f"Whole deltas, on {base}." if base else "From the adapters alone, without their base."
    return f"<p>{text(how)}</p>\n" + table(heads, rows, "words")


def _square(
    names: Sequence[str], pairs: Iterable[Pair], key: str, shade: Shade, *, one: float, beside: str | None = None
) -> str:
    """A symmetric table of all adapters, with ``one`` on its diagonal."""
    found = {(pair["first"], pair["second"]): pair for pair in pairs}
    rows = []
    for first in names:
        cells = []
        for second in names:
            pair = found.get((first, second)) or found.get((second, first))
            chance = pair[beside] if pair and beside else None
            cells.append(_heat(pair[key] if pair else one, shade, chance))
        rows.append(row(first, cells))
    return table(("", *names), rows)


def _pairs(groups: Sequence[dict[str, Any]], label: str, key: str, shade: Shade) -> str:
    """A row for each group and a column for each pair."""
    heads = [f"{pair['first']} · {pair['second']}" for pair in groups[0]["pairs"]]
    rows = [row(_label(group[label]), [_heat(pair[key], shade) for pair in group["pairs"]]) for group in groups]
    return table((label, *heads), rows)


def _norms(names: Sequence[str], groups: Sequence[dict[str, Any]], label: str) -> str:
    largest = max((norm for group in groups for norm in group["norms"].values() if norm is not None), default=0.0)

    def shade(norm: float) -> str:
        return _unsigned(norm / largest) if largest else ""

    rows = [row(_label(group[label]), [_heat(group["norms"][name], shade) for name in names]) for group in groups]
    return table((label, *names), rows)


def _heat(value: float | None, shade: Shade, beside: float | None = None) -> str:
    if value is None:
        return "<td>–</td>"
    told = _number(value) if beside is None else f"{_number(value)} ({_number(beside)})"
    return f'<td style="background:{shade(value)}">{told}</td>' if shade(value) else f"<td>{told}</td>"


def _signed(value: float) -> str:
    return f"rgba({'214,69,65' if value > 0 else '52,110,196'},{min(1.0, abs(value)) * 0.8:.3f})"


def _unsigned(value: float) -> str:
    return f"rgba(236,150,40,{min(1.0, max(0.0, value)) * 0.8:.3f})"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) >= 0.0005 or value == 0 else f"{value:.1e}"


def _label(value: Any) -> str:
    return "none" if value is None else str(value)
