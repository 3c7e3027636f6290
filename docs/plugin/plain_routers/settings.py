"""What a recipe may say of these routers. Imports nothing heavy: `lmoe check` reads it."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from lmoe_cli.findings import Finding
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.loadout.routers import RouterSettings


class LengthRouter(RouterSettings):
    """Short questions go to one expert, long ones to another."""

    scope = "prompt"
    implementation = "plain_routers.length:LengthRouter"

    type: Literal["length"]
    short: str = Field(description="Expert of short messages.")
    long: str = Field(description="Expert of long ones.")
    words: int = Field(12, ge=1, description="Most words of a short message.")

    def about(self, loadout: Loadout) -> Iterator[Finding]:
        """`lmoe check` tells of names that are no experts."""
        known = {expert.name for expert in loadout.experts}
        for name in {self.short, self.long} - known:
            hint = f"experts: {', '.join(sorted(known))}"
            yield Finding("expert-unknown", "error", loadout.origin, f"the router names '{name}'", hint)


class LoudnessRouter(RouterSettings):
    """The longer the vector of a token, the more all experts act on it."""

    scope = "token"
    implementation = "plain_routers.loudness:LoudnessRouter"

    type: Literal["loudness"]
    most: float = Field(1.0, gt=0, le=10, description="Gate of an endlessly long vector.")
