"""Read the header of a safetensors file without reading a tensor.

A file is eight bytes of little-endian length, that many bytes of JSON, and the tensors one after the other without a
gap.          https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmoe_cli.errors import InvalidFileError
from lmoe_cli.files import opened
from lmoe_cli.strict_json import parse_object

MAX_HEADER_BYTES = 16 << 20
"""A LoRA on each expert of a mixture of 94 layers with 128 of them, named one by one, takes 11 MB."""
PREFIX_BYTES = 8
MAX_DIMENSIONS = 8

ITEM_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of the dtypes that weights are computed in, as torch calls them."""

ReadRange = Callable[[int, int], bytes]
"""``read(start, length)``: that many bytes from there, fewer only where the file ends."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype, shape and place of one stored tensor."""

    dtype: str
    """safetensors name, such as ``"BF16"``."""
    shape: tuple[int, ...]
    start: int
    """First byte, from the start of the file."""
    size: int
    """Bytes."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a local file. See `parse_header`."""
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        return parse_header(lambda start, length: os.pread(file.fileno(), length, start), size, str(path))


def parse_header(read: ReadRange, size: int, where: str) -> Header:
    """Read a header in two small reads and check that it describes the file.

    Args:
        read: Gives bytes of the file.
        size: Bytes in the whole file.
        where: Name of the file, for messages.

    Raises:
        InvalidFileError: Truncated, not safetensors, or a header that lies about dtypes, shapes or places.
    """
    prefix = read(0, PREFIX_BYTES)
    if len(prefix) < PREFIX_BYTES:
        raise _broken("header-truncated", where, f"{size} bytes are too few for a safetensors file")
    if prefix.startswith(b"version "):
        raise lfs_pointer(where)
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES:
        kinds = {b"PK": "a zip or pickle file", b"\x80\x02": "a pickle file", b"GG": "a GGUF file"}
        kind = kinds.get(prefix[:2], "no safetensors file")
        raise _broken("header-too-large", where, f"a header of {length} bytes (at most {MAX_HEADER_BYTES}): {kind}?")
    if PREFIX_BYTES + length > size:
        raise _broken("header-truncated", where, f"the header is {length} bytes, the whole file {size}")
    raw = read(PREFIX_BYTES, length)
    if len(raw) < length:
        raise _broken("header-truncated", where, f"the header ends after {len(raw)} of {length} bytes")
    try:
        entries = parse_object(raw, where)
    except InvalidFileError as error:
        raise _broken(error.code, where, f"the header is {str(error).removeprefix(f'{where}: ')}") from error
    metadata = _metadata(entries.pop("__metadata__", {}), where)
    tensors = {name: _tensor(name, entry, PREFIX_BYTES + length, where) for name, entry in entries.items()}
    _check_places(tensors, PREFIX_BYTES + length, size, where)
    return Header(tensors, metadata)


def lfs_pointer(where: str) -> InvalidFileError:
    """The error for a Git LFS pointer that stands where a file should be."""
    hint = "run 'git lfs pull' in that folder, or download the file again"
    return InvalidFileError("lfs-pointer", f"{where}: a Git LFS pointer, not the file itself", hint=hint, where=where)


def _broken(code: str, where: str, reason: str) -> InvalidFileError:
    hint = "the file is damaged or incomplete: download it again"
    return InvalidFileError(code, f"{where}: {reason}", hint=hint, where=where)


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:  # MLX writes null
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _broken("header-invalid", where, "__metadata__ is not a mapping from text to text")
    return value


def _tensor(name: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise _broken("header-invalid", where, f"tensor {name!r} has no dtype, shape or data_offsets")
    if dtype not in ITEM_BITS:
        raise _broken("header-invalid", where, f"tensor {name!r} has the unknown dtype {dtype!r}")
    if len(shape) > MAX_DIMENSIONS or not all(type(side) is int and 0 <= side < 1 << 48 for side in shape):
        raise _broken("header-invalid", where, f"tensor {name!r} has the impossible shape {shape}")
    bits = math.prod(shape) * ITEM_BITS[dtype]
    if bool in (type(begin), type(end)) or not 0 <= begin <= end or bits != (end - begin) * 8:
        reason = f"tensor {name!r} of shape {shape} and dtype {dtype} cannot stand at bytes {begin} to {end}"
        raise _broken("header-invalid", where, reason)
    return TensorInfo(dtype, tuple(shape), data_start + begin, end - begin)


def _check_places(tensors: Mapping[str, TensorInfo], data_start: int, size: int, where: str) -> None:
    expected = data_start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if info.start != expected:
            kind = "overlaps the one before it" if info.start < expected else "leaves a gap before it"
            raise _broken("header-invalid", where, f"tensor {name!r} {kind}")
        expected = info.start + info.size
    if expected > size:
        raise _broken("header-truncated", where, f"the tensors end at byte {expected}, the file at {size}")
    if expected < size:
        raise _broken("header-invalid", where, f"{size - expected} bytes follow the last tensor")
