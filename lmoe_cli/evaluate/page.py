"""An evaluation as one HTML page of its own: no script, no font, no request."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lmoe_cli.evaluate.changes import domain_rows, token_rows
from lmoe_cli.findings import Finding
from lmoe_cli.html_page import cell, document, listing, row, section, table, text

STYLE = "tr.recipe { font-weight: 600 }\nsmall { color: #777; display: block }\n"

TITLES = {
    "nats_per_token": ("Loss, nats per token", "Lower is better.", 4),
    "bits_per_byte": ("Bits per byte", "Lower is better. Comparable between tokenizers.", 4),
    "exact_match": ("Exact match", "Share of answers that are the ones due, to the letter. Higher is better.", 3),
}
CHANGE = (
    "Log-probabilities of tokens with {expert}, less those without, in nats: above 0 it makes them likelier. Below, "
    "the tokens that it changes most."
)
DIFFERENCE = (
    "Below each number: the same less the recipe's, with the 95 % interval of a paired bootstrap over records. Green "
    "is better than the recipe, red worse, where the interval does not reach 0."
)


def page(data: dict[str, Any], findings: Sequence[Finding]) -> str:
    """The page.

    Args:
        data: As ``lmoe eval --json`` tells it.
        findings: To be told with it.
    """
    parts = [_about(data)]
    if findings:
        parts.append(listing("Findings", [f"{item.severity}[{item.code}]: {item.message}" for item in findings]))
    if data["variants"] and data["domains"]:
        for key, (title, words, digits) in TITLES.items():
            if any(one["domains"][domain][key] is not None for one in data["variants"] for domain in data["domains"]):
                table = _numbers(data, key, digits)
                parts.append(section(title, f"{words} {DIFFERENCE}", table))
    for expert, domains in data["without"].items():
        parts.append(section(f"Without {expert}", CHANGE.format(expert=expert), _changes(expert, domains)))
    if data["tasks"]:
        parts.append("<h2>Tasks of lm-eval</h2>\n" + _tasks(data["tasks"]))
    return document(f"Evaluation of {data['recipe']}", parts, STYLE)


def _changes(expert: str, domains: dict[str, Any]) -> str:
    """Two tables: of domains, and of the tokens that change most."""
    parts = [domain_rows(domains), token_rows(expert, domains)]
    return "\n".join(table(heads, [_row(cells[0], cells[1:]) for cells in rows], "words") for heads, rows in parts)


def _about(data: dict[str, Any]) -> str:
    rows = [
        _row(
            name,
            [one["file"], one["split"], one["records"], one["judged_tokens"], one["judged_bytes"], one["sha256"][:12]],
        )
        for name, one in data["domains"].items()
    ]
    heads = ("domain", "file", "split", "records", "tokens judged", "bytes", "SHA-256")
    words = f"Base {data['base']}, router {data['router']}, experts {', '.join(data['experts']) or 'none'}."
    return f"<p>{text(words)}</p>\n" + (table(heads, rows) if rows else "")


def _numbers(data: dict[str, Any], key: str, digits: int) -> str:
    domains = list(data["domains"])
    rows = []
    for one in data["variants"]:
        columns = [one["domains"][domain] for domain in domains] + ([one["mean"]] if len(domains) > 1 else [])
        cells = "".join(_number(column, key, digits) for column in columns)
        mark = ' class="recipe"' if one["kind"] == "recipe" else ""
        rows.append(f"<tr{mark}><th>{text(one['name'])}</th>{cells}</tr>")
    return table(("", *domains, *(["mean"] if len(domains) > 1 else [])), rows)


def _number(column: dict[str, Any], key: str, digits: int) -> str:
    value, difference = column[key], column["difference"][key]
    if value is None:
        return "<td>–</td>"
    told = f"{value:.{digits}f}"
    if chosen := column.get("chosen"):
        told += f" <small>{text(chosen)}</small>"
    if not difference or difference["value"] == 0:
        return f"<td>{told}</td>"
    low, high = difference["low"], difference["high"]
    told += f"<small>{difference['value']:+.{digits}f}"
    colour = ""
    if low is not None:
        told += f" [{low:+.{digits}f}, {high:+.{digits}f}]"
        sign = -1 if key == "exact_match" else 1
        is_sure = low > 0 or high < 0
        is_worse = sign * difference["value"] > 0
        colour = f' style="background:rgba({"214,69,65" if is_worse else "60,160,90"},.16)"' if is_sure else ""
    return f"<td{colour}>{told}</small></td>"


def _tasks(tasks: dict[str, dict[str, dict[str, float]]]) -> str:
    columns = sorted({(task, key) for own in tasks.values() for task, found in own.items() for key in found})
    shown = [(task, key) for task, key in columns if not key.endswith("_stderr")]
    rows = [_row(name, [_task_value(own.get(task, {}), key) for task, key in shown]) for name, own in tasks.items()]
    return table(("", *(f"{task}, {key}" for task, key in shown)), rows)


def _task_value(found: dict[str, float], key: str) -> str:
    if key not in found:
        return "–"
    error = found.get(f"{key}_stderr")
    return f"{found[key]:.4f}" + (f" ± {error:.4f}" if error is not None else "")


def _row(head: str, cells: Iterable[Any]) -> str:
    return row(head, [cell(text(str(one))) for one in cells])
