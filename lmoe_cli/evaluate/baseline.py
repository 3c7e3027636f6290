"""An evaluation beside an earlier one of the same data: has the recipe become worse?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lmoe_cli.errors import InvalidFileError, UsageError
from lmoe_cli.files import read_bytes
from lmoe_cli.findings import Finding, finding
from lmoe_cli.strict_json import parse_object

SCHEMA = "lmoe.eval/1"
MAX_BYTES = 64 << 20
WRITTEN_BY = "lmoe eval … --json > FILE writes one"
MEAN = "mean"
"""What stands for all domains, each counting the same."""


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Numbers(_Part):
    nats_per_token: float


class _Variant(_Part):
    name: str
    domains: dict[str, _Numbers]
    mean: _Numbers


class _Domain(_Part):
    sha256: str
    split: str
    judged_tokens: int


class _Data(_Part):
    domains: dict[str, _Domain]
    variants: list[_Variant]


class _Document(_Part):
    model_config = ConfigDict(extra="ignore", strict=True)

    data: _Data


@dataclass(frozen=True)
class Baseline:
    """What an earlier evaluation said of its recipe."""

    path: Path
    domains: Mapping[str, tuple[str, str, int]]
    """Name → SHA-256, split and judged tokens of what it was judged by."""
    losses: Mapping[str, float]
    """Domain, or `MEAN` → nats per token."""

    def require_files(self, files: Mapping[str, str]) -> None:
        """Refuse other files before anything is computed.

        Args:
            files: Domain → SHA-256.

        Raises:
            UsageError: One is not what was judged by, or is missing.
        """
        self._require({name: (self.domains.get(name, ("",))[0], digest) for name, digest in files.items()})

    def require_same(self, domains: Mapping[str, tuple[str, str, int]]) -> None:
        """Refuse what was judged by something else. See `require_files`."""
        self._require({name: (self.domains.get(name), own) for name, own in domains.items()})

    def _require(self, pairs: Mapping[str, tuple[object, object]]) -> None:
        missing = dict.fromkeys(self.domains.keys() - pairs.keys(), (0, 1))
        for name, (before, now) in sorted({**pairs, **missing}.items()):
            if before != now:
                message = f"{self.path}: the domain '{name}' is not what it was judged by there"
                hint = "the same --data, --split, --limit and tokenizer, or a new baseline"
                raise UsageError("baseline-differs", message, hint=hint, where=str(self.path))


def read_baseline(path: Path) -> Baseline:
    """Read what ``lmoe eval --json`` printed.

    Raises:
        NotFoundError: It is not there.
        InvalidFileError: It is something else.
    """
    document = parse_object(read_bytes(path, MAX_BYTES), str(path))
    if document.get("schema") != SCHEMA:
        message = f"{path}: its schema is {document.get('schema')!r}, not {SCHEMA!r}"
        raise InvalidFileError("baseline-invalid", message, hint=WRITTEN_BY, where=str(path))
    try:
        data = _Document.model_validate(document).data
        recipe = next(variant for variant in data.variants if variant.name == "recipe")
    except (ValidationError, StopIteration) as error:
        message = f"{path}: holds no evaluation that was finished"
        raise InvalidFileError("baseline-invalid", message, hint=WRITTEN_BY, where=str(path)) from error
    domains = {name: (one.sha256, one.split, one.judged_tokens) for name, one in data.domains.items()}
    losses = {name: numbers.nats_per_token for name, numbers in recipe.domains.items()}
    return Baseline(path, domains, {**losses, MEAN: recipe.mean.nats_per_token})


def compare(data: Mapping[str, Any], baseline: Baseline, most: float) -> tuple[dict[str, Any], list[Finding]]:
    """The recipe's loss beside an earlier one.

    Args:
        data: Of this evaluation; as ``lmoe eval --json`` tells it.
        baseline: The earlier one.
        most: Nats per token that a domain, or the mean, may be worse by.

    Returns:
        ``file, max_regression, regressed`` and ``domains`` (name → ``before, now, worse_by``), and a finding for each
        that became worse by more.

    Raises:
        UsageError: It was judged by something else.
    """
    baseline.require_same(
        {name: (one["sha256"], one["split"], one["judged_tokens"]) for name, one in data["domains"].items()}
    )
    recipe = next(variant for variant in data["variants"] if variant["name"] == "recipe")
    losses = {name: numbers["nats_per_token"] for name, numbers in recipe["domains"].items()}
    losses[MEAN] = recipe["mean"]["nats_per_token"]
    told = {
        name: {"before": baseline.losses[name], "now": loss, "worse_by": loss - baseline.losses[name]}
        for name, loss in losses.items()
    }
    findings = [
        finding(
            "eval-regressed",
            name,
            f"{name}: {one['now']:.4f} nats per token, {one['worse_by']:.4f} more than in {baseline.path}",
            f"at most {most:g} more is allowed (--max-regression)",
        )
        for name, one in told.items()
        if one["worse_by"] > most
    ]
    facts = {"file": str(baseline.path), "max_regression": most, "regressed": bool(findings), "domains": told}
    return facts, findings
