"""From the start of a process to its first token, and the memory it holds, beside the shortest script for that."""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import write_adapter, write_base
from benchmarks.process import Run, run
from benchmarks.table import at_most, markdown

SHAPE, EXPERTS, RANK, ROUNDS = "qwen3-0.6b", 2, 16, 7
SLACK_BYTES = 150e6
IMPORTS = "from transformers import AutoModelForCausalLM, AutoTokenizer"
ALL_IMPORTS = f"{IMPORTS}; import transformers.models.qwen3.modeling_qwen3"
"""And what loading a model of that kind imports."""
TOLD = "; print(flush=True)"
"""Ends what is timed, before Python takes everything down."""
SCRIPT = f"""
import sys
{IMPORTS}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("A goblin blocks the bridge.", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""
PROMPT = ("--prompt", "A goblin blocks the bridge.", "--max-new-tokens", "1", "--quiet")
DEMO = Path(__file__).parents[1] / "lmoe_cli" / "demo" / "adventurer"
TARGETS = {"base": ("script", 1.15), "blend": ("script", None), "demo": ("imports", 2.0)}
"""What runs → beside what, and how much longer it may take."""
SAID = {
    "imports": "importing transformers' auto classes",
    "all imports": "and the module of the model",
    "script": "the shortest transformers script, one token",
    "base": "`lmoe chat --base … --prompt`, one token",
    "blend": f"the same with {EXPERTS} experts of rank {RANK}",
    "demo": "`lmoe chat --prompt` with the embedded demo, one token",
}


def measure() -> dict[str, Any]:
    """Whole programs, in turn."""
    with tempfile.TemporaryDirectory(prefix="lmoe-bench-") as temporary:
        folder = Path(temporary)
        base = write_base(folder / "base", SHAPE)
        for path in DEMO.glob("token*"):
            shutil.copy(path, base)
        adapters = [write_adapter(folder / f"adapter{number}", SHAPE, RANK, number) for number in range(EXPERTS)]
        experts = [word for number, path in enumerate(adapters) for word in ("--expert", f"e{number}={path}:0.25")]
        chat = (sys.executable, "-m", "lmoe_cli", "chat", *PROMPT)
        commands: dict[str, tuple[str | Path, ...]] = {
            "imports": (sys.executable, "-c", IMPORTS + TOLD),
            "all imports": (sys.executable, "-c", ALL_IMPORTS + TOLD),
            "script": (sys.executable, "-c", SCRIPT, base),
            "base": (*chat, "--base", base),
            "blend": (*chat, "--base", base, *experts),
            "demo": chat,
        }
        runs: dict[str, list[Run]] = {name: [] for name in commands}
        for _ in range(ROUNDS + 1):
            for name, command in commands.items():
                runs[name].append(run(*command, cache=folder / "cache"))
        bytes_of = [sum(path.stat().st_size for path in place.glob("*.safetensors")) for place in (base, *adapters)]
    rows = [
        {
            "name": name,
            "seconds": [each.first_output_seconds for each in own[1:]],
            "resident_bytes": max(each.resident_bytes for each in own),
        }
        for name, own in runs.items()
    ]
    return {"rows": rows, "base_bytes": bytes_of[0], "experts_bytes": sum(bytes_of[1:])}


def text(found: dict[str, Any]) -> str:
    """The table in Markdown."""
    rows = {row["name"]: row for row in found["rows"]}
    imports = rows["all imports"]["resident_bytes"]
    held = {"base": found["base_bytes"], "blend": found["base_bytes"] + found["experts_bytes"]}
    cells = []
    for name, row in rows.items():
        beside, most = TARGETS.get(name, (None, None))
        pairs = zip(row["seconds"], rows[beside]["seconds"], strict=True) if beside else []
        ratio = statistics.median(own / other for own, other in pairs) if beside else None
        above = max(0, row["resident_bytes"] - imports)
        wanted = held.get(name)
        cells.append(
            (SAID[name], f"{statistics.median(row['seconds']):.2f}",
             f"{ratio:.2f} of {'the script' if beside == 'script' else 'the imports'}" if ratio else "",
             at_most(ratio, most) if ratio else "", f"{above / 1e9:.2f} GB",
             at_most(above / 1e9, (wanted + SLACK_BYTES) / 1e9, " GB") if wanted else "")
        )  # fmt: skip
    said = f"A base of {found['base_bytes'] / 1e9:.2f} GB, two experts of {found['experts_bytes'] / 2e6:.0f} MB each. "
    said += (
        f"Medians of {ROUNDS} interleaved runs of whole programs, files in the page cache; memory is what is resident "
    )
    said += f"at most, mapped weights among it, above the {imports / 1e9:.2f} GB after the imports.\n\n"
    return said + markdown(("", "seconds to the first output", "time", "asked", "memory", "asked"), cells)
