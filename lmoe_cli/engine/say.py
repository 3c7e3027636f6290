"""How much say each expert has: gates as shares of a whole, and the gates of an answer while it is given.

    s_e = |g_e| / max(1, sum over f of |g_f|)

g_e is the mean over all places of a token's gates, or over those of a layer; over several tokens the mean of s is told.
What is left of 1 is the base's own: a zero expert's mass, or weights that do not add up to it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lmoe_cli.engine.engine import Engine
from lmoe_cli.engine.generate import Generation, Piece
from lmoe_cli.engine.legend import leader
from lmoe_cli.router.token import TokenRouter


def shares(gates: Tensor) -> Tensor:
    """Gates as shares.

    Args:
        gates: g, (..., E), any float dtype.

    Returns:
        s, (..., E), float32, of which each row sums to 1 at most.
    """
    sizes = gates.float().abs()
    return sizes / sizes.sum(dim=-1, keepdim=True).clamp(min=1)


class Say:
    """How much say experts have in an answer that is given.

    Args:
        engine: Which answers.
    """

    def __init__(self, engine: Engine) -> None:
        self.names = engine.bank.names
        self._engine = engine
        self._read: list[Tensor] = []
        """Shares of each token that was read, (E,)."""

    @property
    def is_of_tokens(self) -> bool:
        """Whether each token has its own."""
        return isinstance(self._engine.router, TokenRouter)

    def followed(self, generation: Generation) -> Iterator[tuple[Piece, str | None]]:
        """The answer piece by piece, with the expert that has most say in its token.

        A token has gates once the model has read it, which it does to write the next one. So each piece comes when the
        next one is there, and the last token is read for this alone, unless it ends the turn.

        Args:
            generation: Not begun yet.

        Yields:
            Each piece, and an expert's name; None where no expert has most say, or nobody can tell.
        """
        router = self._engine.router
        if not isinstance(router, TokenRouter):
            yield from ((piece, None) for piece in generation)
            return
        with router.watched() as seen:
            waiting: Piece | None = None
            for piece in generation:
                read = self._latest(seen)
                if waiting:
                    yield waiting, self._noted(read)
                waiting = piece
            if waiting and waiting.token in self._engine.ends:
                yield waiting, None
            elif waiting:
                generation.read()
                yield waiting, self._noted(self._latest(seen))

    def _latest(self, seen: dict[str, list[Tensor]]) -> Tensor:
        """Shares in the token that was read last, (E,), on the CPU; what was seen is forgotten."""
        rows = [passes[-1].reshape(-1, len(self.names))[-1] for passes in seen.values() if passes]
        for passes in seen.values():
            passes.clear()
        return shares(torch.stack(rows).mean(0)).cpu() if rows else torch.zeros(len(self.names))  # all experts rest

    def _noted(self, read: Tensor) -> str | None:
        self._read.append(read)
        return leader(dict(zip(self.names, read.tolist(), strict=True)))

    @property
    def shares(self) -> dict[str, float] | None:
        """Expert's name → its share: the mean over the tokens that came, or that of the blend; None before any came."""
        if not self.is_of_tokens:
            mean = shares(self._engine.router.gates()[0])
        elif self._read:
            mean = torch.stack(self._read).mean(0)
        else:
            return None
        return dict(zip(self.names, mean.tolist(), strict=True))
