"""What a training leaves: adapters that PEFT loads, the router, and a recipe that runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lmoe_cli import __version__, files
from lmoe_cli.adapter.adapter import STEM, read_adapter
from lmoe_cli.adapter.config import CONFIG, MAX_CONFIG_BYTES
from lmoe_cli.checkpoint.raw import raw
from lmoe_cli.checkpoint.writer import Shape, ShardWriter
from lmoe_cli.loadout.loadout import Expert, Loadout, resolve
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.loadout.trained import CONFIG as ROUTER_CONFIG
from lmoe_cli.loadout.trained import STEM as ROUTER_STEM
from lmoe_cli.loadout.trained import fingerprint, read_gate, weights_hash
from lmoe_cli.loadout.write import recipe_text
from lmoe_cli.router.store import write_gate
from lmoe_cli.source import Folder
from lmoe_cli.train.config import TrainConfig
from lmoe_cli.train.material import files_read
from lmoe_cli.train.stage import Assembly, Run, runs_of
from lmoe_cli.train.trainable import parts_at

DONE = "done"
KEPT = ("accept_base", "description", "examples")
"""What the recipe says of an expert as the config does."""
METRICS = "metrics.json"
MAX_METRICS_BYTES = 16 << 20


@dataclass(frozen=True)
class Left:
    """What the runs so far have left."""

    adapters: Mapping[str, str]
    """Expert's name → its adapter: a folder, or what the config names."""
    gate: Path | None = None
    """Folder of the gate."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Run → what came of it."""

    def after(self, done: Path, run: Run) -> Left:
        """The same after one more run, with its results in a folder."""
        trained = {name: str(path) for name in run.experts if (path := done / "experts" / name).is_dir()}
        gate = done / "router" if (done / "router").is_dir() else self.gate
        metrics = json.loads(files.read_bytes(done / METRICS, MAX_METRICS_BYTES))
        return Left({**self.adapters, **trained}, gate, {**self.metrics, run.name: metrics})


def write_results(
    folder: Path, assembly: Assembly, loadout: Loadout, config: TrainConfig, metrics: Mapping[str, Any]
) -> None:
    """Write what one run has trained into an existing folder.

    Args:
        folder: Where to.
        assembly: What was trained.
        loadout: That it began with.
        config: Of the training.
        metrics: What came of it.
    """
    if assembly.sites:
        factors = _factors(assembly, loadout)
        for expert in loadout.experts:
            _write_expert(folder / "experts" / expert.name, expert, factors[expert.name])
    if assembly.gates:
        hashes = {expert.name: weights_hash(expert.adapter) or "" for expert in _now(folder, loadout)}
        assert config.gate is not None, "it was trained"
        weights = {name: (gate.weight, gate.bias) for name, gate in assembly.gates.items()}
        base = (loadout.base.ref, fingerprint(loadout.base) or "")
        files.make_folder(folder / "router")
        write_gate(folder / "router", weights, config.gate.settings, experts=hashes, base=base, metrics=metrics)
    files.write_file(folder / METRICS, json.dumps(metrics, indent=2).encode() + b"\n")


def _factors(assembly: Assembly, loadout: Loadout) -> dict[str, dict[str, Tensor]]:
    """Expert's name → tensor's name in its file → A or B."""
    parts = parts_at(assembly.model, loadout)
    found: dict[str, dict[str, Tensor]] = {expert.name: {} for expert in loadout.experts}
    for site in assembly.sites:
        for number, expert in enumerate(loadout.experts):
            for module, (a, b) in site.factors(number).items():
                stored = parts[module, number].tensors
                found[expert.name] |= {stored["lora_A"].name: a, stored["lora_B"].name: b}
    return found


def _write_expert(folder: Path, expert: Expert, tensors: Mapping[str, Tensor]) -> None:
    """Write an adapter as it was, but for its numbers, which are float32."""
    files.make_folder(folder)
    own = {name: tensors[name].detach().to("cpu").contiguous() for name in expert.adapter.stored}
    shapes = {name: Shape("F32", tuple(tensor.shape)) for name, tensor in own.items()}
    with ShardWriter(folder / f"{STEM}.safetensors", shapes, {"format": "pt"}) as file:
        for tensor in own.values():
            file.write(raw(tensor))
    files.write_file(folder / CONFIG, expert.adapter.source.read(CONFIG, MAX_CONFIG_BYTES))


def _now(folder: Path, loadout: Loadout) -> tuple[Expert, ...]:
    """The experts that the gate was trained with, as they are stored now."""
    experts = {
        expert.name: {"adapter": str(path if (path := folder / "experts" / expert.name).is_dir() else _place(expert))}
        for expert in loadout.experts
    }
    recipe = Recipe.model_validate({"base": loadout.recipe.base, "experts": experts})
    return resolve(recipe, loadout.origin, beside=loadout.folder).experts


def _place(expert: Expert) -> str:
    source = expert.adapter.source
    return (
        str(source.path) if isinstance(source, Folder) and not source.ref.startswith("demo:") else expert.entry.adapter
    )


def write_outcome(
    config: TrainConfig,
    out: Path,
    work: Path,
    left: Left,
    data: Mapping[str, str],
    *,
    beside: Path,
    force: bool,
) -> dict[str, Any]:
    """Write everything that came of a training, all at once.

    Args:
        config: Of the training.
        out: Folder to write.
        work: Folder of the work.
        left: What its runs have left.
        data: Data file → SHA-256.
        beside: Folder of the config.
        force: Replace what an earlier training wrote.

    Returns:
        The report.
    """
    seen = files_read(config, [(run.experts, run.stage.train == "experts") for run in runs_of(config)])
    report = {"lmoe": __version__, "config": config.model_dump(mode="json"), "data": dict(data), "runs": left.metrics}
    with files.new_folder(out, force=force) as folder:
        experts: dict[str, Any] = {}
        for name, entry in config.experts.items():
            adapter = left.adapters[name]
            if Path(adapter).is_relative_to(work):
                _copy(Path(adapter), folder / "experts" / name)
                adapter = f"./experts/{name}"
            else:
                adapter = _whole_name(adapter, beside)
            extra = {key: value for key in KEPT if (value := getattr(entry, key))}
            experts[name] = {"adapter": adapter, "weight": entry.weight, **extra}
        router: dict[str, Any] = {"type": "weighted"}
        if left.gate:
            _copy_gate(left.gate, folder, {name: digest for name, digest in data.items() if name in seen})
            router = {"type": "gate", "artefact": "./router"}
        base = _whole_name(config.base, beside)
        told = {"name": config.name, "description": config.description, "base": base, "experts": experts}
        more = {"modules_to_save": config.modules_to_save, "chat": config.chat.model_dump()}
        recipe = Recipe.model_validate({**told, "router": router, **more})
        log = b"".join(
            files.read_bytes(path, 1 << 32) for name in left.metrics if (path := work / name / "log.jsonl").is_file()
        )
        files.write_file(folder / "log.jsonl", log)
        for name in left.metrics:
            for path in sorted((work / name / "runs").rglob("events.*")):  # TensorBoard's
                files.copy_file(path, folder / "tensorboard" / name / path.name)
        files.write_file(folder / "recipe.yaml", recipe_text(recipe).encode())
        files.write_file(folder / files.TRAINED, json.dumps(report, indent=2).encode() + b"\n")
    wrote = ["recipe.yaml", *sorted(name for name in ("experts", "router") if (out / name).is_dir())]
    return {**report, "wrote": wrote}


def _whole_name(ref: str, beside: Path) -> str:
    """A reference as it must stand in a recipe elsewhere: a folder, beside the config or where lmoe runs, in full."""
    if ref.startswith(("demo:", "hf://")):
        return ref
    found = next((path for path in (beside / ref, Path(ref).expanduser()) if path.is_dir()), None)
    return str(found.resolve()) if found else ref


def _copy(source: Path, target: Path) -> None:
    files.make_folder(target)
    for path in sorted(source.iterdir()):
        files.copy_file(path, target / path.name)


def _copy_gate(source: Path, out: Path, data: Mapping[str, str]) -> None:
    """Copy a gate, and write down what it was trained on, and the experts as a later stage may have left them."""
    gate = read_gate(Folder(str(source), source))
    target = out / "router"
    files.make_folder(target)
    files.copy_file(source / f"{ROUTER_STEM}.safetensors", target / f"{ROUTER_STEM}.safetensors")
    config = json.loads(files.read_bytes(source / ROUTER_CONFIG, MAX_CONFIG_BYTES))
    for name in config["experts"]:
        if (expert := out / "experts" / name).is_dir():
            config["experts"][name] = weights_hash(read_adapter(Folder(str(expert), expert)))
    config["data"] = dict(data)
    config["metrics"] = dict(gate.metrics)
    files.write_file(target / ROUTER_CONFIG, json.dumps(config, indent=2).encode() + b"\n")
