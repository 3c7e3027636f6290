"""What an adapter holds for each module: its tensors by role, rank, alpha and scaling."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from lmoe_cli.adapter.config import LORA, AdapterConfig
from lmoe_cli.adapter.names import natural, place
from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.errors import InvalidFileError

T = TypeVar("T")
PLAIN = re.compile(r"[\w.-]+")
PATTERN_TIMEOUT_S = 0.1

FUSED_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj", "weight")
"""The order in which modules with fused experts declare their parameters; PEFT wraps the first one innermost."""

MARKERS = {
    "lora": "lora_A",
    "embedding": "lora_embedding_A",
    "ia3": "ia3",
    "loha": "hada_w1_a",
    "lokr": "lokr_w",
    "vera": "vera_lambda_b",
}
"""Kind of part → start of a role that only such a part has."""


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
        if found.role in roles:
            message = f"{where}: {name!r} and {roles[found.role].name!r} are the same {found.role} of {found.module}"
            raise InvalidFileError("tensor-unplaced", message, where=where)
        roles[found.role] = tensor
    named = _name_fused(grouped, config, where)
    made = {module: _part(module, named[module], config, where) for module in sorted(named, key=natural)}
    return made, shared


def _name_fused(
    grouped: Mapping[tuple[str, int], dict[str, Stored]], config: AdapterConfig, where: str
) -> dict[str, dict[str, Stored]]:
    """Replace nesting depth by the name of the fused parameter it stands for."""
    depths: dict[str, list[int]] = {}
    for module, depth in grouped:
        depths.setdefault(module, []).append(depth)
    named: dict[str, dict[str, Stored]] = {}
    for module, levels in depths.items():
        parameters = [_leaf(name) for name in config.target_parameters if _is_of(name, module)]
        parameters.sort(key=lambda name: FUSED_ORDER.index(name) if name in FUSED_ORDER else len(FUSED_ORDER))
        has_factors = any("lora_A" in grouped[module, depth] for depth in levels)
        if not (parameters and has_factors):
            if max(levels) > 0:
                hint = "its config should name them in target_parameters"
                message = f"{where}: {module} holds several adapted parameters without names"
                raise InvalidFileError("tensor-unplaced", message, hint=hint, where=where)
            named[module] = grouped[module, 0]
            continue
        if len(parameters) != len(levels):
            message = f"{where}: {module} holds {len(levels)} adapted parameters, its config names {parameters}"
            raise InvalidFileError("tensor-unplaced", message, where=where)
        for parameter, depth in zip(parameters, sorted(levels, reverse=True), strict=True):
            named[module if parameter == "weight" else f"{module}.{parameter}"] = grouped[module, depth]
    return named


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_of(parameter: str, module: str) -> bool:
    parent = parameter.rpartition(".")[0]
    if not parent:
        return module.endswith("experts")
    return module == parent or module.endswith("." + parent)


def _part(module: str, tensors: Mapping[str, Stored], config: AdapterConfig, where: str) -> Part:
    kind = next((kind for kind, mark in MARKERS.items() if any(role.startswith(mark) for role in tensors)), "saved")
    _check_roles(module, kind, tensors, where)
    part = Part(module, kind, tensors)
    if kind in ("ia3", "saved"):
        return part
    if kind == "vera":
        return replace(part, rank=tensors["vera_lambda_d"].info.elements)
    declared = pattern_value(config.rank_pattern, module, config.r)
    rank, experts = _rank(part, declared, config, where)
    alpha = pattern_value(config.alpha_pattern, module, config.default_alpha)
    if alpha is None:
        # PEFT's own default, which very old configs rely on.
        alpha = 8.0
    root = math.sqrt(rank) if config.use_rslora and config.peft_type == LORA else rank
    return replace(part, rank=rank, scaling=alpha / root, experts=experts)


REQUIRED = {
    "lora": ({"lora_A", "lora_B"}, {"lora_B_bias", "magnitude", "saved_bias", "saved_weight"}),
    "embedding": ({"lora_embedding_A", "lora_embedding_B"}, {"magnitude", "saved_weight"}),
    "ia3": ({"ia3"}, set()),
    "loha": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, set()),
    "lokr": (set(), {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
    "vera": ({"vera_lambda_b", "vera_lambda_d"}, set()),
    "saved": (set(), {"saved_weight", "saved_bias"}),
}
"""Kind → roles that must be there, roles that may."""


def _check_roles(module: str, kind: str, tensors: Mapping[str, Stored], where: str) -> None:
    required, optional = REQUIRED[kind]
    missing = required - tensors.keys()
    if kind == "lokr":
        for side in ("lokr_w1", "lokr_w2"):
            if side not in tensors:
                missing |= {f"{side}_a", f"{side}_b"} - tensors.keys()
    if missing:
        hint = "the file is incomplete: download or save it again"
        message = f"{where}: {module} has no {', '.join(sorted(missing))}"
        raise InvalidFileError("tensor-missing", message, hint=hint, where=where)
    if extra := tensors.keys() - required - optional:
        names = ", ".join(sorted(tensors[role].name for role in extra))
        raise InvalidFileError("tensor-unplaced", f"{where}: no place for {names} beside a {kind} part", where=where)


def _rank(part: Part, declared: int | None, config: AdapterConfig, where: str) -> tuple[int, int]:
    """Rank and number of stacked experts, from the tensors, checked against each other and the config."""
    shapes = {role: tensor.info.shape for role, tensor in part.tensors.items()}

    def contradiction(reason: str) -> InvalidFileError:
        return InvalidFileError("shape-contradiction", f"{where}: {part.module}: {reason}", where=where)

    if part.kind == "lokr":
        inner = [shapes[role][1] for role in ("lokr_w1_a", "lokr_w2_a") if role in shapes]
        return (declared or (inner[0] if inner else 1)), 1
    down, up = {
        "lora": ("lora_A", "lora_B"),
        "embedding": ("lora_embedding_A", "lora_embedding_B"),
        "loha": ("hada_w1_b", "hada_w1_a"),
    }[part.kind]
    if len(shapes[down]) != 2 or len(shapes[up]) != 2 or shapes[down][0] != shapes[up][1]:
        raise contradiction(f"{down} {shapes[down]} and {up} {shapes[up]} cannot be multiplied")
    rank, experts = shapes[down][0], 1
    if rank == 0:
        raise contradiction(f"{down} is empty {shapes[down]}: saved from a sharded model without gathering")
    if config.target_parameters and declared and part.module.rpartition(".")[0].endswith("experts"):
        experts, rest = divmod(rank, declared)
        if rest:
            raise contradiction(f"{rank} rows of {down} are no multiple of rank {declared}")
        rank = declared
    elif declared is not None and rank != declared:
        raise contradiction(f"rank {rank} in the file, {declared} in the config")
    d_out = shapes[up][0]
    for role in ("magnitude", "lora_B_bias"):
        if role in shapes and math.prod(shapes[role]) != d_out:
            raise contradiction(f"{role} {shapes[role]} does not fit {d_out} outputs")
    return rank, experts


def pattern_value(patterns: Mapping[str, T], module: str, default: T | None) -> T | None:
    """The value of the first pattern that names a module, as PEFT matches ``rank_pattern`` and ``alpha_pattern``.

    A pattern is a regular expression that must match the end of the module's name from a dot on. Most are plain names;
    others run under a time limit, because they come from strangers.

    Raises:
        InvalidFileError: A pattern is no regular expression, or takes too long.
    """
    for pattern, value in patterns.items():
        bare = pattern.removeprefix("^")
        if PLAIN.fullmatch(bare):
            if module == bare or (bare == pattern and module.endswith("." + pattern)):
                return value
        elif _matches(pattern, module):
            return value
    return default


def _matches(pattern: str, module: str) -> bool:
    import regex

    try:
        return bool(regex.match(rf"(.*\.)?({pattern})$", module, timeout=PATTERN_TIMEOUT_S))
    except (regex.error, TimeoutError, RecursionError, MemoryError) as error:
        reason = "takes too long" if isinstance(error, TimeoutError) else "is no regular expression"
        message = f"the pattern {pattern[:60]!r} {reason}"
        raise InvalidFileError("config-invalid", message, hint="mend rank_pattern or alpha_pattern") from error
