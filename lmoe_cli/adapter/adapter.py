"""An adapter as it is stored, read from headers alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from lmoe_cli.adapter.config import (
    CONFIG,
    MAX_CONFIG_BYTES,
    SUPPORTED,
    AdapterConfig,
    ForeignAdapterError,
    parse_config,
)
from lmoe_cli.adapter.contents import Part, parts
from lmoe_cli.adapter.converted import converted_folder
from lmoe_cli.checkpoint.index import INDEX_SUFFIX, Stored
from lmoe_cli.errors import InvalidFileError, NotFoundError
from lmoe_cli.findings import Finding, finding, from_error
from lmoe_cli.shards import stored_tensors
from lmoe_cli.source import Folder, Source

STEM = "adapter_model"
PICKLE = "adapter_model.bin"
FOREIGN_WEIGHTS = ("adapters.safetensors",)


@dataclass(frozen=True)
class Adapter:
    """What is known of an adapter without reading a weight."""

    source: Source
    config: AdapterConfig | None
    """None where there is none, or it is not PEFT's."""
    weights: Source
    """Where the weight files are: ``source``, or the folder a pickle was converted into."""
    stored: Mapping[str, Stored]
    """Every tensor by name; empty where the weights are pickled."""
    parts: Mapping[str, Part]
    """What it holds per module; empty where its PEFT type is not supported."""
    shared: Mapping[str, Stored]
    """Tensors that all parts share."""
    format: str
    """``safetensors``, ``pickle`` or ``none``."""
    files: tuple[str, ...]
    """What has to be fetched from ``source`` to run it."""
    findings: tuple[Finding, ...] = ()
    """What keeps lmoe from running it (errors), and what its user should know."""

    @property
    def ref(self) -> str:
        return self.source.ref

    @property
    def is_supported(self) -> bool:
        return bool(self.parts) and not any(item.severity == "error" for item in self.findings)

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(tensor.info.size for tensor in self.stored.values()) or self.source.sizes.get(PICKLE, 0)


def read_adapter(source: Source) -> Adapter:
    """Read an adapter's config and the headers of its weights.

    Args:
        source: A folder or repository.

    Returns:
        What it is, with what `soundness.soundness` has to say still to be added.

    Raises:
        NotFoundError: There is no adapter.
        InvalidFileError: A file is damaged, or its tensors cannot be accounted for.
    """
    findings: list[Finding] = []
    config = _read_config(source, findings)
    weights, stored, weights_format, names = _read_weights(source)
    if config is None and weights_format == "none" and not findings:
        raise _nothing_here(source)
    made: dict[str, Part] = {}
    shared: dict[str, Stored] = {}
    if config and config.peft_type in SUPPORTED and weights_format == "safetensors":
        if not stored:
            hint = "it may have been saved from a sharded model without gathering"
            raise InvalidFileError("no-tensors", f"{source.ref}: no tensor in its weights", hint=hint, where=source.ref)
        with _tolerated(config):
            made, shared = parts(stored, config, source.ref)
    files = (CONFIG, *names) if source.has(CONFIG) else names
    return Adapter(source, config, weights, stored, made, shared, weights_format, files, tuple(findings))


@contextlib.contextmanager
def _tolerated(config: AdapterConfig) -> Iterator[None]:
    """Let tensors pass that belong to a setting which is refused by name anyway."""
    try:
        yield
    except InvalidFileError:
        if not config.unsupported:
            raise


def with_findings(adapter: Adapter, findings: list[Finding]) -> Adapter:
    """The same adapter with more findings about it."""
    return replace(adapter, findings=(*adapter.findings, *findings))


def _read_config(source: Source, findings: list[Finding]) -> AdapterConfig | None:
    if not source.has(CONFIG):
        if any(source.has(name) for name in (f"{STEM}.safetensors", PICKLE, STEM + INDEX_SUFFIX, *FOREIGN_WEIGHTS)):
            hint = "without it nobody knows alpha: get adapter_config.json from the author"
            findings.append(finding("config-missing", source.ref, f"{source.ref}: there is no {CONFIG}", hint))
        return None
    try:
        return parse_config(source.read(CONFIG, MAX_CONFIG_BYTES), source.where(CONFIG))
    except ForeignAdapterError as error:
        findings.append(from_error(error))
        return None


def _read_weights(source: Source) -> tuple[Source, Mapping[str, Stored], str, tuple[str, ...]]:
    """Where the weights are, their tensors, their format, and the files to fetch."""
    stored = stored_tensors(source, STEM)
    if stored is not None:
        index = STEM + INDEX_SUFFIX
        shards = tuple(sorted({tensor.file for tensor in stored.values()})) or (f"{STEM}.safetensors",)
        names = (*shards, index) if f"{STEM}.safetensors" not in shards else shards
        return source, stored, "safetensors", names
    if source.has(PICKLE):
        local = source.local(PICKLE)
        folder = converted_folder(local) if local else None
        if folder is None or not folder.is_dir():
            return source, {}, "pickle", (PICKLE,)
        weights = Folder(source.ref, folder)
        return weights, stored_tensors(weights, STEM) or {}, "safetensors", (PICKLE,)
    for name in FOREIGN_WEIGHTS:
        if source.has(name):
            tensors = source.header(name).tensors
            return source, {key: Stored(key, name, info) for key, info in tensors.items()}, "safetensors", (name,)
    return source, {}, "none", ()


def _nothing_here(source: Source) -> NotFoundError:
    inner = sorted(name for name in source.sizes if name.endswith("/" + CONFIG) and name.isprintable())
    hint = "name a folder with adapter_config.json and adapter_model.safetensors"
    if inner:
        hint = f"there is one in {inner[0].removesuffix('/' + CONFIG)}: name that folder"
    elif any(name.endswith(".gguf") for name in source.sizes):
        hint = "GGUF files are llama.cpp's and ollama's: lmoe reads PEFT adapters"
    elif source.has("config.json"):
        hint = f"this is a whole model: lmoe inspect base {source.ref}"
    return NotFoundError("no-adapter", f"{source.ref}: there is no adapter here", hint=hint, where=source.ref)
