"""`lmoe inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lmoe_cli.cli import params
from lmoe_cli.cli.lazy import Entry, LazyGroup
from lmoe_cli.cli.output import Output, count, show_findings, size
from lmoe_cli.findings import Finding

KINDS = {
    "adapter": Entry("lmoe_cli.cli.inspect:adapter", "What an adapter is: rank, scaling, targets, variants."),
    "base": Entry("lmoe_cli.cli.inspect:base", "What a base model is: architecture, size, vocabulary."),
    "loadout": Entry("lmoe_cli.cli.inspect:loadout", "What a recipe comes to: base, experts, router."),
}


@click.group(cls=LazyGroup, entries=KINDS)
def inspect() -> None:
    """Say what an adapter, base or loadout is, from headers alone."""


@click.command()
@click.argument("ref")
@params.revision
@params.token
@params.output
def adapter(ref: str, revision: str | None, token: str | None, out: Output) -> None:
    """What an adapter is: rank, scaling, targets, variants.

    REF is a folder, org/name[@revision] on the Hub, or demo:NAME. Nothing but the config and the headers of the
    weights is read.
    """
    from lmoe_cli.adapter.soundness import inspect_adapter
    from lmoe_cli.adapter.summary import summary
    from lmoe_cli.source import open_source

    found = inspect_adapter(open_source(ref, revision=revision, token=token))
    facts = summary(found)
    show_adapter(out, facts, found.findings)
    out.finish(facts, found.findings)


def show_adapter(out: Output, facts: dict[str, Any], findings: tuple[Finding, ...]) -> None:
    """Print an adapter's summary for a person."""
    if out.as_json:
        return
    rank, scaling, layers = facts["rank"], facts["scaling"], facts["layers"]
    amounts = [f"{count(facts['parameters'])} parameters"] if facts["parameters"] else []
    told = [
        ("type", facts["peft_type"]),
        ("base", facts["base"]),
        ("task", facts["task_type"]),
        ("rank", _range(rank["min"], rank["max"]) or rank["default"]),
        ("alpha", _number(facts["alpha"])),
        ("scaling", _range(_number(scaling["min"]), _number(scaling["max"]))),
        ("targets", facts["target_modules"]),
        ("modules", facts["modules"]),
        ("layers", f"{len(layers)} ({layers[0]}–{layers[-1]})" if layers else None),
        ("variants", facts["variants"]),
        ("saves", facts["modules_to_save"]),
        ("size", ", ".join([*amounts, size(facts["bytes"]), *facts["dtypes"]])),
        ("format", facts["format"]),
        ("revision", facts["revision"]),
        ("path", facts["path"] if facts["path"] != facts["ref"] else None),
        ("supported", "yes" if facts["supported"] else "no"),
    ]
    out.facts(facts["ref"], [(name, value) for name, value in told if value])
    show_findings(findings)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _range(low: Any, high: Any) -> str | None:
    if low is None:
        return None
    return str(low) if low == high else f"{low} to {high}"


@click.command()
@click.argument("ref")
@params.revision
@params.token
@params.output
def base(ref: str, revision: str | None, token: str | None, out: Output) -> None:
    """What a base model is: architecture, size, vocabulary.

    REF is a folder, org/name[@revision] on the Hub, or demo:NAME.
    """
    from lmoe_cli.loadout.base import read_base, summary
    from lmoe_cli.source import open_source

    facts = summary(read_base(open_source(ref, revision=revision, token=token)))
    show_base(out, facts)
    out.finish(facts)


def show_base(out: Output, facts: dict[str, Any]) -> None:
    """Print a base's summary for a person."""
    if out.as_json:
        return
    out.facts(
        facts["ref"],
        [
            ("architecture", facts["architecture"] or facts["model_type"]),
            ("layers", facts["layers"]),
            ("hidden size", facts["hidden_size"]),
            ("vocabulary", facts["vocab_size"]),
            ("head", "tied to the embedding" if facts["tied_embeddings"] else "of its own"),
            ("quantised", facts["quantization"]),
            ("size", f"{count(facts['parameters'])} parameters, {size(facts['bytes'])}, {facts['dtype']}"),
            ("files", len(facts["files"])),
            ("tokenizer", facts["tokenizer"]),
            ("chat template", facts["chat_template"]),
            ("revision", facts["revision"]),
            ("path", facts["path"]),
        ],
    )


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@params.token
@params.output
def loadout(file: Path, token: str | None, out: Output) -> None:
    """What a recipe comes to: base, experts, router."""
    from lmoe_cli.loadout.loadout import resolve, summary
    from lmoe_cli.loadout.parse import read_recipe

    found = resolve(read_recipe(file), str(file), beside=file.parent, token=token)
    facts = summary(found)
    if not out.as_json:
        show_base(out, facts["base"])
        rows = [
            (name, _weight(expert["weight"]), expert["ref"], _range(expert["rank"]["min"], expert["rank"]["max"]),
             _range(_number(expert["scaling"]["min"]), _number(expert["scaling"]["max"])), expert["modules"],
             expert["variants"], size(expert["bytes"]))
            for name, expert in facts["experts"].items()
        ]  # fmt: skip
        columns = ("expert", "weight", "adapter", "rank", "scaling", "modules", "variants", "size")
        out.table(f"{facts['name'] or file.stem}: {facts['router']['type']} router", columns, rows)
    findings = [item for expert in found.experts for item in expert.adapter.findings]
    out.warn(findings)
    out.finish(facts, findings)


def _weight(value: Any) -> str:
    return f"{len(value)} rules" if isinstance(value, list) else f"{value:g}"
