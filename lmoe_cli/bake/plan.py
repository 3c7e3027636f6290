"""Which tensors a bake writes into which files, and what each is made of. Known before a weight is read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lmoe_cli.adapter.names import HEAD, HEAD_OF, HEADS
from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.checkpoint.packed import Packed
from lmoe_cli.checkpoint.writer import Shape
from lmoe_cli.errors import LmoeError, UsageError
from lmoe_cli.findings import RefusedError, finding
from lmoe_cli.loadout.base import STEM, Base
from lmoe_cli.loadout.dequantized import METHOD, written_dtype
from lmoe_cli.loadout.layout import Target
from lmoe_cli.loadout.loadout import Loadout

SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kKmMgG]?)i?[bB]?\Z")
STORED_AS = {name: dtype for dtype, name in FLOATS.items()}
TIED = f"{HEAD}.weight"
"""What a head is called here that has no tensor of its own."""


@dataclass(frozen=True)
class Output:
    """One tensor to be written."""

    name: str
    source: Stored
    """The base's tensor it starts from."""
    shape: Shape
    targets: tuple[Target, ...] = ()
    """Matrices in it that experts change; more than one where experts of a mixture are fused."""
    bias_of: Target | None = None
    """The matrix whose bias this is, where experts change that."""

    @property
    def is_copy(self) -> bool:
        """Whether the base's bytes can be copied as they are."""
        if isinstance(self.source, Packed):
            return False
        return not self.targets and self.bias_of is None and self.shape.dtype == self.source.info.dtype


@dataclass(frozen=True)
class Plan:
    """Everything a bake writes."""

    files: Mapping[str, tuple[Output, ...]]
    """File name → its tensors, in order."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Changes of ``config.json``."""

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(output.shape.size for outputs in self.files.values() for output in outputs)

    @property
    def index(self) -> dict[str, Any] | None:
        """Content of ``model.safetensors.index.json``; None for a single file."""
        if len(self.files) == 1:
            return None
        where = {output.name: file for file, outputs in self.files.items() for output in outputs}
        return {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(where.items()))}


def make_plan(loadout: Loadout, dtype: str | None = None, shard_size: int | None = None) -> Plan:
    """Lay out the tensors of a baked model.

    Args:
        loadout: Checked; its headers are known.
        dtype: Of every floating-point tensor. When None, that of each in the base, and one of 16 bits for all where the
            base is taken as dequantised.
        shard_size: Most bytes in a file; as the base when None.

    Raises:
        RefusedError: The base is quantised, or the blend needs a bias where the base has none.
    """
    base = loadout.base
    _refuse(loadout)
    dtype = dtype or written_dtype(base)
    outputs = _outputs(loadout, dtype)
    config: dict[str, Any] = {}
    if base.is_tied and any(output.targets and _is_tied(base, output) for output in outputs):
        config["tie_word_embeddings"] = False
    if dtype:
        config["dtype"] = dtype
    return Plan(_as_base(outputs) if shard_size is None else _sharded(outputs, shard_size), config)


def _is_tied(base: Base, output: Output) -> bool:
    """Whether a tensor is the embedding or the head of a base that ties them."""
    module = output.name.removesuffix(".weight").rpartition(".")[2]
    return output.source.name == base.layout.embedding or module in HEADS


def _refuse(loadout: Loadout) -> None:
    base = loadout.base
    found = []
    if base.quantization or any(target.packed for target in loadout.by_target):
        hint = "bake onto the original weights: name the unquantised model as base"
        if base.quantization == METHOD:
            hint = (
                "'--base-weights dequantized' bakes what these weights stand for, "
                "'--base-weights original --original REF' the model they were made from"
            )
        message = f"{base.ref}: stored quantised ({base.quantization}), so a blend cannot be written into it"
        found.append(finding("bake-quantized", base.ref, message, hint))
    for target, items in loadout.by_target.items():
        roles = {role for _, item in items for role in item.part.tensors}
        if roles & {"lora_B_bias", "saved_bias"} and bias_name(base, target) is None:
            message = f"{target.module} has no bias in the base, and experts give it one"
            hint = "ordinary weights of this architecture cannot hold it; run it live instead"
            found.append(finding("bias-unbakeable", target.module, message, hint))
            break
    if found:
        raise RefusedError(f"{loadout.origin}: cannot be baked", found)


def bias_name(base: Base, target: Target) -> str | None:
    """The stored name of the bias that goes with a matrix, where the base has one."""
    name = f"{target.tensor.removesuffix('.weight')}.bias"
    return name if name in base.stored and target.index is None else None


def _outputs(loadout: Loadout, dtype: str | None) -> list[Output]:
    """Every tensor, in the order of the base's files."""
    base = loadout.base
    changed: dict[str, list[Target]] = {}
    biases: dict[str, Target] = {}
    for target, items in loadout.by_target.items():
        changed.setdefault(TIED if target.tied else target.tensor, []).append(target)
        roles = {role for _, item in items for role in item.part.tensors}
        if roles & {"lora_B_bias", "saved_bias", "ia3"} and (bias := bias_name(base, target)):
            biases[bias] = target
    found: list[Output] = []
    for stored in sorted(base.stored.values(), key=lambda item: (item.file, item.info.start)):
        targets = tuple(changed.get(stored.name, ()))
        shape = Shape(_dtype(stored, dtype), stored.info.shape)
        found.append(Output(stored.name, stored, shape, targets, biases.get(stored.name)))
        if stored.name == base.layout.embedding:
            found += _untied_head(base, stored, shape, changed, is_changed=bool(targets))
    _require_reached(loadout, found)
    return found


def _require_reached(loadout: Loadout, outputs: list[Output]) -> None:
    """Every matrix that experts change is written, each with all that changes it.

    Raises:
        LmoeError: One would be left out, which is a bug.
    """
    reached = {target for output in outputs for target in (*output.targets, output.bias_of) if target}
    lost = set(loadout.by_target) - reached
    for output in outputs:
        if len(output.targets) > 1 and any(target.index is None for target in output.targets):
            lost |= set(output.targets)
    if lost:
        first = min(lost, key=lambda target: target.module)
        message = f"{first.module}: what experts do to it would be left out"
        raise LmoeError("tensor-dropped", message, hint="report this as a bug", where=first.module)


def _untied_head(
    base: Base, embedding: Stored, shape: Shape, changed: Mapping[str, list[Target]], *, is_changed: bool
) -> Iterable[Output]:
    """The output head, where it was the embedding and the two now differ."""
    name = f"{HEAD_OF.get(base.model_type, HEAD)}.weight"
    targets = tuple(changed.get(TIED, ()))
    if name not in base.stored and base.is_tied and (is_changed or targets):
        yield Output(name, embedding, shape, targets)


def _dtype(stored: Stored, dtype: str | None) -> str:
    return STORED_AS[dtype] if dtype and stored.info.dtype in FLOATS else stored.info.dtype


def _as_base(outputs: list[Output]) -> dict[str, tuple[Output, ...]]:
    files: dict[str, list[Output]] = {}
    for output in outputs:
        files.setdefault(output.source.file, []).append(output)
    if len(files) == 1:  # a single file has no index, and is found by its name alone
        return {f"{STEM}.safetensors": tuple(outputs)}
    return {file: tuple(files[file]) for file in sorted(files)}


def _sharded(outputs: list[Output], shard_size: int) -> dict[str, tuple[Output, ...]]:
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.shape.size > shard_size:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.shape.size
    if len(shards) == 1:
        return {f"{STEM}.safetensors": tuple(shards[0])}
    total = len(shards)
    return {
        f"{STEM}-{number:05d}-of-{total:05d}.safetensors": tuple(shard) for number, shard in enumerate(shards, start=1)
    }


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB`` or ``500MB``.

    Raises:
        UsageError: It is none, or less than a megabyte.
    """
    match = SIZE.match(text.strip())
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
    size = int(float(match[1]) * scale[match[2].lower()]) if match else 0
    if size < 10**6:
        raise UsageError("size-invalid", f"'{text}' is not a size of at least 1MB", hint="such as 5GB")
    return size


def config_text(base: Base, changes: Mapping[str, Any]) -> bytes:
    """The base's ``config.json`` with changes, as JSON."""
    config = dict(base.config)
    inner = config.get("text_config")
    for key, value in changes.items():
        config[_spelled(key, config)] = value
        if isinstance(inner, dict) and (name := _spelled(key, inner)) in inner:
            config["text_config"] = inner = {**inner, name: value}
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"


def _spelled(key: str, config: Mapping[str, Any]) -> str:
    """A key as a config calls it: transformers renamed one."""
    return "torch_dtype" if key == "dtype" and "torch_dtype" in config else key
