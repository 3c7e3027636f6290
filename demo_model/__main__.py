"""`python -m demo_model`: train the embedded demo, judge it, and write it if it is good."""

from dataclasses import replace
from pathlib import Path

import click

from demo_model.demo import QUICK, Settings, make_demo
from demo_model.evaluate import Matrix, missed_bars
from demo_model.package import RefusedError, require_replaceable, write_demo
from demo_model.party import train_party
from demo_model.report import page
from demo_model.stored import BASE

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "lmoe_cli" / "demo"
PAGE = ROOT / "docs" / "demo-matrix.md"


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), help="Write there, with the page in it, instead of into the package."
)
@click.option("--quick", is_flag=True, help="A tiny run of seconds, to try the pipeline. Needs --out.")
@click.option("--no-bars", is_flag=True, help="Write the demo even if it is no good. Needs --out.")
@click.option("--keep-base", is_flag=True, help="Train the classes alone, on the embedded base as it is.")
@click.option("--seed", type=int, default=Settings.seed, show_default=True, help="Start of all randomness.")
def main(out: Path | None, quick: bool, no_bars: bool, keep_base: bool, seed: int) -> None:
    """Train the adventurer and its three classes; a quarter of an hour on two cores that know 16-bit numbers."""
    if quick and keep_base:
        raise click.UsageError("--quick trains a base of its own: leave --keep-base out")
    if out is None and (quick or no_bars):
        raise click.UsageError("--quick and --no-bars need --out: they must not replace the embedded demo")
    settings = replace(QUICK if quick else Settings(), seed=seed)
    target = out or PACKAGE
    try:
        require_replaceable(target)  # before the long part
        demo = make_demo(settings, click.echo, PACKAGE / BASE if keep_base else None)
        _judge(demo.matrix, may_miss=no_bars)
        size = write_demo(demo, target)
    except RefusedError as error:
        raise click.ClickException(str(error)) from error
    if out is None:
        click.echo("party: the gate between the classes")
        train_party(PACKAGE, ROOT / "recipes", seed + 40)
    report = out / "demo-matrix.md" if out else PAGE
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(page(demo, settings, size), encoding="utf-8")
    click.echo(f"{target}: {size:,} bytes\n{report}")


def _judge(matrix: Matrix, *, may_miss: bool) -> None:
    for name, row in matrix.items():
        click.echo(f"{name:>12}  " + "  ".join(f"{voice} {nats:.3f}" for voice, nats in row.items()))
    missed = missed_bars(matrix)
    if missed and not may_miss:
        raise click.ClickException("nothing is written:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
