"""Every code an error or a finding can carry, with its severity, its meaning and what to do about it.

The page on findings is made from this table. Codes are stable: scripts may rely on them.
"""

from __future__ import annotations

from lmoe_cli.codes.code import Code, Severity
from lmoe_cli.codes.parts import ADAPTERS, BASES, FILES, FIT, HUB, RECIPES
from lmoe_cli.codes.uses import BAKE, DATA, EVALUATE, ROUTERS, RUN, SIMILARITY, TRAIN, USE

CODES: dict[str, Code] = (
    FILES | HUB | ADAPTERS | RECIPES | BASES | FIT | RUN | ROUTERS | DATA | TRAIN | BAKE | EVALUATE | SIMILARITY | USE
)

__all__ = ["CODES", "Code", "Severity"]
