"""Whether a trained gate has seen what it is judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmoe_cli.data.splits import TRAIN
from lmoe_cli.evaluate.domains import ALL, Domain
from lmoe_cli.findings import Finding, finding
from lmoe_cli.loadout.loadout import Loadout


def about_seen(loadout: Loadout, domains: Sequence[Domain]) -> Iterator[Finding]:
    """Domains of files that the loadout's gate was trained on, unless they are judged by a split that is held out.

    Args:
        loadout: Of the recipe.
        domains: What it is judged by.
    """
    known = set(loadout.gate.data.values()) if loadout.gate else set()
    for domain in domains:
        if domain.sha256 in known and domain.split in (ALL, TRAIN):
            message = f"{domain.name}: the recipe's gate was trained on this very file"
            yield finding("eval-seen", str(domain.path), message, "--split valid, or another file")
