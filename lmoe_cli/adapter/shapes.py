"""Whether the tensors that an adapter holds for one module fit each other, before any of them is read."""

from __future__ import annotations

from collections.abc import Mapping

from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.errors import InvalidFileError

IDLE = ("again_weight", "again_bias", "original_weight", "original_bias")
"""What PEFT may write beside a module that it keeps whole, and runs without: the same again, and the base's own."""

REQUIRED = {
    "lora": ({"lora_A", "lora_B"}, {"lora_B_bias", "magnitude", "saved_bias", "saved_weight"}),
    "embedding": ({"lora_embedding_A", "lora_embedding_B"}, {"magnitude", "saved_weight"}),
    "ia3": ({"ia3"}, set()),
    "loha": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}, set()),
    "lokr": (set(), {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"}),
    "vera": ({"vera_lambda_b", "vera_lambda_d"}, set()),
    "saved": (set(), {"saved_weight", "saved_bias", *IDLE}),
}
"""Kind of part → roles that must be there, roles that may."""

FACTORS = {
    "lora": [("lora_A", "lora_B")],
    "embedding": [("lora_embedding_A", "lora_embedding_B")],
    "loha": [("hada_w1_b", "hada_w1_a"), ("hada_w2_b", "hada_w2_a")],
    "lokr": [("lokr_w1_b", "lokr_w1_a"), ("lokr_w2_b", "lokr_w2_a")],
}
"""Kind of part → roles of shape (r, columns) with their partners of shape (rows, r)."""

SIDES = {"lora_A": 2, "lora_B": 2, "lokr_w1": 2, "lokr_w2": 2, "vera_lambda_b": 1, "vera_lambda_d": 1, "saved_bias": 1}
"""Role → number of sides of its shape, where a linear layer leaves no choice."""


def check_part(module: str, kind: str, tensors: Mapping[str, Stored], where: str) -> None:
    """Check what an adapter holds for one module.

    Args:
        module: For messages.
        kind: Key of `REQUIRED`.
        tensors: Role → tensor.
        where: Name of the adapter, for messages.

    Raises:
        InvalidFileError: A partner is missing, a tensor is one too many, or no float, or shapes contradict each other.
    """
    _check_roles(module, kind, tensors, where)
    for role, tensor in tensors.items():
        if tensor.info.dtype not in FLOATS:
            raise contradiction(module, f"{role} is stored as {tensor.info.dtype}, which is no float", where)
    shapes = {role: tensor.info.shape for role, tensor in tensors.items()}
    for role, sides in SIDES.items():
        if role in shapes and len(shapes[role]) != sides:
            raise contradiction(module, f"{role} {shapes[role]} is not of a linear layer", where)
    for down, up in FACTORS.get(kind, []):
        if down not in shapes:
            continue
        if len(shapes[down]) != 2 or len(shapes[up]) != 2 or shapes[down][0] != shapes[up][1]:
            raise contradiction(module, f"{down} {shapes[down]} and {up} {shapes[up]} cannot be multiplied", where)
        if shapes[down][0] == 0:
            raise contradiction(module, f"{down} is empty: saved from a sharded model without gathering", where)
    if kind == "loha" and (shapes["hada_w1_a"], shapes["hada_w1_b"]) != (shapes["hada_w2_a"], shapes["hada_w2_b"]):
        raise contradiction(module, "its two products have different shapes", where)
    if kind == "ia3" and (len(shapes["ia3"]) > 2 or tensors["ia3"].info.elements != max(shapes["ia3"], default=0)):
        raise contradiction(module, f"its scales {shapes['ia3']} are no row or column", where)
    for role in ("magnitude", "lora_B_bias"):
        up = FACTORS[kind][0][1] if role in shapes else ""
        if up and tensors[role].info.elements != shapes[up][0]:
            raise contradiction(module, f"{role} {shapes[role]} does not fit {shapes[up][0]} outputs", where)


def check_shared(shared: Mapping[str, Stored], rank: int, where: str) -> None:
    """Check the projections that all parts of a VeRA share. See `check_part` for the errors."""
    for role, side in (("vera_A", 0), ("vera_B", 1)):
        if role not in shared:
            continue
        info = shared[role].info
        if len(info.shape) != 2 or info.shape[side] < rank or info.dtype not in FLOATS:
            raise contradiction(role, f"{info.dtype} {info.shape} does not fit rank {rank}", where)


def contradiction(module: str, reason: str, where: str) -> InvalidFileError:
    """The error for tensors that contradict each other or the config."""
    return InvalidFileError("shape-contradiction", f"{where}: {module}: {reason}", where=where)


def _check_roles(module: str, kind: str, tensors: Mapping[str, Stored], where: str) -> None:
    required, optional = REQUIRED[kind]
    missing = required - tensors.keys()
    if kind == "lokr":
        for side in ("lokr_w1", "lokr_w2"):
            if side not in tensors:
                missing |= {f"{side}_a", f"{side}_b"} - tensors.keys()
            elif {f"{side}_a", f"{side}_b"} & tensors.keys():
                raise contradiction(module, f"{side} is there whole and in factors", where)
    if missing:
        hint = "the file is incomplete: download or save it again"
        message = f"{where}: {module} has no {', '.join(sorted(missing))}"
        raise InvalidFileError("tensor-missing", message, hint=hint, where=where)
    if extra := tensors.keys() - required - optional:
        names = ", ".join(sorted(tensors[role].name for role in extra))
        raise InvalidFileError("tensor-unplaced", f"{where}: no place for {names} beside a {kind} part", where=where)
