"""Whether a router has seen what it is judged by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmoe_cli.data.records import data_hash
from lmoe_cli.evaluate.domains import ALL, Domain
from lmoe_cli.findings import Finding, finding
from lmoe_cli.loadout.examples import found_beside
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.loadout.routers import EncoderRouter
from lmoe_cli.split_names import TRAIN


def about_seen(loadout: Loadout, domains: Sequence[Domain]) -> Iterator[Finding]:
    """Domains of files that a router was made from, unless they are judged by a split that is held out.

    A gate was trained on them; an encoder has read in them what an expert is for.

    Args:
        loadout: Of the recipe.
        domains: What it is judged by.
    """
    known = set(loadout.gate.data.values()) if loadout.gate else set()
    if isinstance(loadout.recipe.router, EncoderRouter):
        known |= {data_hash(found_beside(one.entry.data, loadout.folder)) for one in loadout.experts if one.entry.data}
    for domain in domains:
        if domain.sha256 in known and domain.split in (ALL, TRAIN):
            message = f"{domain.name}: the recipe's router was made from this very file"
            yield finding(
                "eval-seen", str(domain.path), message, "--split valid where its lines say it, or another file"
            )
