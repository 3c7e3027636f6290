"""Turn pickled weights into safetensors without running what else a pickle may hold.

A pickle is a program. Before torch sees it, its instructions are read, not run, and compared with the few that a
mapping of tensors needs; then torch reads it with ``weights_only=True``. Archives that would unpack to more than they
are, and tensors that would grow when they are written, are refused, so that time and memory are bounded by the file.
"""

from __future__ import annotations

import os
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmoe_cli import files
from lmoe_cli.checkpoint.header import lfs_pointer
from lmoe_cli.checkpoint.raw import raw
from lmoe_cli.checkpoint.writer import Shape, ShardWriter
from lmoe_cli.errors import InvalidFileError

if TYPE_CHECKING:
    from torch import Tensor

MAX_PROGRAM_BYTES = 8 << 20
MAX_ENTRIES = 100_000
MAX_GROWTH = 4
"""Tensors that share memory are written one by one; more than this many times the pickle is no honest adapter."""

GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(
        f"torch {kind}Storage"
        for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
    ),
}
"""All that a mapping of tensors names."""

INSTRUCTIONS = {
    "PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "BUILD", "BINPERSID", "NONE", "NEWTRUE", "NEWFALSE",
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET",
}  # fmt: skip
"""What torch writes. None of them calls anything but `GLOBALS`."""


def convert(pickle: Path, folder: Path, name: str) -> None:
    """Write the tensors of a pickle as a safetensors file.

    Args:
        pickle: What ``torch.save`` wrote of a mapping from names to tensors.
        folder: Made, with the file in it, or left as it was.
        name: Of the file.

    Raises:
        InvalidFileError: The pickle is damaged, or holds something else than tensors.
        ResourceError: The disk is full.
    """
    scan(pickle)
    tensors = _load(pickle)
    shapes = {key: _shape(key, tensor, pickle) for key, tensor in tensors.items()}
    if sum(shape.size for shape in shapes.values()) > MAX_GROWTH * pickle.stat().st_size:
        raise _refused(pickle, "its tensors would be many times as large as the file")
    files.require_space(folder, sum(shape.size for shape in shapes.values()))
    with files.new_folder(folder) as partial, ShardWriter(partial / name, shapes, {"format": "pt"}) as writer:
        for tensor in tensors.values():
            writer.write(_bytes(tensor))


def scan(pickle: Path) -> None:
    """Read a pickle's instructions without running one.

    Raises:
        InvalidFileError: One of them is not needed for tensors, or the archive around them is not what torch writes.
    """
    program = _program(pickle)
    try:
        for instruction, argument, _ in pickletools.genops(program):
            if instruction.name not in INSTRUCTIONS:
                raise _refused(pickle, f"it holds the instruction {instruction.name}")
            if instruction.name == "GLOBAL" and argument not in GLOBALS:
                raise _refused(pickle, f"it names {str(argument).replace(' ', '.')[:80]!r}")
    except (ValueError, OverflowError) as error:
        raise _refused(pickle, f"it cannot be read as a pickle: {error}") from error


def _program(pickle: Path) -> bytes:
    """The instructions inside the archive."""
    with files.reading(pickle), pickle.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            with zipfile.ZipFile(file) as archive:
                return _only_program(archive, size, pickle)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OSError) as error:
            file.seek(0)
            start = file.read(8)
            if start == b"version ":
                raise lfs_pointer(str(pickle)) from error
            is_old = start.startswith(b"\x80")
            reason = "it is in the format of torch before 1.6, or not of torch" if is_old else f"{error}"
            raise _refused(pickle, reason) from error


def _only_program(archive: zipfile.ZipFile, size: int, pickle: Path) -> bytes:
    entries = archive.infolist()
    programs = [entry for entry in entries if entry.filename.endswith(".pkl")]
    if len(programs) != 1 or programs[0].filename.count("/") != 1:
        raise _refused(pickle, "it is an archive, but not one of tensors")
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1 for entry in entries):
        raise _refused(pickle, "it is compressed or encrypted, which torch never does")
    if len({entry.filename for entry in entries}) < len(entries) or len(entries) > MAX_ENTRIES:
        raise _refused(pickle, "its archive names a file twice, or too many files")
    if sum(entry.file_size for entry in entries) > size:
        raise _refused(pickle, "its archive would unpack to more than it is")
    if programs[0].file_size > MAX_PROGRAM_BYTES:
        raise _refused(pickle, f"its instructions are {programs[0].file_size} bytes long")
    return archive.read(programs[0])


def _load(pickle: Path) -> Mapping[str, Tensor]:
    import torch

    try:
        loaded: Any = torch.load(pickle, map_location="cpu", weights_only=True, mmap=True)  # noqa: TID251
    except MemoryError:
        raise
    except Exception as error:  # a dozen kinds, all of which mean that the file is damaged
        raise _refused(pickle, f"torch cannot read it: {' '.join(str(error).split())[:120]}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise _refused(pickle, "it holds no mapping of tensors")
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise _refused(pickle, f"{str(key)[:80]!r} is no named tensor")
    return loaded


def _shape(name: str, tensor: Tensor, pickle: Path) -> Shape:
    import torch

    dtypes = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
        torch.uint8: "U8", torch.bool: "BOOL",
    }  # fmt: skip
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in dtypes:
        raise _refused(pickle, f"{name[:80]!r} is a {tensor.layout} tensor of {tensor.dtype} on {tensor.device}")
    shape = Shape(dtypes[tensor.dtype], tuple(tensor.shape))
    if shape.size > tensor.untyped_storage().nbytes():
        raise _refused(pickle, f"{name[:80]!r} is said to be larger than what is stored of it")
    return shape


def _bytes(tensor: Tensor) -> memoryview:

    flat = tensor.detach().contiguous().reshape(-1)
    return raw(flat)


def _refused(pickle: Path, reason: str) -> InvalidFileError:
    hint = "do not open it with anything else; ask its author for safetensors"
    return InvalidFileError("pickle-refused", f"{pickle}: {reason}", hint=hint, where=str(pickle))
