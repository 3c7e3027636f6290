"""`lmoe train`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from shlex import quote
from typing import Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.output import Output
from lmoe_cli.findings import Finding, finding


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--out", "folder", type=click.Path(path_type=Path), help="Folder to write; runs/NAME when left out.")
@click.option("--resume", is_flag=True, help="Go on from the last whole checkpoint of a training that was stopped.")
@click.option("--device", metavar="NAME", help="cpu, or the best there is when left out.")
@params.force
@params.token
@params.trust_remote_code
@params.output
def train(
    config: Path,
    folder: Path | None,
    resume: bool,
    device: str | None,
    force: bool,
    token: str | None,
    trust_remote_code: bool,
    out: Output,
) -> None:
    """Train experts, the gate between them, or both.

    What comes out appears whole in one folder: adapters that PEFT loads, the router, and a recipe that `lmoe chat`
    runs. While it is trained, FOLDER.work holds checkpoints of experts and gate alone. Runs under torchrun and
    `accelerate launch` too.
    """
    from lmoe_cli.train.config import read_config

    parsed = read_config(config)
    target = folder or Path("runs", parsed.name.strip(". ") or config.stem)
    is_first = os.environ.get("RANK", "0") == "0"
    if not is_first:
        out.quiet = True
    view = View(out, parsed.trainer.log_every)
    from lmoe_cli.train.order import Order
    from lmoe_cli.train.state import has_trained
    from lmoe_cli.train.training import train

    order = Order(
        parsed, config.parent, target, resume=resume, force=force, device=device, token=token,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    try:
        with view:
            report = train(order, view.tell)
    except (KeyboardInterrupt, SystemExit):
        if has_trained(order.work):
            out.say(f"{order.work} is kept: --resume goes on from its last checkpoint")
        raise
    if not is_first:
        return
    for name, told in report["runs"].items():
        numbers = [(key, value) for key, value in told.items() if isinstance(value, float | int)]
        out.facts(name, [(key, f"{value:.4g}") for key, value in numbers])
    out.say(f"{target}: {', '.join(report['wrote'])}; next: lmoe chat --loadout {quote(str(target / 'recipe.yaml'))}")
    out.finish({"out": str(target), **report}, view.warnings)


class View:
    """How a training looks while it goes on: a bar on a terminal, else a line now and then.

    Args:
        out: Where to talk.
        every: Steps between lines.
    """

    def __init__(self, out: Output, every: int) -> None:
        self.warnings: list[Finding] = []
        self._out, self._every = out, every
        self._steps = 0
        self._bar: Any = None
        self._task: Any = None

    def tell(self, event: dict[str, Any]) -> None:
        """Show what happened. See `train.log.Log`."""
        if "warning" in event:
            told = finding(event["code"], event["run"], f"{event['run']}: {event['warning']}")
            self.warnings.append(told)
            self._out.warn([told])
        elif "steps" in event:
            self._steps = event["steps"]
            self._begin(event)
        elif "eval" in event:
            losses = "  ".join(f"{name.removeprefix('eval_')} {loss:.4f}" for name, loss in event["eval"].items())
            self._out.say(f"{event['run']}  step {event['step']}/{self._steps}  held out: {losses}")
        else:
            self._step(event)

    def _begin(self, event: dict[str, Any]) -> None:
        gone_on = f", going on after step {event['step']}" if event["step"] else ""
        self._out.say(f"{event['run']}: {self._steps} steps{gone_on}")
        if self._bar:
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(event["run"], total=self._steps, completed=event["step"])

    def _step(self, event: dict[str, Any]) -> None:
        text = f"loss {event['loss']:.4f}  {event['tokens_per_s']:.0f} tokens/s"
        if "load" in event:
            shares = "  ".join(f"{name} {load:.2f}" for name, load in event["load"].items())
            text += f"  experts in use {event['effective']:.2f}  ({shares})"
        if self._bar:
            self._bar.update(self._task, completed=event["step"], description=f"{event['run']}  {text}")
        elif event["step"] % self._every == 0 or event["step"] in (1, self._steps):
            self._out.say(f"{event['run']}  step {event['step']}/{self._steps}  {text}")

    def __enter__(self) -> View:
        if sys.stderr.isatty() and not (self._out.quiet or self._out.as_json):
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()
