"""`lmoe route`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output
from lmoe_cli.cli.placing import Placing, checked, piped, placed, started
from lmoe_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from lmoe_cli.chat.legend import Legend

BAR = 40
"""Columns of a bar of shares."""
MAX_CHANGES = 12
"""Tokens whose change a person is shown."""
MARKS = ((1.0, "#"), (0.1, "+"), (-0.1, " "), (-1.0, "-"))
"""What stands under a token that an expert made so much more likely, in nats; with still less it is an ``=``."""
SAME = {
    "fixed": "the gates of the router '{router}' are the same for every token",
    "prompt": "the router '{router}' decides once for the whole prompt",
}


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("text", type=params.TEXT, required=False)
@click.option("--raw", is_flag=True, help="Take TEXT as it is, not as a user's message in the chat template.")
@click.option("--answer", type=params.TEXT, metavar="TEXT", help="Show the tokens of this answer, too.")
@click.option("--generate", type=click.IntRange(1), metavar="N", help="Let it answer with N tokens at most, greedily.")
@click.option(
    "--by",
    type=click.Choice(["none", "layer", "site"]),
    default="none",
    show_default=True,
    help="Tell each token's gates averaged, by layer, or at every place.",
)
@click.option("--without", type=params.TEXT, metavar="NAME", help="Compare with the same without this expert.")
@click.option("--html", "file", type=click.Path(path_type=Path), metavar="FILE", help="Write a page to look at.")
@params.force
@placed
@params.output
def route(
    recipe: Path,
    text: str | None,
    raw: bool,
    answer: str | None,
    generate: int | None,
    by: Any,
    without: str | None,
    file: Path | None,
    force: bool,
    placing: Placing,
    out: Output,
) -> None:
    """Show which expert has how much say in which token.

    TEXT, or what stands on stdin, is a user's message, and read as a prompt. Under each token stands the letter of the
    expert with most say where the model reads it, averaged over all places: a capital for more than half of it, a dot
    where no expert has most.

    --without NAME tells what that expert does: by how much it makes each token more or less likely than the same
    without it, in nats; of the answer, where there is one.
    """
    from lmoe_cli.files import refuse_existing_file, write_file

    if file:
        refuse_existing_file(file, force=force)
    if answer is not None and generate:
        raise UsageError("usage", "--answer and --generate exclude each other", hint="leave one of them out")
    if answer is not None and not answer.strip():
        raise UsageError("prompt-empty", "there is no answer to route", hint="--answer TEXT, or leave it out")
    said = _text(text)
    (request,) = params.requests([recipe], params.Blend(None, (), ()))
    found, findings = checked(request, placing)
    if without is not None:
        found.expert(without)
    out.warn(findings)
    engine = started(found, placing, out)
    from lmoe_cli.engine.without import compare
    from lmoe_cli.route.page import page
    from lmoe_cli.route.report import report
    from lmoe_cli.route.subject import subject

    looked_at = subject(engine, said, raw=raw, answer=answer, generate=generate or 0)
    left = compare(engine, looked_at.tokens, without) if without is not None else None
    if file:
        write_file(file, page(report(engine, looked_at, left, "layer"), found.recipe.name).encode(), force=force)
        out.say(f"{file}: written")
    data = report(engine, looked_at, left, by)
    _show(out, data, by)
    out.finish(data | {"html": str(file) if file else None}, findings)


def _text(text: str | None) -> str:
    """What to route.

    Raises:
        UsageError: Nothing.
    """
    if text is None and sys.stdin.isatty():
        raise UsageError("usage", "no text given", hint="lmoe route RECIPE TEXT, or pipe a text in")
    found = piped() if text is None else text
    if not found.strip():
        raise UsageError("prompt-empty", "there is no text to route", hint="lmoe route RECIPE TEXT")
    return found


def _show(out: Output, data: dict[str, Any], by: str) -> None:
    """Print for a person."""
    if out.as_json:
        return
    from lmoe_cli.chat.legend import Legend

    legend = Legend([expert["name"] for expert in data["experts"]])
    if data["scope"] in SAME:
        out.say(SAME[data["scope"]].format(router=data["router"]))
    if data["left_out"]:
        out.say(f"{len(data['left_out'])} places do not read every token and are left out; --json names them")
    if data["scope"] == "token" or data["without"]:
        _show_tokens(out, data, by, legend)
    _show_shares(out, data, legend)
    if by != "none" or (len(data["layers"]) > 1 and data["scope"] != "token"):
        _show_places(out, data["layers"] if by != "site" else data["places"], by, legend)
    if data["without"]:
        _show_without(out, data)


def _show_tokens(out: Output, data: dict[str, Any], by: str, legend: Legend) -> None:
    from rich.text import Text

    from lmoe_cli.cli.interlinear import cell, lines
    from lmoe_cli.route.report import share_of

    def row(gates: Mapping[str, float]) -> Text:
        return legend.mark(share_of(gates))

    differ, compares = data["scope"] == "token", data["without"] is not None
    key = {"layer": "layers", "site": "places"}.get(by, "") if differ else ""
    labels = list(data["tokens"][0][key]) if key else [""] * differ
    cells = []
    for token in data["tokens"]:
        under = [row(gates) for gates in token[key].values()] if key else [row(token["gates"])] * differ
        under += [Text(_mark(token.get("change")), "bold")] * compares
        style = "dim" if token["part"] == "template" else str(row(token["gates"]).style) if differ else ""
        cells.append(cell(token["text"], under, style))
    labels += [f"without {data['without']['expert']}" if key else ""] if compares else []
    for line in lines(cells, out.console.width, labels):
        out.show(line)
    out.show("")


def _mark(change: float | None) -> str:
    """One character for a change of a log-probability."""
    return " " if change is None else next((mark for least, mark in MARKS if change >= least), "=")


def _show_shares(out: Output, data: dict[str, Any], legend: Legend) -> None:
    """A bar for each expert, or one for all where the gates are the same for every token."""
    from rich.table import Table
    from rich.text import Text

    shares = {expert["name"]: expert["share"] for expert in data["experts"]}
    if not shares:
        out.say("there are no experts: the base answers")
        return
    if data["scope"] != "token":
        out.show(legend.bar(shares, 2 * BAR))
    gates, scores = data["tokens"][0]["gates"], data["scores"]
    table = Table.grid(padding=(0, 2))
    for name, share in shares.items():
        cells = [legend.name(name)]
        if data["scope"] == "token":
            cells.append(
                Text("█" * round(share * BAR), legend.colour(name)) + Text("░" * (BAR - round(share * BAR)), "dim")
            )
            cells.append(Text(f"{share:.0%}".rjust(4)))
        else:
            cells.append(Text(f"gate {gates[name]:.3f}"))
            cells.append(Text(f"{share:.0%}".rjust(4)))
            cells += [Text(f"score {scores[name]:.3f}")] if scores else []
        table.add_row(*cells)
    if data["rest"] > 0.005:
        table.add_row(Text("· the base alone", "dim"), "", f"{data['rest']:.0%}".rjust(4))
    out.show(table)


def _show_places(out: Output, rows: list[dict[str, Any]], by: str, legend: Legend) -> None:
    """Mean gates and shares of layers, or of places."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    label = "place" if by == "site" else "layer"
    table = Table(
        box=SIMPLE_HEAD, pad_edge=False, title=f"mean gates by {label}", title_justify="left", title_style="bold"
    )
    table.add_column(label)
    for name in legend.names:
        table.add_column(legend.name(name), justify="right")
    table.add_column("shares")
    for row in rows:
        cells = [Text(f"{row['gates'][name]:.3f}") for name in legend.names]
        table.add_row(Text(row["place"] if by == "site" else row["label"]), *cells, legend.bar(row["shares"], BAR))
    out.show(table)


def _show_without(out: Output, data: dict[str, Any]) -> None:
    """What an expert does to the log-probabilities: the mean, and the tokens where it does most."""
    told = data["without"]
    mean = told["mean_change"]
    out.facts(
        f"log-probabilities with all experts, less those without {told['expert']}, in nats",
        [
            ("mean", "–" if mean is None else f"{mean:+.4f} per token of the {told['of']} ({told['tokens']})"),
            ("sum", f"{told['total_change']:+.4f}"),
            ("under tokens", "# by 1 or more, + by 0.1 or more likelier with it; - by 0.1, = by 1 less likely"),
        ],
    )
    changed = [token for token in data["tokens"] if token["change"] is not None and token["part"] != "template"]
    shown = sorted(changed, key=lambda token: -abs(token["change"]))[:MAX_CHANGES]
    rows = [
        (repr(token["text"]), f"{token['logprob']:.3f}", f"{token['logprob_without']:.3f}", f"{token['change']:+.3f}")
        for token in shown
    ]
    out.table("", ("token", "with all", f"without {told['expert']}", "change"), rows)
    if len(changed) > len(shown):
        out.say(f"the {len(shown)} largest of {len(changed)} changes; --json and --html tell all")
