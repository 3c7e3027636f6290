"""What routers cost that decide per token: as experts become many, and beside X-LoRA and Arrow as PEFT has them."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.process import child, peak_mb
from benchmarks.table import at_least, at_most, markdown
from lmoe_cli.bank.bank import Bank
from lmoe_cli.bench import synthetic
from lmoe_cli.bench.measure import measure as timed
from lmoe_cli.bench.variants import Variant, base
from lmoe_cli.bench.work import Decode, Prefill
from lmoe_cli.engine.attach import attach, detach, listen
from lmoe_cli.loadout.routers import ArrowRouter as ArrowSettings
from lmoe_cli.loadout.routers import Share
from lmoe_cli.loadout.trained import GateSettings
from lmoe_cli.router.arrow import ArrowRouter
from lmoe_cli.router.gate import Gate

COUNTS, RANK, LAYERS, KEPT = (4, 16, 64), 16, 8, 2
CONTEXT, PROMPT = 512, 1024
LIMITS = {"decode": 1.15, "prompt": 1.5}
"""Time of many experts, of that of 4, that was asked for at most."""
TIMES_XLORA = 10.0
WORK: dict[str, Decode | Prefill] = {"decode": Decode(1, 32, 8), "prompt": Prefill(1, PROMPT)}
ROUNDS = {"decode": 15, "prompt": 5}
TURNS = 7


def measure() -> dict[str, Any]:
    """Both comparisons, each in a process of its own."""
    many = [row for what in LIMITS for share in ("site", "block") for row in child("benchmarks.routed", what, share)]
    return {"many": many, "beside": child("benchmarks.routed", "beside")}


def text(found: dict[str, Any]) -> str:
    """The tables in Markdown."""
    head = ("what", "gates of", "experts", "ms/token", "± quartiles", "of base", "limit", "time, of 4", "asked")
    fewest = {(row["what"], row["share"]): row["ms_per_token"] for row in found["many"] if row["experts"] == COUNTS[0]}
    cells = []
    for row in found["many"]:
        growth = row["ms_per_token"] / fewest[row["what"], row["share"]]
        is_more = row["experts"] > COUNTS[0]
        cells.append(
            (row["what"], row["share"], str(row["experts"] or "0, the base"), f"{row['ms_per_token']:.3f}",
             f"{row['spread']:.0%}", f"{row['ratio_to_base']:.2f}", f"{row['byte_limit']:.2f}",
             f"{growth:.2f}" if row["experts"] else "", at_most(growth, LIMITS[row["what"]]) if is_more else "")
        )  # fmt: skip
    rows = found["beside"]
    own = {(row["router"], row["experts"]): row for row in rows}
    beside = [
        (row["router"], str(row["experts"]), f"{row['ms_per_token']:.1f}" if "ms_per_token" in row else row["refused"],
         f"{row['peak_mb']:.0f}" if "peak_mb" in row else "", _asked(row, own))
        for row in rows
    ]  # fmt: skip
    titles = ("router", "experts", f"ms/token after {CONTEXT} tokens", f"MB for a prompt of {CONTEXT}", "asked")
    return markdown(head, cells) + "\n" + markdown(titles, beside)


def _asked(row: dict[str, Any], own: dict[tuple[str, int], dict[str, Any]]) -> str:
    other = own.get(("X-LoRA, PEFT" if row["router"] == "gate, lmoe" else "Arrow, PEFT", row["experts"]), {})
    if not row["router"].endswith("lmoe") or "ms_per_token" not in other:
        return ""
    times = other["ms_per_token"] / row["ms_per_token"]
    return f"{times:.1f} x as fast, " + at_least(times, TIMES_XLORA if row["router"] == "gate, lmoe" else 1.0)


def many(what: str, share: Share) -> list[dict[str, Any]]:
    """A gate that lets two experts act on each token, over 4, 16 and 64 of them."""
    torch.manual_seed(0)
    model = synthetic.synthetic_model("qwen3-0.6b", LAYERS, torch.float32, torch.device("cpu"))
    variants = [base()]
    for count in COUNTS:
        bank = synthetic.synthetic_bank(model, count, RANK, torch.float32, share=share)
        for place in bank.places.values():
            place.gates.route = _random_gate(place.width, count)
        variants.append(_variant(model, bank))
    rows = timed(model, variants, WORK[what], ROUNDS[what])
    return [{"what": what, "share": share, **asdict(row)} for row in rows]


def _random_gate(width: int, count: int) -> Gate:
    gate = Gate(width, count, GateSettings(activation="topk", top_k=KEPT))
    nn.init.normal_(gate.weight)
    return gate.requires_grad_(False)


def _variant(model: nn.Module, bank: Bank) -> Variant:
    handles: list[Any] = []

    def enter() -> None:
        bank.gates.set([1.0] * len(bank.names))
        attach(model, bank.live)
        handles.extend(listen(model, bank.places))

    def leave() -> None:
        while handles:
            handles.pop().remove()
        detach(model, bank.live)

    return Variant("routed", len(bank.names), bank.size * KEPT // len(bank.names), bank.size, enter, leave)


def beside() -> list[dict[str, Any]]:
    """Lmoe's routers and PEFT's on the same base, by turns; memory of each in a process of its own."""
    rows: list[dict[str, Any]] = []
    for count in COUNTS[:2]:
        with tempfile.TemporaryDirectory() as folder:
            found: dict[str, dict[str, Any]] = {}
            turns: dict[str, Callable[[], object]] = {}
            times: dict[str, list[float]] = {}
            for name, make in _makers(count, Path(folder)).items():
                found[name] = {"router": name, "experts": count}
                try:
                    turns[name] = _turn(make())
                except Exception as error:  # noqa: BLE001 - whatever PEFT fails with is told
                    found[name]["refused"] = f"{type(error).__name__}: {str(error)[:80]}"
            for number in range(TURNS + 1):
                for name, turn in turns.items():
                    started = time.perf_counter()
                    turn()
                    if number:
                        times.setdefault(name, []).append(time.perf_counter() - started)
        for name, own in times.items():
            found[name]["ms_per_token"] = statistics.median(own) * 1e3
            found[name]["peak_mb"] = child("benchmarks.routed", "memory", name, str(count))
        rows += found.values()
    return rows


@torch.inference_mode()
def _turn(model: nn.Module) -> Callable[[], object]:
    """What computes one more token after a context."""
    ids = _context()
    if getattr(model, "reads_all", False):  # X-LoRA looks at the whole text for each token: it keeps nothing
        return partial(torch.inference_mode()(model), input_ids=torch.cat([ids, ids[:, :1]], 1))
    cache = model(input_ids=ids, use_cache=True).past_key_values

    @torch.inference_mode()
    def turn() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return turn


def _context() -> torch.Tensor:
    return torch.randint(synthetic.SMALL_VOCABULARY, (1, CONTEXT), generator=torch.Generator().manual_seed(0))


def memory(name: str, count: int) -> float:
    """Memory that a router takes for a prompt, above that of the model before it, in MB."""
    with tempfile.TemporaryDirectory() as folder:
        model = _makers(count, Path(folder))[name]()
        return peak_mb(partial(torch.inference_mode()(model), input_ids=_context()))


def _base() -> nn.Module:
    return synthetic.synthetic_model("qwen3-0.6b", LAYERS, torch.float32, torch.device("cpu"))


def _makers(count: int, folder: Path) -> dict[str, Callable[[], nn.Module]]:
    import peft

    warnings.simplefilter("ignore")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    places = []
    for number in range(count):
        torch.manual_seed(number)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        peft.get_peft_model(_base(), config).save_pretrained(folder / str(number))
        places.append(str(folder / str(number)))

    def own(route: str) -> nn.Module:
        model = _base()
        bank = synthetic.synthetic_bank(model, count, RANK, torch.float32, share="site")
        bank.gates.set([1.0] * count)
        router = ArrowRouter(ArrowSettings(type="arrow", top_k=KEPT), {})
        for place in bank.places.values():
            place.gates.route = router.route_at(place) if route == "arrow" else _random_gate(place.width, count)
        attach(model, bank.live)
        listen(model, bank.places)
        return model

    def xlora() -> Any:
        model: Any = _base()
        model.config.use_cache = False  # which it asks for
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM",
            hidden_size=model.config.hidden_size,
            adapters={str(number): place for number, place in enumerate(places)},
        )
        wrapped = peft.get_peft_model(model, config).eval()
        wrapped.reads_all = True
        return wrapped

    def arrow() -> Any:
        return peft.create_arrow_model(_base(), places, peft.ArrowConfig(top_k=KEPT)).eval()

    return {
        "gate, lmoe": lambda: own("gate"),
        "X-LoRA, PEFT": xlora,
        "arrow, lmoe": lambda: own("arrow"),
        "Arrow, PEFT": arrow,
    }


def main(what: str, *rest: str) -> None:
    """Measure one comparison and print the rows as JSON."""
    if what == "memory":
        print(json.dumps(memory(rest[0], int(rest[1]))))
    else:
        share: Any = rest[0] if rest else None
        print(json.dumps(beside() if what == "beside" else many(what, share)))


if __name__ == "__main__":
    main(*sys.argv[1:])
