"""A base model as it is stored, read from headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from lmoe_cli.adapter.names import HEADS
from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.checkpoint.index import INDEX_SUFFIX, Stored
from lmoe_cli.errors import InvalidFileError, NotFoundError
from lmoe_cli.files import opened
from lmoe_cli.loadout.layout import Layout
from lmoe_cli.loadout.tokenizer import chat_template, read_settings
from lmoe_cli.shards import stored_tensors
from lmoe_cli.source import Source
from lmoe_cli.strict_json import parse_object

STEM = "model"
MAX_CONFIG_BYTES = 1 << 20
MAX_SIDE_BYTES = 256 << 20
"""Of a tokenizer, a licence and the like; the largest real ones have some tens of megabytes."""
GENERATION = "generation_config.json"
SIDE_FILES = (
    "config.json", "generation_config.json", "*processor_config.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer_config.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model",
    "*.model.v[0-9]*", "*.tiktoken", "tekken.json",
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "licen[cs]e*", "*[-_]licen[cs]e*", "copying*", "*notice*", "use_policy*",
)  # fmt: skip
"""What goes along with the weights of a model: patterns of names in lower case, folder by folder."""
TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken", "tekken.json")


@dataclass(frozen=True)
class Base:
    """What is known of a base model without reading a weight."""

    source: Source
    config: Mapping[str, Any]
    """Its ``config.json``."""
    stored: Mapping[str, Stored]
    """Its tensors by name."""
    dequantized_from: Mapping[str, Any] | None = None
    """The ``quantization_config`` of a base whose packed matrices are taken as what they stand for."""

    @property
    def ref(self) -> str:
        return self.source.ref

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.stored, self.text_config)

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The language part of a config that also describes other modalities."""
        inner = self.config.get("text_config")
        return {**self.config, **inner} if isinstance(inner, dict) else self.config

    @property
    def model_type(self) -> str:
        return str(self.text_config.get("model_type", ""))

    @property
    def architecture(self) -> str | None:
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else None

    @property
    def vocab_size(self) -> int | None:
        """Rows of the input embedding."""
        name = self.layout.embedding
        if name is not None and self.stored[name].info.shape:
            return self.stored[name].info.shape[0]
        return self._number("vocab_size")

    def _number(self, *names: str) -> int | None:
        """A whole number of the config, under the first of its names that there is."""
        found = next((self.text_config[name] for name in names if name in self.text_config), None)
        return found if isinstance(found, int) and not isinstance(found, bool) else None

    @property
    def layers(self) -> int | None:
        return self._number("num_hidden_layers", "n_layer", "num_layers")

    @property
    def hidden_size(self) -> int | None:
        return self._number("hidden_size", "n_embd", "d_model")

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the input embedding."""
        if self.config.get("tie_word_embeddings", self.text_config.get("tie_word_embeddings")) is True:
            return True
        return not any(self.layout.tensor(head) for head in HEADS)

    @property
    def quantization(self) -> str | None:
        """Method of a checkpoint that is stored quantised, such as ``bitsandbytes``."""
        settings = self.text_config.get("quantization_config")
        if not isinstance(settings, dict):
            return None
        by_bits = settings.get("load_in_4bit") or settings.get("load_in_8bit")  # as configs began
        return str(settings.get("quant_method", "bitsandbytes" if by_bits else "unknown"))

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(tensor.info.size for tensor in self.stored.values())

    @property
    def dtype(self) -> str | None:
        """The dtype that most of its weights have, as torch calls it."""
        sizes: dict[str, int] = {}
        for tensor in self.stored.values():
            sizes[tensor.info.dtype] = sizes.get(tensor.info.dtype, 0) + tensor.info.size
        most = max(sizes, key=lambda name: sizes[name], default="")
        return FLOATS.get(most, most.lower() or None)

    @property
    def runs_in(self) -> str | None:
        """The dtype it computes in: that of most of its weights, or where these are quantised that of its embedding."""
        embedding, is_packed = self.layout.embedding, self.quantization or self.dequantized_from is not None
        return FLOATS.get(self.stored[embedding].info.dtype) if is_packed and embedding else self.dtype

    @property
    def is_mixture(self) -> bool:
        """Whether tokens are sent to experts of the base's own."""
        return any(".experts." in name for name in self.stored)

    @property
    def weight_files(self) -> tuple[str, ...]:
        return tuple(sorted({file for tensor in self.stored.values() for file in tensor.files}))

    @property
    def side_files(self) -> tuple[str, ...]:
        """What belongs to it beside weights: configs, tokenizer, chat templates, licence, and code it asks to run."""
        patterns = (*SIDE_FILES, "*.py") if self._names_code else SIDE_FILES
        return tuple(sorted(name for name in self.source.sizes if any(_matches(name, one) for one in patterns)))

    @property
    def _names_code(self) -> bool:
        """Whether a config names code of its repository. Such code may import any file beside it."""
        return self.remote_code or bool(read_settings(self.source).get("auto_map"))

    @property
    def files(self) -> tuple[str, ...]:
        """What has to be fetched to run it."""
        index = STEM + INDEX_SUFFIX
        has_index = self.source.has(index) and f"{STEM}.safetensors" not in self.weight_files
        return (*self.side_files, *self.weight_files, *((index,) if has_index else ()))

    def beginning(self, tensor: Stored, limit: int) -> bytes:
        """The first bytes of a tensor, at most ``limit``. Its file is on this machine."""
        with opened(self.source.require(tensor.file)) as file:
            return os.pread(file.fileno(), min(limit, tensor.info.size), tensor.info.start)

    @property
    def has_tokenizer(self) -> bool:
        return any(_matches(name, pattern) for name in self.source.sizes for pattern in TOKENIZERS)

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja template of its conversations, where it has one."""
        return chat_template(self.source)

    @property
    def remote_code(self) -> bool:
        """Whether its config asks for code from its repository to be run."""
        return bool(self.config.get("auto_map"))


def _matches(name: str, pattern: str) -> bool:
    folder, _, file = name.lower().rpartition("/")
    wanted_folder, _, wanted = pattern.rpartition("/")
    return folder == wanted_folder and fnmatchcase(file, wanted)


def read_base(source: Source) -> Base:
    """Read a base model's config and the headers of its weights.

    Raises:
        NotFoundError: There is no model.
        InvalidFileError: A file is damaged, or the weights are in a format that lmoe does not read.
    """
    if not source.has("config.json"):
        is_adapter = source.has("adapter_config.json")
        hint = "this is an adapter: its base is named in its config" if is_adapter else "name a folder with config.json"
        raise NotFoundError("no-base", f"{source.ref}: there is no model here", hint=hint, where=source.ref)
    where = source.where("config.json")
    config = parse_object(source.read("config.json", MAX_CONFIG_BYTES), where, nonfinite=True)
    if not isinstance(config.get("model_type"), str):
        raise InvalidFileError("base-invalid", f"{where}: it names no model_type", where=where)
    if source.has(GENERATION):
        parse_object(source.read(GENERATION, MAX_CONFIG_BYTES), source.where(GENERATION), nonfinite=True)
    stored = stored_tensors(source, STEM)
    if not stored:
        pickled = any(name.startswith("pytorch_model") for name in source.sizes)
        hint = "save it as safetensors with transformers first" if pickled else "the download may be incomplete"
        message = f"{source.ref}: no model.safetensors and no index of shards"
        raise NotFoundError("base-weights-missing", message, hint=hint, where=source.ref)
    base = Base(source, config, stored)
    for name in base.side_files:
        if source.sizes[name] > MAX_SIDE_BYTES:
            message = f"{source.where(name)}: {source.sizes[name]:,} bytes, at most {MAX_SIDE_BYTES:,} are read"
            raise InvalidFileError("file-too-large", message, hint="it is damaged", where=source.where(name))
    return base


def summary(base: Base) -> dict[str, Any]:
    """What ``lmoe inspect base --json`` tells, under ``data``."""
    return {
        "ref": base.ref,
        "revision": base.source.revision,
        "path": str(base.source.path) if base.source.path else None,
        "model_type": base.model_type,
        "architecture": base.architecture,
        "layers": base.layers,
        "hidden_size": base.hidden_size,
        "vocab_size": base.vocab_size,
        "tied_embeddings": base.is_tied,
        "quantization": base.quantization,
        "tensors": len(base.stored),
        "parameters": sum(tensor.info.elements for tensor in base.stored.values()),
        "bytes": base.size,
        "dtype": base.dtype,
        "files": list(base.weight_files),
        "tokenizer": base.has_tokenizer,
        "chat_template": base.chat_template is not None,
        "remote_code": base.remote_code,
    }
