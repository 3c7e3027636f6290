"""Which methods there are. `linear` is not among them: it needs no dense delta and is the ordinary path of a bake."""

from __future__ import annotations

from lmoe_cli.bake.methods.dare import dare, dare_ties
from lmoe_cli.bake.methods.della import della
from lmoe_cli.bake.methods.magnitude import magnitude
from lmoe_cli.bake.methods.method import Method
from lmoe_cli.bake.methods.ties import ties

METHODS: dict[str, Method] = {
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "della": della,
    "magnitude": magnitude,
}
"""Name in recipes → function."""
