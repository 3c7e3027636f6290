"""Matrices that bitsandbytes packed, as transformers saves them: what they stand for and where their parts are.

    4 bit   X.weight, two codes a byte; X.weight.absmax, the scale of each block of weights; and what else
            bitsandbytes' `QuantState.as_dict(packed=True)` names, the numbers among it as JSON in a tensor of bytes
    8 bit   X.weight (d_out, d_in) of int8; X.SCB (d_out,), the scale of each row; X.weight_format

Only headers and those few bytes of JSON are read.         https://github.com/bitsandbytes-foundation/bitsandbytes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lmoe_cli.checkpoint.header import FLOATS, ITEM_BITS, TensorInfo
from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.strict_json import parse_object

FOUR_BIT = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
CODES_OF_SCALES = 256
MAX_STATE_BYTES = 4096
STATE = "quant_state.bitsandbytes__"
SIDE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(STATE + kind for kind in FOUR_BIT))
DTYPES = {name: dtype for dtype, name in FLOATS.items() if dtype != "F64"}

ReadBytes = Callable[[Stored, int], bytes]
"""``read(tensor, limit)``: the bytes of a stored tensor, at most so many."""


@dataclass(frozen=True, slots=True)
class Scales:
    """How the scales of blocks of a 4-bit matrix are stored."""

    block: int
    """Weights that share a scale."""
    outer_block: int = 0
    """Scales that share a scale of their own; 0 where scales are stored as they are."""
    offset: float = 0.0
    """Added to scales that are packed themselves."""


@dataclass(frozen=True, slots=True)
class Packed(Stored):
    """A packed matrix. Its ``info`` has the dtype, shape and bytes of what it stands for."""

    shape: tuple[int, int]
    """(d_out, d_in)."""
    kind: str
    """``nf4``, ``fp4`` or ``int8``."""
    parts: Mapping[str, Stored]
    """``weight``, and ``absmax``, ``nested_absmax``, ``nested_quant_map`` or ``SCB``, as stored."""
    scales: Scales | None
    """None for 8 bit: one scale per row."""
    transposed: bool
    """It stands for a matrix that is kept as (d_in, d_out)."""

    @property
    def files(self) -> frozenset[str]:
        return frozenset(part.file for part in self.parts.values())


def unpacked(
    stored: Mapping[str, Stored], read: ReadBytes, is_transposed: Callable[[str], bool], where: str
) -> dict[str, Stored]:
    """A checkpoint's tensors as they would be if none were packed.

    Args:
        stored: As they are.
        read: Gives the bytes of one of them.
        is_transposed: Whether the module of that name keeps its weight as (d_in, d_out) when it is not packed.
        where: Name of the checkpoint, for messages.

    Returns:
        Tensor name → where it is; of a packed one, a `Packed`. Scales and other parts have no entry of their own.

    Raises:
        InvalidFileError: The parts of a matrix are missing or contradict each other.
    """
    found: dict[str, Stored] = {}
    parts: set[str] = set()
    for name, tensor in stored.items():
        module = name.removesuffix(".weight")
        if f"{name}.absmax" in stored:
            found[name] = _four_bit(stored, tensor, read, is_transposed(module), where)
            parts |= {f"{name}.{part}" for part in SIDE}
        elif tensor.info.dtype == "I8":
            found[name] = _eight_bit(stored, tensor, read, is_transposed(module), where)
            parts |= {f"{module}.SCB", f"{module}.weight_format"}
        else:
            found[name] = tensor
    return {name: tensor for name, tensor in found.items() if name not in parts}


def _four_bit(stored: Mapping[str, Stored], weight: Stored, read: ReadBytes, transposed: bool, where: str) -> Packed:
    name = weight.name
    kind = next((kind for kind in FOUR_BIT if f"{name}.{STATE}{kind}" in stored), None)
    if kind is None:
        raise _broken(where, f"{name} has scales but no {STATE}nf4 or {STATE}fp4")
    state = stored[f"{name}.{STATE}{kind}"]
    told = parse_object(read(state, MAX_STATE_BYTES), f"{where}: {state.name}")
    match told:
        case {
            "quant_type": str(said),
            "blocksize": int(block),
            "dtype": str(dtype),
            "shape": [int(rows), int(columns)],
        }:
            pass
        case _:
            raise _broken(where, f"{state.name} tells no quant_type, blocksize, dtype and shape of a matrix")
    if said != kind or block not in BLOCK_SIZES or dtype not in DTYPES or rows < 1 or columns < 1:
        raise _broken(where, f"{state.name} says {said}, blocks of {block}, {dtype}, ({rows}, {columns})")
    parts = {"weight": weight, "absmax": stored[f"{name}.absmax"]}
    blocks = -(-rows * columns // block)
    due = {"weight": -(-rows * columns // 2) * 8, "absmax": blocks}
    scales = Scales(block)
    if "nested_blocksize" in told:
        scales = _nested(told, block, state.name, where)
        for part in ("nested_absmax", "nested_quant_map"):
            if f"{name}.{part}" not in stored:
                raise _broken(where, f"{name}.{part} is missing")
            parts[part] = stored[f"{name}.{part}"]
        due |= {"nested_absmax": -(-blocks // scales.outer_block), "nested_quant_map": CODES_OF_SCALES}
    for part, tensor in parts.items():
        amount = tensor.info.size * 8 if part == "weight" else tensor.info.elements
        is_codes = part == "absmax" and scales.outer_block
        if amount != due[part] or (part != "weight" and (tensor.info.dtype == "U8") is not bool(is_codes)):
            raise _broken(where, f"{tensor.name} cannot belong to blocks of {block} of a ({rows}, {columns}) matrix")
    return _packed(weight, kind, parts, scales, DTYPES[dtype], (rows, columns), transposed)


def _nested(told: Mapping[str, Any], block: int, name: str, where: str) -> Scales:
    match told:
        case {"nested_blocksize": int(outer), "nested_dtype": "float32", "nested_offset": int() | float() as offset}:
            if outer > 0:
                return Scales(block, outer, float(offset))
    raise _broken(where, f"{name} tells no size and offset of its packed scales")


def _eight_bit(stored: Mapping[str, Stored], weight: Stored, read: ReadBytes, transposed: bool, where: str) -> Packed:
    module = weight.name.removesuffix(".weight")
    scales = stored.get(f"{module}.SCB")
    shape = weight.info.shape
    if scales is None or len(shape) != 2 or scales.info.elements != shape[0] or scales.info.dtype not in FLOATS:
        raise _broken(where, f"{weight.name} is of int8 without a scale in {module}.SCB for each row")
    order = stored.get(f"{module}.weight_format")
    if order is not None and read(order, 1) != b"\0":
        raise _broken(where, f"{weight.name} is laid out for one kind of GPU: save it again with bitsandbytes 0.45")
    return _packed(weight, "int8", {"weight": weight, "SCB": scales}, None, "F32", (shape[0], shape[1]), transposed)


def _packed(
    weight: Stored,
    kind: str,
    parts: Mapping[str, Stored],
    scales: Scales | None,
    dtype: str,
    shape: tuple[int, int],
    transposed: bool,
) -> Packed:
    dense = shape[::-1] if transposed else shape
    info = TensorInfo(dtype, dense, weight.info.start, math.prod(shape) * ITEM_BITS[dtype] // 8)
    return Packed(weight.name, weight.file, info, shape, kind, parts, scales, transposed)


def _broken(where: str, reason: str) -> InvalidFileError:
    hint = "the base is damaged: download it again, or quantise it again"
    return InvalidFileError("packing-invalid", f"{where}: {reason}", hint=hint, where=where)
