"""Files of the demo: the base and its adapters as package data, whole or not at all."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from demo_model.blends import Expert
from demo_model.demo import Demo
from demo_model.tables import CLASSES

BASE = "adventurer"
MOST_BYTES = 10_000_000
"""Upper limit of all files together."""
INIT = '"""The embedded demo: an adventurer and three classes, as package data."""\n'


_PARTS = frozenset({"__init__.py", "__pycache__", "demo-matrix.md", BASE, *CLASSES, "party"})


class RefusedError(Exception):
    """The demo does not fit into a package, or would replace something else."""


def write_demo(demo: Demo, target: Path) -> int:
    """Write the demo beside its place and swap it in.

    Args:
        demo: what was trained.
        target: folder that holds the demo afterwards, and nothing else.

    Returns:
        Size of all files, in bytes.

    Raises:
        RefusedError: the files take more than `MOST_BYTES`, or the target holds something else. It is as it was.
    """
    require_replaceable(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, aside = (target.with_name(f".{target.name}.{os.getpid()}.{word}") for word in ("partial", "old"))
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        (partial / "__init__.py").write_text(INIT, encoding="utf-8")
        _write_base(demo, partial / BASE)
        for name, expert in demo.experts.items():
            _write_adapter(expert, partial / name)
        files = [path for path in partial.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        if size > MOST_BYTES:
            raise RefusedError(f"the demo takes {size:,} bytes, at most {MOST_BYTES:,} are allowed")
        _give_usual_modes(files)
        if target.exists():
            target.rename(aside)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
    return size


def require_replaceable(target: Path) -> None:
    """Refuse a folder that holds anything but a demo."""
    if target.exists():
        strange = (
            sorted(path.name for path in target.iterdir() if path.name not in _PARTS)
            if target.is_dir()
            else [target.name]
        )
        if strange:
            raise RefusedError(f"{target} holds '{strange[0]}', which is no part of a demo; choose another folder")


def _write_base(demo: Demo, folder: Path) -> None:
    folder.mkdir()
    demo.tokenizer.save_pretrained(folder)
    # The name that every version of transformers knows.
    _change_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    demo.base.config.save_pretrained(folder)
    _change_json(folder / "config.json", {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"})
    demo.base.generation_config.save_pretrained(folder)
    _save(
        {name: parameter.bfloat16() for name, parameter in demo.base.named_parameters()},  # tied weights appear once
        folder / "model.safetensors",
    )


def _write_adapter(expert: Expert, folder: Path) -> None:
    folder.mkdir()
    adapter = expert.adapter
    config = {
        "alpha_pattern": {},
        "base_model_name_or_path": f"demo:{BASE}",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.rank,
        "rank_pattern": {},
        "target_modules": sorted(adapter.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": adapter.is_rank_stabilised,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {}
    for target, (a, b) in expert.factors.items():
        tensors[f"base_model.model.{target}.lora_A.weight"] = a
        tensors[f"base_model.model.{target}.lora_B.weight"] = b
    _save(tensors, folder / "adapter_model.safetensors")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    ordered = {name: tensors[name].detach().to(device="cpu").contiguous() for name in sorted(tensors)}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in ordered.values()):
        raise ValueError(f"{path.name} would hold numbers that are not finite")
    save_file(ordered, path, metadata={"format": "pt"})


def _change_json(path: Path, changes: Mapping[str, object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _give_usual_modes(files: list[Path]) -> None:
    umask = os.umask(0o077)
    os.umask(umask)
    for path in files:
        path.chmod(0o666 & ~umask)
