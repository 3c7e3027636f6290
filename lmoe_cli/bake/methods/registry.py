"""Which methods there are. `linear` is not among them: it needs no dense delta and is the ordinary path of a bake."""

from __future__ import annotations

from lmoe_cli.bake.methods.dare import DARE, DARE_TIES
from lmoe_cli.bake.methods.della import DELLA
from lmoe_cli.bake.methods.magnitude import MAGNITUDE
from lmoe_cli.bake.methods.method import Method
from lmoe_cli.bake.methods.ties import TIES

METHODS: dict[str, Method] = {
    "ties": TIES,
    "dare": DARE,
    "dare_ties": DARE_TIES,
    "della": DELLA,
    "magnitude": MAGNITUDE,
}
"""Name in recipes → method."""
