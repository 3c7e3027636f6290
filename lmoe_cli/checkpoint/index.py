"""Which file of a sharded checkpoint holds which tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lmoe_cli.checkpoint.header import Header, TensorInfo
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.strict_json import parse_object

MAX_INDEX_BYTES = 64 << 20
INDEX_SUFFIX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor and the file it is in."""

    name: str
    file: str
    info: TensorInfo

    @property
    def files(self) -> frozenset[str]:
        """All files that are needed to read it."""
        return frozenset((self.file,))


def parse_index(data: bytes, where: str) -> Mapping[str, str]:
    """Read a ``*.safetensors.index.json``.

    Returns:
        Tensor name → file name, as written.

    Raises:
        InvalidFileError: Not an index.
    """
    weight_map = parse_object(data, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidFileError("index-invalid", f"{where}: no weight_map", where=where)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            message = f"{where}: {name!r} is said to be in {str(file)[:80]!r}, which is no safetensors file"
            raise InvalidFileError("index-invalid", message, where=where)
    return weight_map


def gather(headers: Mapping[str, Header], index: Mapping[str, str] | None, where: str) -> dict[str, Stored]:
    """Join the headers of all shards into one table by tensor name.

    Args:
        headers: File name → header.
        index: What `parse_index` gave, to be checked against the headers; None for a single file.
        where: Name of the checkpoint, for messages.

    Raises:
        InvalidFileError: A tensor stands in two files, or not where the index says.
    """
    found: dict[str, Stored] = {}
    for file, header in headers.items():
        for name, info in header.tensors.items():
            if name in found:
                message = f"{where}: tensor {name!r} stands in {found[name].file} and in {file}"
                raise InvalidFileError("index-invalid", message, where=where)
            found[name] = Stored(name, file, info)
    for name, file in (index or {}).items():
        if name not in found or found[name].file != file:
            hint = "the download is incomplete or mixed: fetch it again"
            message = f"{where}: the index puts {name!r} into {file}, which does not hold it"
            raise InvalidFileError("index-invalid", message, hint=hint, where=where)
    return found
