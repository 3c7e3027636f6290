"""`lmoe check`."""

from __future__ import annotations

import heapq
from pathlib import Path
from typing import Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output, show_findings, size
from lmoe_cli.errors import LmoeError
from lmoe_cli.findings import Finding, RefusedError, errors, from_error

MAX_PAIRS = 20
"""Pairs of experts that a person is shown: first those of different bases, then those that share most."""


@click.command()
@click.argument("recipes", nargs=-1, type=click.Path(path_type=Path), metavar="RECIPE…")
@params.blend
@params.token
@params.trust_remote_code
@click.option("--github", is_flag=True, help="Print findings as annotations of a GitHub workflow.")
@params.output
def check(
    recipes: tuple[Path, ...],
    blend: params.Blend,
    token: str | None,
    trust_remote_code: bool,
    github: bool,
    out: Output,
) -> None:
    """Check that the parts of recipes fit together.

    Reads names, configs and headers only, before anything is downloaded or loaded. Exits with 1 when a finding is an
    error, and with the code of the first recipe that cannot be read otherwise.
    """
    from lmoe_cli.check import Report
    from lmoe_cli.check import check as check_loadout
    from lmoe_cli.loadout.loadout import resolve

    told: list[Finding] = []
    data: list[dict[str, Any]] = []
    codes: list[int] = []
    for request in params.requests(recipes, blend):
        try:
            recipe = request.recipe()
            found = resolve(recipe, request.origin, beside=request.beside, token=token)
            report = check_loadout(found, trust_remote_code=trust_remote_code)
            findings, code = report.findings, 0 if report.ok else 1
        except LmoeError as error:
            told_of = error.findings if isinstance(error, RefusedError) else (from_error(error),)
            report, findings, code = Report((), (), {}), tuple(told_of), error.exit_code
        data.append(_facts(request.origin, report, findings, ok=code == 0))
        told += findings
        codes.append(code)
        _show(out, request.origin, report, findings, github=github, named=len(recipes) > 1)
    failed = [code for code in codes if code]
    out.finish({"recipes": data}, told, ok=not failed)
    if failed:
        raise click.exceptions.Exit(failed[0])


def _facts(origin: str, report: Any, findings: tuple[Finding, ...], *, ok: bool) -> dict[str, Any]:
    return {
        "recipe": origin,
        "ok": ok,
        "findings": [item.as_dict() for item in findings],
        "memory": report.memory,
        "pairs": [vars(pair) for pair in report.pairs],
    }


def _show(out: Output, origin: str, report: Any, findings: tuple[Finding, ...], *, github: bool, named: bool) -> None:
    if github:
        for item in findings:
            click.echo(annotation(origin, item), err=out.as_json)
    if out.as_json:
        return
    if not github:
        shown = [item for item in findings if item.severity != "note" or out.verbose or not out.quiet]
        if named and shown:
            click.echo(f"{origin}:", err=True)
        show_findings(shown)
    if report.pairs and not out.quiet:
        nearest = heapq.nlargest(MAX_PAIRS, report.pairs, key=lambda pair: (not pair.same_base, pair.shared))
        rows = [
            (f"{pair.first} + {pair.second}", pair.shared, f"{pair.overlap:.0%}", pair.same_base, pair.same_rank)
            for pair in nearest
        ]
        out.table("", ("pair", "shared modules", "overlap", "same base", "same ranks"), rows)
        if len(report.pairs) > MAX_PAIRS:
            out.say(f"and {len(report.pairs) - MAX_PAIRS} more pairs; --json tells all")
    if report.memory and not out.quiet:
        memory = report.memory
        click.echo(
            f"{origin}: {size(memory['base'])} base + {size(memory['experts'])} experts, "
            f"{size(memory['total'])} with a conversation of {memory['context']} tokens"
        )
    count = len(errors(findings))
    verdict = f"{count} error{'s' if count != 1 else ''}" if count else "the parts fit"
    click.echo(f"{origin}: {verdict}")


def annotation(origin: str, item: Finding) -> str:
    """A finding as a GitHub workflow command, at its line where it has one."""
    kind = {"error": "error", "warning": "warning", "note": "notice"}[item.severity]
    file, _, rest = item.where.partition(":") if item.where.startswith(origin + ":") else (origin, "", "1:1")
    line, _, column = rest.partition(":")
    text = "\n".join(filter(None, (item.message, item.hint)))
    escaped = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::{kind} file={file},line={line or 1},col={column or 1},title={item.code}::{escaped}"
