"""Tensors that are stored in one file, or in several that an index names."""

from __future__ import annotations

from lmoe_cli.checkpoint.header import Header
from lmoe_cli.checkpoint.index import INDEX_SUFFIX, MAX_INDEX_BYTES, Stored, gather, parse_index
from lmoe_cli.errors import NotFoundError
from lmoe_cli.source import Source, inside


def stored_tensors(source: Source, stem: str) -> dict[str, Stored] | None:
    """Read the headers of one file, or of all shards that an index names.

    Args:
        source: Where to look.
        stem: ``"model"`` or ``"adapter_model"``.

    Returns:
        Tensor name → where it is stored; None where there is no safetensors file of that stem.

    Raises:
        InvalidFileError: A header or the index is wrong.
        NotFoundError: A shard that the index names is missing.
    """
    single, index_name = f"{stem}.safetensors", stem + INDEX_SUFFIX
    if source.has(single):
        return gather({single: source.header(single)}, None, source.ref)
    if not source.has(index_name):
        return None
    index = parse_index(source.read(index_name, MAX_INDEX_BYTES), source.where(index_name))
    headers: dict[str, Header] = {}
    for file in sorted(set(index.values())):
        inside(file, source.where(index_name))
        if not source.has(file):
            hint = "the download is incomplete: fetch it again"
            message = f"{source.where(file)}: the index names it, but it is not there"
            raise NotFoundError("shard-missing", message, hint=hint, where=source.where(file))
        headers[file] = source.header(file)
    return gather(headers, index, source.ref)
