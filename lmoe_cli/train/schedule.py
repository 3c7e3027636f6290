"""How trainings and their stages go: passes, rates, batches, and what is not said of them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmoe_cli.loadout.recipe import Entry

Rate = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=0, le=1e4, allow_inf_nan=False)]
DEFAULTS: dict[str, Any] = {
    "epochs": 1.0,
    "learning_rate": 2e-4,
    "gate_learning_rate": 1e-3,
    "schedule": "cosine",
    "warmup": 0.05,
    "weight_decay": 0.0,
    "batch_size": 8,
    "accumulate": 1,
    "clip": 1.0,
}


IDLE = {
    "experts": ("balance", "z", "gate_learning_rate"),
    "gate": ("together", "learning_rate"),
    "joint": ("together",),
}
"""What a stage trains → what has no meaning for it."""


class Schedule(Entry):
    """How a stage trains. What a stage leaves out is as the config's ``trainer`` says."""

    epochs: float | None = Field(None, gt=0, le=10_000, description="Passes over the data; 1 when nothing is said.")
    steps: int | None = Field(None, ge=1, description="Steps of the optimiser, instead of epochs.")
    learning_rate: Rate | None = Field(None, description="Of experts, at its peak; 2e-4 when nothing is said.")
    gate_learning_rate: Rate | None = Field(None, description="Of the gate, at its peak; 1e-3 when nothing is said.")
    schedule: Literal["cosine", "linear", "constant"] | None = Field(None, description="After warming up; cosine.")
    warmup: Annotated[float, Field(ge=0, lt=1)] | None = Field(None, description="Share of steps that warm up; 0.05.")
    weight_decay: Factor | None = Field(None, description="Of AdamW; 0.")
    batch_size: int | None = Field(None, ge=1, le=65_536, description="Rows per step and process; 8.")
    accumulate: int | None = Field(None, ge=1, le=65_536, description="Batches per step of the optimiser; 1.")
    clip: Factor | None = Field(None, description="Longest gradient; 0 does not clip. 1.")
    eval_every: int | None = Field(None, ge=1, description="Steps between evaluations; each epoch when left out.")
    save_every: int | None = Field(
        None, ge=1, description="Steps between checkpoints; as evaluations, which with `patience` follow this too."
    )
    patience: int | None = Field(None, ge=1, description="Evaluations without improvement before a stage ends.")

    @model_validator(mode="after")
    def _ends_once(self) -> Schedule:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("'epochs' and 'steps' both say when it ends: leave one out")
        return self


class Trainer(Schedule):
    """How all stages train."""

    seed: int = Field(0, ge=0, lt=1 << 31, description="Of everything that is random.")
    max_length: int = Field(1024, ge=8, le=1 << 20, description="Longest row, in tokens.")
    too_long: Literal["truncate", "skip", "error"] = Field("truncate", description="What happens to longer examples.")
    packing: bool = Field(False, description="Several examples in a row, none of which sees another.")
    precision: Literal["float32", "bfloat16"] | None = Field(
        None, description="Of the base; as it is stored when left out. Experts and gate are trained in float32."
    )
    checkpointing: bool = Field(False, description="Compute activations twice rather than keep them.")
    shard: bool = Field(False, description="Spread the base over all processes (FSDP2).")
    keep: int = Field(2, ge=1, le=1000, description="Checkpoints that are kept.")
    log_every: int = Field(10, ge=1, description="Steps between lines of the log on the screen.")
    tensorboard: bool = Field(False, description="Also log for TensorBoard, with the extra `lmoe-cli[tensorboard]`.")


class Stage(Schedule):
    """One stage of the training."""

    train: Literal["experts", "gate", "joint"] = Field(
        description="`experts`, each on its own data; the `gate`, with experts frozen; or both, end to end (`joint`)."
    )
    together: bool = Field(False, description="experts: in one pass over a mixed batch, rather than one by one.")
    balance: Factor = Field(0.01, description="Weight of the loss that keeps experts evenly used.")
    z: Factor = Field(0.001, description="Weight of the loss that keeps scores small.")

    @model_validator(mode="after")
    def _says_what_counts(self) -> Stage:
        idle = IDLE[self.train]
        if own := [name for name in idle if getattr(self, name) != type(self).model_fields[name].default]:
            raise ValueError(f"a stage that trains {self.train} has no: {', '.join(own)}")
        return self


def settled(stage: Stage, trainer: Trainer) -> Schedule:
    """How a stage trains, with everything said. Its own word on when it ends counts, be it in epochs or in steps."""
    said = next((one for one in (stage, trainer) if one.epochs or one.steps), None)
    ends = {"epochs": said.epochs, "steps": said.steps} if said else {}
    found: dict[str, Any] = {}
    for name in Schedule.model_fields:
        value = getattr(stage, name)
        value = getattr(trainer, name) if value is None else value
        found[name] = DEFAULTS.get(name) if value is None else value
    return Schedule.model_validate(found | ends)
