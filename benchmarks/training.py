"""What joint training of several experts and their gate costs, beside one PEFT LoRA of the same total rank."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.process import child, peak_mb
from benchmarks.table import at_most, markdown
from lmoe_cli.bench import synthetic

EXPERTS, RANK, LAYERS = 4, 8, 8
ROWS, TOKENS, ROUNDS = 2, 256, 4
MOST = 1.3
GATES: dict[str, dict[str, Any]] = {
    "softmax, per block": {"activation": "softmax", "share": "block"},
    "softmax, per site": {"activation": "softmax", "share": "site"},
    "top-2, per site": {"activation": "topk", "top_k": 2, "share": "site"},
    "hard1, per site": {"activation": "hard1", "share": "site"},
}


def measure() -> dict[str, Any]:
    """All of them by turns in one process; memory of each in a process of its own."""
    rows = child("benchmarks.training", "time")
    for row in rows:
        row["peak_mb"] = child("benchmarks.training", "memory", row["what"])
    return {"rows": rows}


def text(found: dict[str, Any]) -> str:
    """The table in Markdown."""
    first = found["rows"][0]
    head = ("what is trained", "ms/token", "± quartiles", "time, of PEFT", "MB", "memory, of PEFT", "asked")
    cells = [
        (row["what"], f"{row['ms_per_token']:.2f}", f"{row['spread']:.0%}", f"{row['ratio']:.2f}",
         f"{row['peak_mb']:.0f}", f"{row['peak_mb'] / first['peak_mb']:.2f}",
         "" if row is first else at_most(max(row["ratio"], row["peak_mb"] / first["peak_mb"]), MOST))
        for row in found["rows"]
    ]  # fmt: skip
    return markdown(head, cells)


Step = Callable[[], None]


def _steps(folder: Path) -> dict[str, Callable[[], Step]]:
    base = folder / "base"
    model: Any = synthetic.synthetic_model("qwen3-0.6b", LAYERS, torch.float32, torch.device("cpu"))
    model.save_pretrained(base)
    made: dict[str, Callable[[], Step]] = {f"one LoRA of rank {EXPERTS * RANK}, PEFT": lambda: _peft(base)}
    for name in GATES:
        made[f"{EXPERTS} experts of rank {RANK} and a gate, {name}"] = partial(_joint, folder, name)
    return made


def _batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(synthetic.SMALL_VOCABULARY, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def _peft(base: Path) -> Step:
    import peft
    from transformers import AutoModelForCausalLM

    rank = EXPERTS * RANK
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    return _step(model, lambda batch: model(**batch).loss)


def _joint(folder: Path, gate: str) -> Step:
    from lmoe_cli.loadout.base import read_base
    from lmoe_cli.loadout.loadout import resolve
    from lmoe_cli.loadout.recipe import Recipe
    from lmoe_cli.source import open_source
    from lmoe_cli.train.config import TrainConfig
    from lmoe_cli.train.fresh import write_fresh
    from lmoe_cli.train.stage import assemble, runs_of

    names = [f"e{number}" for number in range(EXPERTS)]
    told: dict[str, Any] = {"base": str(folder / "base"), "gate": GATES[gate]}
    told |= {"experts": {name: {"rank": RANK, "data": "none"} for name in names}, "stages": [{"train": "joint"}]}
    config = TrainConfig.model_validate(told)
    for number, name in enumerate(names):
        place = folder / name
        if not place.exists():
            place.mkdir()
            write_fresh(place, read_base(open_source(str(folder / "base"))), config.experts[name], number)
    recipe = {"base": str(folder / "base"), "experts": {name: {"adapter": str(folder / name)} for name in names}}
    loadout = resolve(Recipe.model_validate(recipe), "the benchmark")
    trainee = assemble(loadout, runs_of(config)[0], config, torch.device("cpu"), None).trainee

    def loss(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        own = {"experts": torch.full_like(batch["labels"], -1), "strengths": torch.ones(batch["labels"].shape)}
        losses = trainee(**own, **batch)
        assert losses.gate is not None, "it has one"
        total: torch.Tensor = losses.nats / batch["labels"].numel() + 0.01 * losses.gate.balance
        return total

    return _step(trainee, loss)


def _step(model: torch.nn.Module, loss: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> Step:
    model.train()
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, batch = torch.optim.AdamW(own, lr=1e-4), _batch()

    def step() -> None:
        loss(batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(folder: Path) -> list[dict[str, Any]]:
    steps = {what: make() for what, make in _steps(folder).items()}
    times: dict[str, list[float]] = {what: [] for what in steps}
    for number in range(ROUNDS + 1):
        for what, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                times[what].append((time.perf_counter() - started) / (ROWS * TOKENS))
    first = next(iter(times.values()))
    return [
        {
            "what": what,
            "ms_per_token": statistics.median(own) * 1e3,
            "spread": (statistics.quantiles(own, n=4)[2] - statistics.quantiles(own, n=4)[0]) / statistics.median(own),
            "ratio": statistics.median([mine / other for mine, other in zip(own, first, strict=True)]),
        }
        for what, own in times.items()
    ]


def _peak(folder: Path, what: str) -> float:
    step = _steps(folder)[what]()

    def two() -> None:
        step()
        step()

    return peak_mb(two)


def main(kind: str, what: str = "") -> None:
    """Measure and print as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(_timed(Path(folder)) if kind == "time" else _peak(Path(folder), what)))


if __name__ == "__main__":
    main(*sys.argv[1:])
