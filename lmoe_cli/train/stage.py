"""One run of the optimiser: a base with experts and perhaps a gate on it, data, and a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lmoe_cli.bank.bank import Bank, build_bank
from lmoe_cli.bank.blocks import block_names
from lmoe_cli.engine.attach import attach, listen
from lmoe_cli.engine.base_model import load_model, quietly
from lmoe_cli.engine.device import DTYPES, choose_dtype
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.loadout.trained import TrainedGate
from lmoe_cli.router.arrow import directions
from lmoe_cli.router.gate import Gate, read_gates
from lmoe_cli.train.checkpoints import Seal
from lmoe_cli.train.config import GateEntry, TrainConfig, as_data
from lmoe_cli.train.schedule import Schedule, Stage, Trainer, settled
from lmoe_cli.train.trainable import TrainedSite, make_trainable, require_plain
from lmoe_cli.train.trainee import Trainee

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""Our words → those of transformers."""


@dataclass(frozen=True)
class Run:
    """What is trained in one go."""

    name: str
    """Of its folder."""
    stage: Stage
    schedule: Schedule
    experts: tuple[str, ...]


def runs_of(config: TrainConfig) -> list[Run]:
    """The runs of all stages in their order: one of each, or one per expert."""
    names, found = tuple(config.experts), []
    for number, stage in enumerate(config.stages, 1):
        schedule, title = settled(stage, config.trainer), f"stage-{number}-{stage.train}"
        if stage.train != "experts" or stage.together:
            found.append(Run(title, stage, schedule, names))
        else:
            found += [Run(f"{title}-{name}", stage, schedule, (name,)) for name in names]
    return found


@dataclass(frozen=True)
class Assembly:
    """A base on a device, with what is trained on it."""

    model: nn.Module
    trainee: Trainee
    bank: Bank
    sites: Sequence[TrainedSite]
    gates: Mapping[str, Gate]


def assemble(
    loadout: Loadout,
    run: Run,
    config: TrainConfig,
    device: torch.device,
    trained: TrainedGate | None,
    *,
    trust_remote_code: bool = False,
) -> Assembly:
    """Load the base and put the run's experts and gate onto it.

    Args:
        loadout: Of the run's experts.
        run: What is trained.
        config: Of the whole training.
        device: Where.
        trained: The gate of an earlier stage.
        trust_remote_code: Let the base run code of its repository.

    Raises:
        UsageError: The experts are of a kind that is not trained, or the base of one that is not spread.
    """
    trains_experts, has_gate = run.stage.train != "gate", run.stage.train != "experts"
    if trains_experts:
        require_plain(loadout)
    precision = config.trainer.precision
    wanted = "float32" if precision is None and loadout.base.runs_in == "float16" else precision
    dtype = choose_dtype(wanted, loadout.base.runs_in, loadout.base.size, device)
    shards = config.trainer.shard
    if shards and (method := loadout.base.quantization):
        message = f"{loadout.base.ref}: weights quantised by {method} are not spread over processes"
        hint = "leave 'shard' out, or train on the base as it was before"
        raise UsageError("shard-quantized", message, hint=hint, where=loadout.base.ref)
    loadout.fetch()
    place = torch.device("cpu") if shards else device
    model = load_model(loadout.base, dtype=dtype, device=place, trust_remote_code=trust_remote_code)
    if shards:
        shard(model, device)
    entry = config.gate
    bank = build_bank(model, loadout, DTYPES["float32"], entry.share if entry and has_gate else None)
    bank.gates.set([1.0] * len(loadout.experts))
    sites = make_trainable(model, bank, loadout) if trains_experts else []
    gates = _gates(loadout, bank, entry, trained, device) if entry and has_gate else {}
    for name, gate in gates.items():
        bank.places[name].gates.route = gate
    attach(model, bank.modules)
    listen(model, bank.places)
    if config.trainer.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    factors = {name: own for site in sites for name, own in site.parameters.items()}
    sends = not has_gate and (len(loadout.experts) > 1 or _has_strengths(config, run))
    trainee = Trainee(model, bank.gates, factors, gates, sends=sends)
    _spare_the_base(trainee)
    return Assembly(model, trainee, bank, sites, gates)


def _has_strengths(config: TrainConfig, run: Run) -> bool:
    """Whether an expert learns at another weight than 1."""
    data = [config.experts[name].data for name in run.experts]
    return any(one.strength != 1 for told in data if told is not None for one in as_data(told))


def _gates(
    loadout: Loadout, bank: Bank, entry: GateEntry, trained: TrainedGate | None, device: torch.device
) -> Mapping[str, Gate]:
    if trained is not None:
        order = [expert.name for expert in loadout.experts]
        found = read_gates(trained, entry.settings, bank.places.values(), order, device)
        for gate in found.values():
            gate.requires_grad_()
        return found
    return {name: _fresh_gate(place, entry, len(loadout.experts)).to(device) for name, place in bank.places.items()}


def _fresh_gate(place: Any, entry: GateEntry, count: int) -> Gate:
    gate = Gate(place.width, count, entry.settings)
    if entry.init == "arrow":
        with torch.no_grad():
            gate.weight[:count] = directions(place, count)
    return gate


def _spare_the_base(trainee: Trainee) -> None:
    """Data-parallel processes load the same base: it is not sent around."""
    base = [name for name, _ in trainee.named_parameters() if name.startswith("base.")]
    base += [name for name, _ in trainee.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(trainee, base)  # type: ignore[no-untyped-call]


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread the base's weights over the devices of all processes, each gathered while it is computed with.

    Args:
        model: The base in main memory, mapped from its files where it is stored as it is trained. A device is given one
            block of it after the other, and keeps its share.
        device: Of this process.
    """
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (get_world_size(),))
    for name in block_names(model):
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)


def require_held_out(run: Run, held_out: bool) -> None:
    """Refuse patience where nothing can be judged by.

    Raises:
        UsageError: That is so.
    """
    if run.schedule.patience and not held_out:
        message = f"{run.name}: 'patience' is asked for, and no data is held out to judge by"
        raise UsageError("nothing-held-out", message, hint="see 'valid' and 'fraction'")


def callbacks_of(run: Run, trainer: Trainer, *, held_out: bool) -> list[Any]:
    """What watches a run beside its log."""
    from transformers import EarlyStoppingCallback

    patience = run.schedule.patience
    return [Seal(trainer.keep), *([EarlyStoppingCallback(patience)] if patience and held_out else [])]


def arguments(run: Run, config: TrainConfig, folder: Path, *, steps: int, held_out: bool, device: str | None) -> Any:
    """What transformers' Trainer is told.

    Args:
        run: What is trained.
        config: Of the whole training.
        folder: For checkpoints.
        steps: Of the optimiser in one pass over the data.
        held_out: There is something to judge by.
        device: ``cpu`` keeps it from a GPU.

    Raises:
        UsageError: TensorBoard is asked for and not installed, or patience, and nothing is held out.
    """
    from transformers import TrainingArguments

    schedule, trainer = run.schedule, config.trainer
    if trainer.tensorboard and find_spec("tensorboard") is None:
        message = "'tensorboard' is asked for, which is not installed"
        raise UsageError("extra-missing", message, hint="pip install 'lmoe-cli[tensorboard]'")
    judges, saves = schedule.eval_every, schedule.save_every or schedule.eval_every
    when: dict[str, Any] = {}
    if schedule.patience:
        require_held_out(run, held_out)
        judges = judges or saves
        when = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    when |= {"save_strategy": "steps", "save_steps": saves} if saves else {"save_strategy": "epoch"}
    when |= {"eval_strategy": "steps", "eval_steps": judges} if judges else {"eval_strategy": "epoch"}
    if not held_out:
        when["eval_strategy"] = "no"
    total = schedule.steps or max(1, round((schedule.epochs or 1) * steps))
    with quietly():
        made = TrainingArguments(
            output_dir=str(folder),
            max_steps=total,
            per_device_train_batch_size=schedule.batch_size or 1,
            per_device_eval_batch_size=schedule.batch_size or 1,
            gradient_accumulation_steps=schedule.accumulate or 1,
            learning_rate=schedule.learning_rate or 0,
            weight_decay=schedule.weight_decay or 0,
            max_grad_norm=schedule.clip or 0,
            lr_scheduler_type=SCHEDULES[schedule.schedule or "cosine"],
            warmup_steps=round((schedule.warmup or 0) * total),
            restore_callback_states_from_checkpoint=True,
            seed=trainer.seed,
            logging_strategy="no",
            report_to=["tensorboard"] if trainer.tensorboard else [],
            use_cpu=device == "cpu",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            ddp_find_unused_parameters=run.stage.train == "experts",
            ddp_broadcast_buffers=False,
            average_tokens_across_devices=True,
            **when,
        )
    made._n_gpu = min(made.n_gpu, 1)  # several are for several processes
    return made
