"""What an adapter holds for each module: its tensors by role, rank, alpha and scaling."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from lmoe_cli.adapter.config import LORA, AdapterConfig
from lmoe_cli.adapter.names import natural, place
from lmoe_cli.adapter.patterns import Patterns
from lmoe_cli.adapter.shapes import FACTORS, check_part, check_shared, contradiction
from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.errors import InvalidFileError

FUSED_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "weight")
"""The order in which modules with fused experts declare their parameters; PEFT wraps the first one innermost."""

SAVED_TWICE = ".modules_to_save."
AGAIN = {"saved_weight": "again_weight", "saved_bias": "again_bias"}
"""Role → that of the same tensor when it is written a second time, with ``save_embedding_layers``. PEFT reads the
first."""

MARKERS = {
    "lora": "lora_A",
    "embedding": "lora_embedding_A",
    "ia3": "ia3",
    "loha": "hada_w1_a",
    "lokr": "lokr_w",
    "vera": "vera_lambda_b",
}
"""Kind of part → start of a role that only such a part has."""

OWNER = {"lora": LORA, "embedding": LORA, "ia3": "IA3", "loha": "LOHA", "lokr": "LOKR", "vera": "VERA"}
"""Kind of part → PEFT type; every type may save modules whole."""


@dataclass(frozen=True)
class Part:
    """What an adapter holds for one module of the base."""

    module: str
    """Full dotted name in the base; for fused experts the name of the parameter, ``….experts.down_proj``."""
    kind: str
    """``lora``, ``embedding``, ``ia3``, ``loha``, ``lokr``, ``vera``, or ``saved`` for weights stored as they are."""
    tensors: Mapping[str, Stored]
    """Role → where it is stored. See `names.ROLES`."""
    rank: int = 0
    """Of the low-rank product; 0 where there is none."""
    scaling: float = 1.0
    """s = alpha/r, or alpha/√r when rank-stabilised. Dimensionless."""
    experts: int = 1
    """How many experts are stacked in the tensors."""
    is_parameter: bool = False
    """It changes a parameter itself, as its config's ``target_parameters`` say, rather than a layer."""
    is_beneath: bool = False
    """It is no module that was trained whole, but what the factors of another module stand on."""

    @property
    def is_dora(self) -> bool:
        return "magnitude" in self.tensors

    @property
    def shape(self) -> tuple[int, int] | None:
        """(d_out, d_in) of the matrix it changes, where the tensors say both."""
        tensors = self.tensors
        match self.kind:
            case "lora":
                return tensors["lora_B"].info.shape[0], tensors["lora_A"].info.shape[1]
            case "embedding":
                return tensors["lora_embedding_B"].info.shape[0], tensors["lora_embedding_A"].info.shape[1]
            case "loha":
                return tensors["hada_w1_a"].info.shape[0], tensors["hada_w1_b"].info.shape[1]
            case "lokr":
                (m1, n1), (m2, n2) = _kron_side(tensors, "lokr_w1"), _kron_side(tensors, "lokr_w2")
                return m1 * m2, n1 * n2
            case _:
                return None


def _kron_side(tensors: Mapping[str, Stored], role: str) -> tuple[int, int]:
    if role in tensors:
        rows, columns = tensors[role].info.shape
        return rows, columns
    return tensors[f"{role}_a"].info.shape[0], tensors[f"{role}_b"].info.shape[1]


def parts(stored: Mapping[str, Stored], config: AdapterConfig, where: str) -> tuple[dict[str, Part], dict[str, Stored]]:
    """Group the tensors of an adapter by the module they change.

    Args:
        stored: All tensors of the adapter's weight files.
        config: The adapter's config, of a supported PEFT type.
        where: Name of the adapter, for messages.

    Returns:
        Module → part, in the order of the layers, and the tensors that all parts share (VeRA's projections).

    Raises:
        InvalidFileError: A tensor has no place, a partner is missing, or shapes contradict each other or the config.
    """
    grouped: dict[tuple[str, int], dict[str, Stored]] = {}
    shared: dict[str, Stored] = {}
    for name, tensor in stored.items():
        found = place(name)
        if found is None:
            hint = "lmoe refuses to drop it; is this an adapter of the PEFT type that its config names?"
            raise InvalidFileError("tensor-unplaced", f"{where}: no place for tensor {name!r}", hint=hint, where=where)
        if not found.module:
            shared[found.role] = tensor
            continue
        depth = 0 if found.role.startswith("saved_") else found.depth
        roles = grouped.setdefault((found.module, depth), {})
        role = found.role
        if role in roles:
            roles[role], tensor = sorted((roles[role], tensor), key=lambda one: SAVED_TWICE in one.name)
            if not _is_again(roles[role], tensor) or AGAIN.get(role, role) in roles:
                message = f"{where}: {tensor.name!r} and {roles[role].name!r} are the same {role} of {found.module}"
                raise InvalidFileError("tensor-unplaced", message, where=where)
            role = AGAIN[role]
        roles[role] = tensor
    named = _name_fused(grouped, config, where)
    ranks, alphas = Patterns(config.rank_pattern, where), Patterns(config.alpha_pattern, where)
    made = {module: _part(module, named[module], config, ranks, alphas, where) for module in sorted(named, key=natural)}
    check_shared(shared, max((part.rank for part in made.values()), default=0), where)
    return made, shared


def _is_again(plain: Stored, again: Stored) -> bool:
    """Whether PEFT wrote a module that it keeps whole twice: by its own name, and by that of its wrapper."""
    is_like = (plain.info.shape, plain.info.dtype) == (again.info.shape, again.info.dtype)
    return SAVED_TWICE not in plain.name and SAVED_TWICE in again.name and is_like


class _Group(NamedTuple):
    """The tensors of one part to be made."""

    tensors: Mapping[str, Stored]
    pattern_key: str
    """What PEFT matches patterns against."""
    is_parameter: bool = False
    """Named by ``target_parameters``: experts may be stacked in it."""


def _name_fused(
    grouped: Mapping[tuple[str, int], dict[str, Stored]], config: AdapterConfig, where: str
) -> dict[str, _Group]:
    """Replace nesting depth by the name of the fused parameter it stands for."""
    depths: dict[str, list[int]] = {}
    for module, depth in grouped:
        depths.setdefault(module, []).append(depth)
    named: dict[str, _Group] = {}
    for module, levels in depths.items():
        parameters = [_leaf(name) for name in config.target_parameters if _is_of(name, module)]
        parameters.sort(key=lambda name: FUSED_ORDER.index(name) if name in FUSED_ORDER else len(FUSED_ORDER))
        has_factors = any("lora_A" in grouped[module, depth] for depth in levels)
        if not (parameters and has_factors):
            if max(levels) > 0:
                hint = "its config should name them in target_parameters"
                message = f"{where}: {module} holds several adapted parameters without names"
                raise InvalidFileError("tensor-unplaced", message, hint=hint, where=where)
            named[module] = _Group(grouped[module, 0], module)
            continue
        if len(parameters) != len(levels):
            message = f"{where}: {module} holds {len(levels)} adapted parameters, its config names {parameters}"
            raise InvalidFileError("tensor-unplaced", message, where=where)
        for parameter, depth in zip(parameters, sorted(levels, reverse=True), strict=True):
            key = f"{module}.{parameter}"
            named[module if parameter == "weight" else key] = _Group(grouped[module, depth], key, is_parameter=True)
    return named


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_of(parameter: str, module: str) -> bool:
    parent = parameter.rpartition(".")[0]
    if not parent:
        return module.endswith("experts")
    return module == parent or module.endswith("." + parent)


def _part(
    module: str, group: _Group, config: AdapterConfig, ranks: Patterns[int], alphas: Patterns[float], where: str
) -> Part:
    tensors = group.tensors
    kind = next((kind for kind, mark in MARKERS.items() if any(role.startswith(mark) for role in tensors)), "saved")
    if OWNER.get(kind, config.peft_type) != config.peft_type:
        raise contradiction(module, f"{kind} tensors in an adapter of type {config.peft_type}", where)
    check_part(module, kind, tensors, where)
    if config.use_dora and kind in ("lora", "embedding") and not group.is_parameter and "magnitude" not in tensors:
        hint = "it was saved by half: download it again, or ask its author"
        message = f"{where}: {module} has no magnitude, and the config says 'use_dora'"
        raise InvalidFileError("tensor-missing", message, hint=hint, where=where)
    part = Part(module, kind, tensors, is_parameter=group.is_parameter)
    if kind in ("ia3", "saved"):
        return part
    if kind == "vera":
        return replace(part, rank=tensors["vera_lambda_d"].info.elements)
    assert config.r is not None  # of these types, as `config.DEFAULTS` has it
    assert config.default_alpha is not None
    rank, experts = _rank(part, ranks.value(group.pattern_key, config.r), group.is_parameter, where)
    alpha = alphas.value(group.pattern_key, config.default_alpha)
    root = math.sqrt(rank) if config.use_rslora and config.peft_type == LORA else rank
    return replace(part, rank=rank, scaling=alpha / root, experts=experts)


def _rank(part: Part, declared: int, is_parameter: bool, where: str) -> tuple[int, int]:
    """Rank and number of stacked experts, as the config says and the tensors confirm."""
    if part.kind == "lokr":  # the sides need not be factorised, and then no tensor tells
        factors = [tensor.info.shape[1] for role, tensor in part.tensors.items() if role.endswith("_a")]
        if any(rank != declared for rank in factors):
            raise contradiction(part.module, f"rank {factors[0]} in the file, {declared} in the config", where)
        return declared, 1
    down = FACTORS[part.kind][0][0]
    rank = part.tensors[down].info.shape[0]
    if is_parameter:
        experts, rest = divmod(rank, declared)
        if rest:
            raise contradiction(part.module, f"{rank} rows of {down} are no multiple of rank {declared}", where)
        return declared, experts
    if rank != declared:
        raise contradiction(part.module, f"rank {rank} in the file, {declared} in the config", where)
    return rank, 1
