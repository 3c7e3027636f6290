"""From a recipe to a running engine: resolve, check, fetch, load, attach."""

from __future__ import annotations

from pathlib import Path

from lmoe_cli.bank.bank import build_bank
from lmoe_cli.check import require
from lmoe_cli.engine.base_model import load_model, require_quantized_runs
from lmoe_cli.engine.compiled import require_compiles, require_traceable
from lmoe_cli.engine.device import choose_device, choose_dtype
from lmoe_cli.engine.engine import Engine
from lmoe_cli.errors import UsageError
from lmoe_cli.hub import Progress
from lmoe_cli.loadout.loadout import Loadout, resolve
from lmoe_cli.loadout.parse import read_recipe
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.loadout.routers import Share, StaticRouter
from lmoe_cli.router import registry


def load(
    recipe: str | Path | Recipe,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compiles: bool = False,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> Engine:
    """Load a loadout and make it ready to run.

    Args:
        recipe: A recipe file, or a recipe made in Python.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``mps``; the best there is when None.
        dtype: ``float32``, ``float16`` or ``bfloat16``; as stored where the device computes well in it when None.
        quantize: ``nf4`` or ``int8``: quantise the base while it loads.
        compiles: Let torch compile the steps of answers: the first answer starts late, tokens come faster.
        token: For the Hub.
        trust_remote_code: Let the base run code of its repository.

    Returns:
        An engine with the recipe's weights in force.

    Raises:
        RefusedError: The recipe is wrong, or its parts do not fit.
        LmoeError: Something could not be found, fetched or loaded.

    Example:
        >>> engine = lmoe_cli.load("recipes/battlemage.yaml")
        >>> engine.set_weights(mage=0.8)
        >>> engine.generate("A goblin blocks the bridge.", temperature=0)
    """
    if isinstance(recipe, Recipe):
        loadout = resolve(recipe, recipe.name or "the recipe", token=token)
    else:
        path = Path(recipe)
        loadout = resolve(read_recipe(path), str(path), beside=path.parent, token=token)
    require(loadout, trust_remote_code=trust_remote_code)
    return start(
        loadout,
        device=device,
        dtype=dtype,
        quantize=quantize,
        compiles=compiles,
        trust_remote_code=trust_remote_code,
    )


def share_of(loadout: Loadout) -> Share | None:
    """What has gates of its own in a loadout; None where none is decided per token."""
    if loadout.gate:
        return loadout.gate.settings.share
    router = loadout.recipe.router
    return router.shared if router.scope == "token" else None


def start(
    loadout: Loadout,
    *,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compiles: bool = False,
    trust_remote_code: bool = False,
    answers: bool = True,
    progress: Progress | None = None,
) -> Engine:
    """Load a loadout that has been checked. See `load` for arguments and errors, and `choose_dtype` for ``answers``."""
    place = choose_device(device)
    loadout.fetch(progress)
    is_quantized = bool(quantize or loadout.base.quantization)
    answers = answers and not (is_quantized or loadout.base.is_mixture)  # packed and grouped products are not widened
    kind = choose_dtype(dtype, loadout.base.runs_in, loadout.base.size, place, answers=answers)
    model = load_model(loadout.base, dtype=kind, device=place, quantize=quantize, trust_remote_code=trust_remote_code)
    if compiles:
        require_compiles(model)
    router = loadout.recipe.router
    if compiles and router.scope == "token":
        message = f"steps of the router '{router.type}', which decides per token, are not compiled"
        raise UsageError("compile-unsupported", message, hint="leave --compile out")
    bank = build_bank(model, loadout, kind, share_of(loadout))
    if compiles:
        require_traceable(bank)
    if is_quantized and place.type == "cpu":
        require_quantized_runs(loadout.base, model)
    weights = {expert.name: expert.weight for expert in loadout.experts}
    engine = Engine(
        loadout, model, bank, registry.load(router)(router, weights), compiles=compiles, trusts=trust_remote_code
    )
    if isinstance(router, StaticRouter) and router.fold and not is_quantized:
        engine.fold()
    return engine
