"""Arrow: experts whose weights amplify a token's direction most are those it is sent to. Nothing is trained.

    v_e = first right singular vector of dW_e          Ostapenko et al. 2024, sec. 4.2
    s_e = |x . v_e|                                     https://arxiv.org/abs/2405.11157
    g   = softmax(s / tau) over the k largest, else 0

dW_e is that of the whole site: of q, k and v, which read the same x, one above the other. It is never formed. With
A' = Q R for the stacked factors (QR), and B_m = P_m S_m for each module m of the site, dW_e = P [S_m] R' Q', so v_e is
Q times the first right singular vector of the small matrix [S_m] R', of as many rows and columns as there are ranks.
Row scales (DoRA) are part of what an expert does, not of which tokens it is sent. An expert without factors at a site
scores 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmoe_cli.bank.routed import Place, Route, Routing
from lmoe_cli.loadout.routers import ArrowRouter as Settings
from lmoe_cli.router.token import TokenRouter, sparse


class ArrowRouter(TokenRouter):
    """Gates from the experts' own directions. See `StaticRouter` for arguments."""

    settings: Settings

    def route_at(self, place: Place) -> Route:
        count = place.gates.count
        kept = min(self.settings.top_k, count)
        compare = directions(place, count).to(place.gates.values.device) / self.settings.temperature  # (E, d)

        def route(x: Tensor) -> Routing:
            return sparse((x.float() @ compare.T).abs(), kept)

        return route


def directions(place: Place, count: int) -> Tensor:
    """The direction that each expert amplifies most at a place.

    Args:
        place: A site.
        count: E.

    Returns:
        v, (E, d), float32, of length 1, with a sign of no meaning; 0 for experts that have no factors there.
    """
    found = torch.zeros(count, place.width)
    for expert in range(count):
        # Of a place that several sites share, those count that read what the router reads.
        factors = [(a, b) for site in place.sites for a, b in site.factors(expert) if a.shape[1] == place.width]
        if factors:
            found[expert] = first_right_singular_vector(factors)
    return found


def first_right_singular_vector(factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """That of matrices B_m A_m one above the other, without forming one.

    Args:
        factors: A_m (r_m, d_in) and B_m (d_out_m, r_m) of each module.

    Returns:
        (d_in,), float32, of length 1; 0 where the matrices are.
    """
    factors = [(a.cpu(), b.cpu()) for a, b in factors]  # some devices know no float64
    a = torch.cat([a for a, _ in factors]).double()  # (sum of r, d_in)
    q, r = torch.linalg.qr(a.T)  # (d_in, k), (k, sum of r)
    tops = [torch.linalg.qr(b.double(), mode="r").R for _, b in factors]
    small = torch.block_diag(*tops) @ r.T  # type: ignore[no-untyped-call]  # (sum of r or less, k)
    _, values, right = torch.linalg.svd(small, full_matrices=False)
    if not values[0] > 0:
        return torch.zeros(a.shape[1])
    vector: Tensor = (q @ right[0]).float()
    return vector
