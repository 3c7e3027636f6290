"""One blend per token, by how long its vector is at each site."""

import torch
from torch import Tensor

from lmoe_cli.bank.routed import Place, Route, Routing
from lmoe_cli.router.token import TokenRouter
from plain_routers.settings import LoudnessRouter as Settings


class LoudnessRouter(TokenRouter):
    """All experts alike, most tanh(|x| / sqrt d)."""

    settings: Settings

    def route_at(self, place: Place) -> Route:
        """Make what routes the tokens at one place: (..., d), any float dtype → gates (..., E), float32."""
        count, most = place.gates.count, self.settings.most

        def route(x: Tensor) -> Routing:
            loudness = x.float().square().mean(dim=-1, keepdim=True).sqrt()  # (..., 1)
            return Routing((most * torch.tanh(loudness)).expand(*x.shape[:-1], count))

        return route
