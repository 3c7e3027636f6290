"""`python -m benchmarks.experiment [DATA]`: train and judge everything, and keep the numbers for the docs."""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import page, results
from benchmarks.experiment import embedding, judging, variants
from benchmarks.experiment.base import read_conversations, train_base
from benchmarks.experiment.telling import ALONE
from lmoe_cli.bench.machine import machine

DOMAINS = ("math", "code", "sql", "cli", "shakespeare", "general")
DATA = Path(__file__).parents[3] / "shared" / "corpus" / "data"
RECORDS = {"train": 300, "valid": 40}
"""Of each domain at most."""
EPOCHS = {"base": 3, "experts": 2, "one": 3, "gate": 4, "joint": 1}
SEED = 0


def measure(data: Path = DATA, folder: Path | None = None) -> dict[str, Any]:
    """Run the whole experiment.

    Args:
        data: Folder with a JSONL file per domain.
        folder: For what is trained; a temporary one when None.
    """
    place = folder or Path(tempfile.mkdtemp(prefix="lmoe-experiment-"))
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"  {time.perf_counter() - started:5.0f} s  {text}", file=sys.stderr, flush=True)

    variants.write_data(data, place / "data", DOMAINS, RECORDS)
    everything = [one for name in DOMAINS for one in read_conversations(place / f"data/{name}.jsonl", "train", 10**6)]
    loss = train_base(everything, place / "base", epochs=EPOCHS["base"], seed=SEED)
    say(f"base: {loss:.3f} nats per token")
    found: dict[str, Any] = {"epochs": EPOCHS, "records": RECORDS, "seed": SEED, "base_loss": loss, "variants": {}}
    found["repeats"] = variants.repeats(place, DOMAINS)
    trained = {"experts": variants.train_experts(place, DOMAINS, EPOCHS["experts"])}
    say("experts")
    recipes = {
        "static": variants.write_recipe(place, "static", DOMAINS, {"type": "weighted"}),
        "encoder": variants.write_recipe(place, "encoder", DOMAINS, {"type": "encoder"}),
        "arrow": variants.write_recipe(place, "arrow", DOMAINS, {"type": "arrow", "top_k": 2}),
    }
    trained[ALONE] = variants.train_one(place, DOMAINS, EPOCHS["one"])
    say("one LoRA of the same size")
    for kind in variants.GATES:
        trained[f"gate, {kind}"] = variants.train_gate(place, DOMAINS, kind, "gate", EPOCHS["gate"])
        say(f"gate, {kind}")
    trained["joint, softmax"] = variants.train_gate(place, DOMAINS, "softmax", "joint", EPOCHS["joint"])
    say("joint, softmax")
    recipes |= {name: out / "recipe.yaml" for name, (out, _) in trained.items() if name != "experts"}
    recipes["fitted"] = _fit(place)
    say("fitted")
    for name, recipe in recipes.items():
        told = judging.evaluate(recipe, place, DOMAINS, each=name == "static")
        if name != ALONE:
            told["variants"].append(judging.beside(recipe, recipes[ALONE], ALONE, place, DOMAINS))
        own: dict[str, Any] = {"eval": told}
        if name in ("encoder", "arrow") or name.startswith(("gate", "joint")):
            own |= judging.routing(recipe, place, DOMAINS)
        if name in trained:
            own["training"] = {key: trained[name][1][key] for key in ("runs", "seconds")}
        found["variants"][name] = own
        say(name)
    found["embedding"] = embedding.measure(recipes["encoder"], place, DOMAINS, seed=SEED)
    found["tokens_per_s"] = judging.speeds(recipes)
    found["seconds"] = round(time.perf_counter() - started)
    if folder is None:
        shutil.rmtree(place)
    return found


def _fit(place: Path) -> Path:
    import subprocess

    out = place / "fitted.yaml"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "lmoe_cli", "fit", str(place / "static.yaml"), "--out", str(out)]
    for domain in DOMAINS:
        command += ["--data", f"{domain}={place / 'data' / f'{domain}.jsonl'}"]
    subprocess.run(command, check=True, capture_output=True)
    return out


if __name__ == "__main__":
    results.keep("experiment", measure(*map(Path, sys.argv[1:])), machine(torch.device("cpu")))
    page.PATH.write_text(page.page(results.load()))
