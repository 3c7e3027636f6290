"""From a training config to a recipe that runs: the stages one after the other, each on what the last one left.

OUT.work/       while it is trained: state.json, and a folder per run with its log, its checkpoints and its results
OUT/            when it is done, all at once: recipe.yaml, experts/NAME, router, log.jsonl, train-report.json
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmoe_cli import files
from lmoe_cli.check import require
from lmoe_cli.disk import refuse_input, writing
from lmoe_cli.engine.base_model import load_tokenizer, quietly
from lmoe_cli.engine.device import choose_device
from lmoe_cli.engine.generate import context_of
from lmoe_cli.errors import ResourceError, UsageError
from lmoe_cli.loadout.base import read_base
from lmoe_cli.loadout.loadout import Loadout, resolve
from lmoe_cli.loadout.recipe import Recipe, Take
from lmoe_cli.loadout.trained import read_gate
from lmoe_cli.locks import alone_in
from lmoe_cli.source import Source, open_source
from lmoe_cli.train.checkpoints import last_whole
from lmoe_cli.train.fresh import write_fresh
from lmoe_cli.train.log import Log, Tell
from lmoe_cli.train.loop import Loop
from lmoe_cli.train.material import data_files, gather_material, hashes_of, holds_out, sources_of
from lmoe_cli.train.order import Order
from lmoe_cli.train.outcome import DONE, Left, write_outcome, write_results
from lmoe_cli.train.packing import require_apart
from lmoe_cli.train.stage import Run, arguments, assemble, callbacks_of, require_held_out, runs_of
from lmoe_cli.train.state import begin, has_trained, pinned
from lmoe_cli.train.trainable import require_plain

FRESH = "fresh"


def train(order: Order, tell: Tell) -> dict[str, Any]:
    """Train everything a config says.

    Args:
        order: What to train, and where to.
        tell: On the first process, told of what happens.

    Returns:
        The report.

    Raises:
        UsageError: The output exists, or there is something unfinished there and ``resume`` is not set.
        RefusedError: The experts do not fit the base.
        InvalidFileError: Data is wrong.
        ResourceError: Disk or memory is full. The last checkpoint is kept.
        LmoeError: The loss is no number any more.
    """
    from accelerate import PartialState

    order = replace(order, out=order.out.absolute(), folder=order.folder.absolute())
    files.refuse_existing(order.out, force=order.force)
    device = choose_device(order.device)
    if device.index:
        message = f"--device {order.device}: training takes the first devices that it sees, one for each process"
        raise UsageError("device-index", message, hint=f"CUDA_VISIBLE_DEVICES={device.index} lmoe train …")
    processes = PartialState(cpu=device.type == "cpu")
    if order.config.trainer.shard and processes.num_processes == 1:
        message = "'shard' spreads the base over processes, and there is one"
        raise UsageError(
            "shard-alone", message, hint="torchrun --nproc-per-node N -m lmoe_cli train …, or leave it out"
        )
    if order.out.exists():
        refuse_input(order.out, _read(order))
    with alone_in(order.work) if processes.is_main_process else nullcontext():
        return _train_alone(order, tell, processes)


def _train_alone(order: Order, tell: Tell, processes: Any) -> dict[str, Any]:
    """Train, while no other training works in the same folder."""
    work = order.work
    data = hashes_of(order.config, order.folder)
    if processes.is_main_process:
        begin(order, work, data, processes.num_processes)
    processes.wait_for_everyone()
    try:
        order = replace(order, config=pinned(order.config, work))
        left = _train(order, tell, processes)
    except BaseException:
        if processes.is_main_process and not has_trained(work):
            files.remove_folder(work)
        raise
    report: dict[str, Any] = {}
    if processes.is_main_process:
        report = write_outcome(order.config, order.out, work, left, data, beside=order.folder, force=order.force)
        files.remove_folder(work)
    processes.wait_for_everyone()
    return report


def _train(order: Order, tell: Tell, processes: Any) -> Left:
    """Make all runs that are not done yet."""
    if processes.is_main_process:
        _write_fresh(order)
    processes.wait_for_everyone()
    left = Left(_adapters(order))
    runs = runs_of(order.config)
    known: dict[str, bool] = {}
    for run in runs:
        _require_possible(order, run, left, known)
    for run in runs:
        done = order.work / run.name / DONE
        if not done.is_dir():
            _run(order, run, left, tell, processes)
            processes.wait_for_everyone()
        left = left.after(done, run)
    return left


def _require_possible(order: Order, run: Run, left: Left, known: dict[str, bool]) -> None:
    """Refuse before anything is trained what a run would be refused for when its turn comes.

    Args:
        order: The training.
        run: One of it.
        left: What it begins with.
        known: Data that was read for other runs → whether it holds something out.

    Raises:
        UsageError: Its experts are of a kind that is not trained, or it has patience and nothing to judge by.
        RefusedError: The experts do not fit the base.
        InvalidFileError: A line of its data is no record.
    """
    loadout, config = _loadout(order, run, left), order.config
    if run.stage.train != "gate":
        require_plain(loadout)
    sources = sources_of(config, run.experts, is_for_experts=run.stage.train == "experts")
    read = {source.data.model_dump_json(): source.data for source in sources}
    for name in read.keys() - known.keys():
        known[name] = holds_out(read[name], order.folder, config.trainer.seed)
    require_held_out(run, any(known[name] for name in read))


def _read(order: Order) -> dict[str, Path | None]:
    """What the config names, and where it is on this machine."""
    config, beside = order.config, order.folder
    folders = {ref: open_source(ref, token=order.token, beside=beside).path for ref in config.references}
    return {**folders, **data_files(config, beside)}


def _adapters(order: Order) -> dict[str, str]:
    """Expert's name → the adapter that it begins with."""
    return {name: expert.adapter or str(order.work / FRESH / name) for name, expert in order.config.experts.items()}


def _write_fresh(order: Order) -> None:
    config = order.config
    base = read_base(open_source(config.base, token=order.token, beside=order.folder))
    for number, (name, expert) in enumerate(config.experts.items()):
        place = order.work / FRESH / name
        if expert.adapter is None and not place.exists():
            with files.new_folder(place) as folder:
                seed = config.trainer.seed * 1009 + number
                write_fresh(folder, base, expert, seed, trust_remote_code=order.trust_remote_code)


def _run(order: Order, run: Run, left: Left, tell: Tell, processes: Any) -> None:
    """Train one run, or what is left of it, and leave its results in its folder."""
    folder, config = order.work / run.name, order.config
    loadout = _loadout(order, run, left)
    with quietly(), _spools(folder, processes.process_index) as spools:
        gate = read_gate(_folder(left.gate)) if left.gate else None
        trusts = order.trust_remote_code
        assembly = assemble(loadout, run, config, processes.device, gate, trust_remote_code=trusts)
        if config.trainer.packing:
            require_apart(assembly.model, loadout.base.ref, processes.device)
        limits = (context_of(assembly.model.config), _vocabulary(assembly.model))
        tokenizer = load_tokenizer(loadout.base, trust_remote_code=trusts)
        material = gather_material(
            sources_of(config, run.experts, is_for_experts=run.stage.train == "experts"),
            config,
            order.folder,
            spools,
            tokenizer,
            limits,
        )
        batches = math.ceil(len(material.rows) / ((run.schedule.batch_size or 1) * processes.num_processes))
        steps = math.ceil(batches / (run.schedule.accumulate or 1))
        args = arguments(run, config, folder, steps=steps, held_out=bool(material.held_out), device=order.device)
        begun, damaged = last_whole(folder)
        log = Log(folder / "log.jsonl", tell, run.name, after=_step(begun), experts=run.experts)
        if processes.is_main_process:
            for path in damaged:
                files.remove_folder(path)
            log.begin(args.max_steps, material.told, damaged)
        processes.wait_for_everyone()
        rates = (run.schedule.learning_rate or 0.0, run.schedule.gate_learning_rate or 0.0)
        loop = Loop(
            assembly.trainee,
            args,
            material.rows,
            material.held_out,
            run.stage,
            rates,
            run.experts,
            log.tell,
            callbacks_of(run, config.trainer, held_out=bool(material.held_out)),
        )
        with _room(folder):
            loop.run(begun)
        metrics = loop.evaluate() if material.held_out else {}
    if processes.is_main_process:
        with files.new_folder(folder / DONE) as results:
            write_results(results, assembly, loadout, config, log.summary(metrics))
        for path in folder.glob("checkpoint-*"):
            files.remove_folder(path)


def _loadout(order: Order, run: Run, left: Left) -> Loadout:
    config = order.config
    experts = {
        name: {"adapter": left.adapters[name], "accept_base": config.experts[name].accept_base} for name in run.experts
    }
    policy = config.modules_to_save
    saved = {} if isinstance(policy, Take) and policy.take not in experts else {"modules_to_save": policy}
    recipe = Recipe.model_validate({"base": config.base, "experts": experts, **saved})
    loadout = resolve(recipe, "the training config", beside=order.folder, token=order.token)
    require(loadout, trust_remote_code=order.trust_remote_code)
    return loadout


@contextmanager
def _spools(folder: Path, process: int) -> Iterator[Path]:
    """A folder for tokenised data, gone afterwards."""
    place = folder / f"data-{process}"
    if place.exists():
        files.remove_folder(place)
    files.make_folder(place)
    try:
        yield place
    finally:
        files.remove_folder(place)


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """Tell a full disk as such, whichever library writes."""
    try:
        with writing(folder):
            yield
    except RuntimeError as error:  # torch's writer of archives says it in its own way
        if "PytorchStreamWriter" not in str(error) and "No space left" not in str(error):
            raise
        hint = "free some space, then --resume: the last whole checkpoint is kept"
        raise ResourceError("disk-full", f"{folder}: a checkpoint could not be written", hint=hint) from error


def _vocabulary(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _folder(path: Path) -> Source:
    return open_source(str(path))


def _step(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
