"""A trained gate as it is stored: ``router.json`` and ``router.safetensors``, read without torch.

    router.json            {"format": "lmoe.router/1", "type": "gate", "settings": {…}, "experts": {name: hash},
                            "base": {"name", "fingerprint"}, "data": {file: SHA-256}, "metrics": {…}}
    router.safetensors     PLACE.weight (E, d) and PLACE.bias (E,), float32, rows in the order of "experts"; with a
                           zero expert one row more, the last

It binds to experts by name and content (see `weights_hash`), and to its base by the beginnings of its tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmoe_cli import hashes
from lmoe_cli.adapter.adapter import Adapter
from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.errors import InvalidFileError, NotFoundError
from lmoe_cli.findings import Finding, finding
from lmoe_cli.loadout.base import Base
from lmoe_cli.loadout.routers import Activation, GateRouter, Share
from lmoe_cli.shards import stored_tensors
from lmoe_cli.source import Source
from lmoe_cli.strict_json import parse_object

if TYPE_CHECKING:
    from lmoe_cli.loadout.loadout import Loadout

CONFIG = "router.json"
STEM = "router"
FORMAT = "lmoe.router/1"
MAX_CONFIG_BYTES = 1 << 20
BEGINNING = 4096
"""Bytes of each of the base's tensors that its fingerprint is made of."""


class GateSettings(BaseModel):
    """How a gate turns scores into gates, and what has a gate of its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    activation: Activation = Field("softmax", description="How scores become gates.")
    top_k: int | None = Field(None, ge=1, description="topk: experts that act on a token, at each site; 2 by default.")
    share: Share = Field("site", description="What has gates of its own: the whole model, each block, or each site.")
    temperature: float = Field(1.0, ge=1e-6, le=1e6, description="Divides the scores.")
    zero_expert: bool = Field(False, description="One more choice, which adds nothing to the base.")

    @model_validator(mode="after")
    def _fit_together(self) -> GateSettings:
        if self.top_k is not None and self.activation != "topk":
            raise ValueError(f"top_k goes with activation 'topk', not '{self.activation}'")
        if self.zero_expert and self.activation == "sigmoid":
            raise ValueError("a zero expert takes nothing from the others under activation 'sigmoid'")
        return self

    @property
    def kept(self) -> int | None:
        """Experts that act on a token; None for all."""
        return {"topk": self.top_k or 2, "hard1": 1}.get(self.activation)

    def changed_by(self, router: GateRouter) -> GateSettings:
        """The same with what a recipe sets otherwise.

        Raises:
            ValueError: The two do not go together.
        """
        changes = {name: value for name in ("activation", "top_k", "temperature") if (value := getattr(router, name))}
        own = self.model_dump() if changes.get("activation") in (None, "topk") else {**self.model_dump(), "top_k": None}
        return GateSettings.model_validate({**own, **changes})


class _BoundBase(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str
    fingerprint: str


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    format: str
    type: str
    settings: GateSettings
    experts: dict[str, str] = Field(min_length=1)
    base: _BoundBase
    data: dict[str, str] = {}
    metrics: dict[str, Any] = {}


@dataclass(frozen=True)
class TrainedGate:
    """What is known of a trained gate without reading a weight."""

    source: Source
    settings: GateSettings
    experts: Mapping[str, str]
    """Expert's name → its `weights_hash`, in the order of the gate's rows."""
    base: str
    """Fingerprint of the base; see `fingerprint`."""
    base_name: str
    data: Mapping[str, str]
    metrics: Mapping[str, Any]
    stored: Mapping[str, Stored]

    @cached_property
    def places(self) -> frozenset[str]:
        """Names of what has a gate of its own."""
        return frozenset(name.removesuffix(".weight") for name in self.stored if name.endswith(".weight"))

    @property
    def rows(self) -> int:
        """Rows of each weight: one per expert, and one for a zero expert."""
        return len(self.experts) + self.settings.zero_expert

    @property
    def files(self) -> tuple[str, ...]:
        return (CONFIG, *sorted({tensor.file for tensor in self.stored.values()}))


def read_gate(source: Source) -> TrainedGate:
    """Read a trained gate's settings and the header of its weights.

    Raises:
        NotFoundError: There is none.
        InvalidFileError: A file is damaged, or its tensors are not those of such a gate.
    """
    where = source.where(CONFIG)
    if not source.has(CONFIG):
        hint = "lmoe train writes one"
        raise NotFoundError("no-router", f"{source.ref}: there is no trained router here", hint=hint, where=source.ref)
    try:
        config = _Config.model_validate(parse_object(source.read(CONFIG, MAX_CONFIG_BYTES), where))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        message = f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InvalidFileError("router-invalid", message, where=where) from error
    if config.format != FORMAT or config.type != "gate":
        message = f"{where}: format {config.format!r} of type {config.type!r}"
        raise InvalidFileError(
            "router-invalid", message, hint=f"this version reads {FORMAT} of type 'gate'", where=where
        )
    stored = stored_tensors(source, STEM)
    if not stored:
        message = f"{source.ref}: no {STEM}.safetensors beside {CONFIG}"
        raise InvalidFileError("router-invalid", message, hint="its training was cut short", where=source.ref)
    base, experts = config.base, config.experts
    gate = TrainedGate(
        source, config.settings, experts, base.fingerprint, base.name, config.data, config.metrics, stored
    )
    _require_shapes(gate)
    return gate


def _require_shapes(gate: TrainedGate) -> None:
    for name, tensor in gate.stored.items():
        place, _, leaf = name.rpartition(".")
        due = {"weight": 2, "bias": 1}.get(leaf)
        fits = due == len(tensor.info.shape) and tensor.info.shape[0] == gate.rows and tensor.info.dtype == "F32"
        pair = {f"{place}.weight", f"{place}.bias"} <= gate.stored.keys()
        if not (fits and pair):
            where = gate.source.where(tensor.file)
            message = f"{where}: {name} {tensor.info.dtype} {tensor.info.shape} is not of a gate of {gate.rows} rows"
            raise InvalidFileError("router-invalid", message, hint="its weights and its config differ", where=where)


def fingerprint(base: Base) -> str | None:
    """SHA-256 over name, dtype, shape and first bytes of every tensor of a base; None while it is not here.

    It tells one base from another in milliseconds, not a damaged one from a whole one.
    """
    if any(base.source.local(name) is None for name in base.weight_files):
        return None
    digest = hashlib.sha256()
    for name, tensor in sorted(base.stored.items()):
        digest.update(f"{name} {tensor.info.dtype} {tensor.info.shape}\n".encode())
        if tensor.info.size:
            digest.update(base.beginning(tensor, BEGINNING))
    return digest.hexdigest()


def weights_hash(adapter: Adapter) -> str | None:
    """SHA-256 over an adapter's weights and what its config makes of them; None while they are not here.

    Of the config counts what it comes to: which modules tensors belong to, their scalings, and how many experts are
    stacked in them. Its layout, and keys that change no number, do not.
    """
    names = sorted({tensor.file for tensor in adapter.stored.values()})
    paths = [adapter.weights.local(name) for name in names]
    found = [hashes.sha256(path) for path in paths if path]
    if not found or len(found) < len(names):
        return None
    parts = sorted((part.module, part.scaling, part.experts) for part in adapter.parts.values())
    return hashlib.sha256(json.dumps([found, parts]).encode()).hexdigest()


def about_gate(loadout: Loadout, gate: TrainedGate) -> Iterator[Finding]:
    """Whether a trained gate is for these experts on this base, as far as what is on this machine tells."""
    where, names = gate.source.ref, [expert.name for expert in loadout.experts]
    if set(names) != set(gate.experts):
        message = f"{where}: trained for {', '.join(gate.experts)}; the recipe has {', '.join(names) or 'no expert'}"
        yield finding("router-experts-differ", where, message, "lmoe router grow and shrink change its experts")
    for expert in loadout.experts:
        found, due = weights_hash(expert.adapter), gate.experts.get(expert.name)
        if found and due is not None and found != due:
            message = f"{where}: trained for another '{expert.name}' than {expert.adapter.ref}"
            hint = "train the gate again, or name the adapter that it was trained with"
            yield finding("router-expert-changed", where, message, hint)
    found = fingerprint(loadout.base)
    if found and found != gate.base:
        message = f"{where}: trained on {gate.base_name}, and {loadout.base.ref} is another model"
        yield finding("router-base-differs", where, message, "name the base it was trained on")
    router = loadout.recipe.router
    if isinstance(router, GateRouter):
        try:
            gate.settings.changed_by(router)
        except ValidationError as error:
            message = f"{loadout.origin}: {error.errors(include_url=False)[0]['msg'].removeprefix('Value error, ')}"
            yield finding("router-settings", where, message)
