"""What keeps lmoe from running a readable adapter, and what its user should know."""

from __future__ import annotations

from lmoe_cli.adapter.adapter import Adapter, read_adapter, with_findings
from lmoe_cli.adapter.config import SUPPORTED
from lmoe_cli.adapter.contents import Part
from lmoe_cli.files import opened
from lmoe_cli.findings import Finding, finding
from lmoe_cli.source import Source

RUNNABLE_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
"""Task types whose adapters sit on a causal language model."""
UNSCALED = {"magnitude", "saved_weight", "saved_bias"}
"""Roles that act whatever alpha is."""


def inspect_adapter(source: Source) -> Adapter:
    """Read an adapter and judge it by itself, without its base. See `read_adapter` for the errors."""
    adapter = read_adapter(source)
    return with_findings(adapter, soundness(adapter))


def soundness(adapter: Adapter) -> list[Finding]:
    """Judge an adapter by itself.

    Returns:
        Findings; an error among them means that lmoe cannot run it.
    """
    found: list[Finding] = []
    config, ref = adapter.config, adapter.ref

    def say(code: str, message: str, hint: str = "") -> None:
        found.append(finding(code, ref, f"{ref}: {message}", hint))

    if config is None:
        return found
    if config.assumed_lora:
        say("config-assumed-lora", "the config names no peft_type; its keys are those of LoRA")
    if config.peft_type not in SUPPORTED:
        hint = f"lmoe runs {', '.join(SUPPORTED)}; PEFT's convert_to_lora may turn it into a LoRA"
        say("peft-type-unsupported", f"{config.peft_type} adapters cannot be run", hint)
    if adapter.format == "pickle":
        hint = f"lmoe pull {ref} --allow-pickle reads it safely and converts it to safetensors"
        say("pickle-only", "the weights are a pickle, which can run code when it is read", hint)
    elif adapter.format == "none":
        say("weights-missing", "there is a config but no adapter_model.safetensors", "the download may be incomplete")
    if config.task_type not in RUNNABLE_TASKS:
        say("task-unsupported", f"trained for {config.task_type}, not for a causal language model")
    if config.base_changing_init:
        hint = "ask its author for the version converted with PEFT's path_initial_model_for_weight_conversion"
        say("init-changes-base", f"its initialiser {config.base_changing_init!r} changed the base under it", hint)
    for key in config.unsupported:
        if key != "kasa_config":
            say("setting-unsupported", f"{key} cannot be run as a fixed delta", "train it without, or use PEFT")
    if config.peft_type == "VERA" and adapter.parts and len(adapter.shared) < 2:
        hint = "save it again with save_projection=True"
        say("projections-missing", "its shared random projections were not saved", hint)
    if reason := _no_op(adapter):
        say("no-op", f"{reason}: it changes nothing", "it may have been saved before training")
    if adapter.source.has("config.json") and adapter.parts:
        say("full-model-beside", "a full model lies beside the adapter; only the adapter is used")
    return found


def _no_op(adapter: Adapter) -> str:
    """Why a whole adapter changes nothing; empty where it may change something, or is not on this machine."""
    parts = adapter.parts.values()
    rest = [part for part in parts if part.scaling != 0 or part.tensors.keys() & UNSCALED]
    if parts and not rest:
        return "alpha is 0"
    return "every B is zero" if rest and all(_has_zero_up(adapter, part) for part in rest) else ""


def _has_zero_up(adapter: Adapter, part: Part) -> bool:
    """Whether the B of a LoRA on this machine is all zero. Stops at the first byte that is not: one small read."""
    up = {"lora": "lora_B", "embedding": "lora_embedding_B"}
    if part.kind not in up or len(part.tensors) > 2:
        return False
    tensor = part.tensors[up[part.kind]]
    path = adapter.weights.local(tensor.file)
    if path is None:
        return False
    with opened(path) as file:
        file.seek(tensor.info.start)
        left = tensor.info.size
        while left > 0:
            chunk = file.read(min(left, 1 << 20))
            if not chunk or chunk.count(0) != len(chunk):
                return False
            left -= len(chunk)
    return True
