"""What a training config says, as typed values. Light: the JSON Schema is made from these models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os.path import normpath
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from lmoe_cli.disk import is_there
from lmoe_cli.errors import NotFoundError
from lmoe_cli.files import read_bytes
from lmoe_cli.loadout import text
from lmoe_cli.loadout.parse import parse_as
from lmoe_cli.loadout.recipe import ChatSettings, Entry, Name, SavedPolicy
from lmoe_cli.loadout.trained import GateSettings
from lmoe_cli.train.schedule import Stage, Trainer, settled

Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


LEAST_STRENGTH = 0.01
"""Weights that are next to nothing are left out of what is computed."""
FRESH = ("rank", "alpha", "rslora", "targets", "init")
"""What is said of fresh experts alone."""


class Data(Entry):
    """Files of conversations or texts, and which of it is held out."""

    train: str | list[str] = Field(min_length=1, description="JSONL with `messages` or `text` per line.")
    valid: str | list[str] | None = Field(None, description="Files that are held out.")
    fraction: Share | None = Field(
        None, description="Share that is held out where no file is named and no line says `split: valid`."
    )
    strength: float = Field(
        1.0, ge=-100, le=100, allow_inf_nan=False,
        description="Weight that an expert has while it learns from these files, in stages that train experts; not 0.",
    )  # fmt: skip
    repeat: int = Field(1, ge=1, le=1000, description="Times that each line which is learned from comes in a pass.")

    @model_validator(mode="after")
    def _teaches(self) -> Data:
        if self.valid is not None and self.fraction is not None:
            raise ValueError("'valid' names what is held out, so a 'fraction' would not be")
        if both := {normpath(name) for name in self.train_files} & {normpath(name) for name in self.valid_files}:
            raise ValueError(
                f"{min(both)} would be learned from and judged by: lines with 'split: valid' are held out by "
                "themselves, or a 'fraction' of them"
            )
        if abs(self.strength) < LEAST_STRENGTH:
            raise ValueError(f"an expert learns nothing at strength {self.strength:g}: at least {LEAST_STRENGTH:g}")
        return self

    @property
    def train_files(self) -> list[str]:
        return [self.train] if isinstance(self.train, str) else self.train

    @property
    def valid_files(self) -> list[str]:
        return [self.valid] if isinstance(self.valid, str) else self.valid or []


def _data_tag(value: Any) -> str:
    return "<several>" if isinstance(value, list) else "<file>" if isinstance(value, str) else "<data>"


OneData = Annotated[Annotated[str, Tag("<file>")] | Annotated[Data, Tag("<data>")], Discriminator(_data_tag)]
AnyData = Annotated[
    Annotated[str, Tag("<file>")]
    | Annotated[Data, Tag("<data>")]
    | Annotated[list[OneData], Field(min_length=1), Tag("<several>")],
    Discriminator(_data_tag),
]


def as_data(value: AnyData) -> list[Data]:
    """Data however it is written."""
    parts = value if isinstance(value, list) else [value]
    return [one if isinstance(one, Data) else Data(train=one) for one in parts]


def _targets_tag(value: Any) -> str:
    return "<names>" if isinstance(value, list) else "<word>"


Targets = Annotated[
    Annotated[Literal["all-linear", "attention", "mlp"], Tag("<word>")]
    | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1), Tag("<names>")],
    Discriminator(_targets_tag),
]


class TrainedExpert(Entry):
    """An expert to train: a fresh one, or an adapter to go on with."""

    adapter: str | None = Field(None, min_length=1, description="Begin with this one: a folder, the Hub, `demo:NAME`.")
    rank: int = Field(8, ge=1, le=4096, description="Of a fresh expert, on every module.")
    alpha: float | None = Field(None, gt=0, le=1e6, description="Of a fresh expert; twice the rank when left out.")
    rslora: bool = Field(False, description="Scale a fresh expert by alpha / sqrt(rank) rather than alpha / rank.")
    targets: Targets = Field(
        "all-linear", description="Modules of a fresh expert: a word, or the last parts of their names."
    )
    init: Literal["kaiming", "gaussian"] = Field(
        "kaiming", description="How A of a fresh expert begins; B begins at 0, so that it changes nothing."
    )
    data: AnyData | None = Field(None, description="What it is trained on.")
    weight: float = Field(1.0, ge=-100, le=100, description="In the recipe that comes out.")
    accept_base: list[str] = Field([], description="Bases that `adapter` may have been trained on, as in recipes.")
    description: str = Field("", max_length=2000, description="What it is for; goes into the recipe.")
    examples: list[str] = Field([], description="Prompts it is for; go into the recipe.")

    @model_validator(mode="after")
    def _is_fresh_or_not(self) -> TrainedExpert:
        own = [name for name in FRESH if getattr(self, name) != type(self).model_fields[name].default]
        if self.adapter is not None and own:
            raise ValueError(f"this expert begins with {self.adapter}, and only a fresh one has: {', '.join(own)}")
        if self.adapter is None and self.accept_base:
            raise ValueError("accept_base is for an adapter, and this expert begins with none")
        return self


class GateEntry(GateSettings):
    """The gate to train."""

    init: Literal["zero", "arrow"] = Field(
        "zero", description="Begin with equal scores, or with the direction that each expert amplifies most."
    )

    @property
    def settings(self) -> GateSettings:
        return GateSettings.model_validate(self.model_dump(exclude={"init"}))


class TrainConfig(Entry):
    """A base, experts to train on it, and the gate between them."""

    version: Literal[1] = 1
    name: str = Field("", max_length=100, pattern=r"^[^/\\\x00]*$")
    description: str = ""
    base: str = Field(min_length=1, description="`org/name[@revision]`, `hf://org/name`, a folder, or `demo:NAME`.")
    experts: dict[Name, TrainedExpert] = Field(min_length=1, max_length=256)
    data: AnyData | None = Field(None, description="For gate and joint stages; that of all experts when left out.")
    gate: GateEntry | None = None
    modules_to_save: SavedPolicy = Field(
        "refuse", description="What to do when several adapters bring whole modules of their own, as in recipes."
    )
    stages: list[Stage] = Field(min_length=1, max_length=100)
    trainer: Trainer = Trainer()
    chat: ChatSettings = ChatSettings()

    @property
    def references(self) -> list[str]:
        """The base and the adapters that are begun with."""
        return [self.base, *(expert.adapter for expert in self.experts.values() if expert.adapter)]

    def with_references(self, other: Mapping[str, str]) -> TrainConfig:
        """The same with other references for some of them."""
        experts = {
            name: expert.model_copy(update={"adapter": other.get(expert.adapter or "", expert.adapter)})
            for name, expert in self.experts.items()
        }
        return self.model_copy(update={"base": other.get(self.base, self.base), "experts": experts})

    @model_validator(mode="after")
    def _can_run(self) -> TrainConfig:
        kinds = [stage.train for stage in self.stages]
        if self.gate is None and {"gate", "joint"} & set(kinds):
            raise ValueError("a stage trains the gate, but 'gate' does not say which")
        if self.gate is not None and not {"gate", "joint"} & set(kinds):
            raise ValueError("there is a 'gate', but no stage that trains it")
        for own in (settled(stage, self.trainer) for stage in self.stages):
            if own.patience and own.eval_every and own.save_every and own.save_every != own.eval_every:
                raise ValueError(
                    f"with 'patience' the best evaluation is kept: save_every ({own.save_every}) must be eval_every "
                    f"({own.eval_every}), or be left out"
                )
        bare = [name for name, expert in self.experts.items() if expert.data is None]
        if bare and "experts" in kinds:
            raise ValueError(f"a stage trains experts, but {', '.join(bare)} has no data")
        if bare and self.data is None:
            raise ValueError(f"there is no 'data' for all, and {', '.join(bare)} has none of its own")
        self._require_plain_data("experts" in kinds)
        fresh = [name for name, expert in self.experts.items() if expert.adapter is None]
        if fresh and kinds[0] == "gate":
            raise ValueError(
                f"{', '.join(fresh)} is fresh and does nothing yet, so a gate has nothing to learn from it"
            )
        self._require_choice(kinds)
        return self

    def _require_choice(self, kinds: Sequence[str]) -> None:
        """Refuse a gate that has nothing to choose."""
        if self.gate is None:
            return
        count = len(self.experts) + self.gate.zero_expert
        if self.gate.top_k is not None and self.gate.top_k >= count > 1:
            raise ValueError(f"top_k {self.gate.top_k} leaves nothing to choose: there are {count} choices")
        if count == 1 and "gate" in kinds and self.gate.activation != "sigmoid":
            raise ValueError(
                f"over one expert '{self.gate.activation}' is always 1, so there is nothing to learn: "
                "'zero_expert: true' or 'activation: sigmoid'"
            )

    def _require_plain_data(self, trains_experts: bool) -> None:
        """Refuse data that would not be used as it says."""
        own = [as_data(expert.data) for expert in self.experts.values() if expert.data is not None]
        for_all = [] if self.data is None else as_data(self.data)
        idle = for_all if trains_experts else [*for_all, *(one for data in own for one in data)]
        if own and for_all and not trains_experts:
            raise ValueError(
                "no stage trains experts, and gates learn from 'data' for all: that of experts is not read"
            )
        if any(one.strength != 1 for one in idle):
            raise ValueError(
                "a strength is for data of an expert, in a stage that trains experts; gates find their own"
            )
        for data in [for_all, *own]:
            held_out: dict[str, tuple[Any, ...]] = {}
            for one in data:
                for file in map(normpath, one.train_files):
                    how = (one.fraction, *one.valid_files)
                    if held_out.setdefault(file, how) != how:
                        raise ValueError(f"{file} stands twice, and other lines of it are held out each time")


CODE = "train-config-invalid"


def read_config(path: Path) -> TrainConfig:
    """Read a training config.

    Raises:
        NotFoundError: It is not there.
        RefusedError: Not YAML, or not such a config. Every finding begins with ``file:line:column``. Exit code 2.
    """
    if not is_there(path):
        hint = "recipes/train-party.yaml is one to begin with"
        raise NotFoundError("not-found", f"{path}: no such training config", hint=hint, where=str(path))
    document = text.parse_yaml(read_bytes(path, text.MAX_BYTES), str(path))
    return parse_as(TrainConfig, document, CODE, "a training config")


def train_schema() -> dict[str, Any]:
    """The JSON Schema of training configs, draft-07."""
    from lmoe_cli.loadout.schema import schema_of

    return schema_of(TrainConfig, "lmoe training, version 1")
