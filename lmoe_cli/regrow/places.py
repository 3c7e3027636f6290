"""Where the gates of a loadout act, before and after its experts change.

A site is called after its first module that experts change, so its name may change with them; what it reads does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmoe_cli.bank.bank import Bank
from lmoe_cli.bank.routed import Place, Route, Routing
from lmoe_cli.engine.attach import attach, detach, listen
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.router.arrow import first_right_singular_vector


def modules_at(bank: Bank) -> Mapping[str, list[str]]:
    """Place → names of the modules whose gates it has."""
    found: dict[str, list[str]] = {}
    for name, place in bank.places.items():
        found[name] = [module for module, blended in bank.modules.items() if blended.gates is place.gates]
    return found


def before(old: Bank, new: Bank) -> Mapping[str, str | None]:
    """Place of a new bank → the place of the old one that read the same; None where no expert acted.

    Raises:
        InvalidFileError: It was several.
    """
    place_of = {module: name for name, modules in modules_at(old).items() for module in modules}
    found: dict[str, str | None] = {}
    for name, modules in modules_at(new).items():
        places = sorted({place_of[module] for module in modules if module in place_of})
        if len(places) > 1:
            message = f"{name}: experts now share what had gates of its own before: {', '.join(places)}"
            raise InvalidFileError("router-place-missing", message, hint="train the gate again")
        found[name] = places[0] if places else None
    return found


def acts_at(bank: Bank, place: str, expert: int) -> bool:
    """Whether an expert changes any module of a place."""
    return any(expert in bank.modules[module].experts for module in modules_at(bank)[place])


def direction_at(place: Place, expert: int) -> Tensor:
    """What an expert amplifies most of what the gate of a place reads, (d,), float32, of length 1 or 0.

    Of a block or the whole model it is taken over the modules that read vectors as wide as the stream between blocks:
    an approximation, because a norm or more stands between.
    """
    pairs = [pair for site in place.sites for pair in site.factors(expert) if pair[0].shape[1] == place.width]
    return first_right_singular_vector(pairs).cpu() if pairs else torch.zeros(place.width)


@torch.inference_mode()
def means_seen(model: nn.Module, bank: Bank, texts: Sequence[Sequence[int]]) -> Mapping[str, Tensor]:
    """What gates read of some texts under the base alone: the mean over tokens of x / rms(x).

    The first token of each is left out where there are more; see `embed.mean_state`.

    Args:
        model: The base, without experts on it.
        bank: Its routes are replaced.
        texts: Tokens of each.

    Returns:
        Place → (d,), float32.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def watching(place: Place) -> Route:
        def route(x: Tensor) -> Routing:
            rows = x[..., 1:, :] if x.shape[-2] > 1 else x
            normed = F.rms_norm(rows.float(), rows.shape[-1:]).reshape(-1, rows.shape[-1])  # (N, d)
            sums[place.name] = sums.get(place.name, torch.zeros(place.width)) + normed.sum(0).cpu()
            counts[place.name] = counts.get(place.name, 0) + len(normed)
            return Routing(torch.zeros(*x.shape[:-1], place.gates.count, device=x.device))

        return route

    for place in bank.places.values():
        place.gates.route = watching(place)
    bank.gates.set([1.0] * len(bank.names))
    attach(model, bank.live)
    handles: list[Any] = listen(model, bank.places)
    try:
        for tokens in texts:
            model(input_ids=torch.tensor([list(tokens)], device=next(model.parameters()).device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        detach(model, bank.live)
    return {name: total / counts[name] for name, total in sums.items()}
