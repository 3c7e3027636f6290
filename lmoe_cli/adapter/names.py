"""Tensor accounting: which module of the base a stored tensor belongs to, and what it is there.

One function, `place`, says it for every file of every supported PEFT type. What it cannot place is an error for the
caller to raise: no tensor is ever dropped in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "tokens_embed", "embeddings")
"""What architectures call the input embedding."""
HEAD = "lm_head"
"""What model classes call the output head."""
HEAD_OF = {"gpt_neox": "embed_out"}
"""model_type → name of the output head in checkpoints and older classes, where it is another."""
HEADS = (HEAD, *HEAD_OF.values())

ROOTS = ("base_model.model.", "base_model.")

ROLES = {
    "lora_A": r"lora_A(?:\.{adapter})?\.weight",
    "lora_B": r"lora_B(?:\.{adapter})?\.weight",
    "lora_B_bias": r"lora_B(?:\.{adapter})?\.bias",
    "lora_embedding_A": r"lora_embedding_A(?:\.{adapter})?",
    "lora_embedding_B": r"lora_embedding_B(?:\.{adapter})?",
    "magnitude": r"lora_magnitude_vector(?:\.{adapter})?(?:\.weight)?",
    "ia3": r"ia3_l(?:\.{adapter})?",
    "hada_w1_a": r"hada_w1_a(?:\.{adapter})?",
    "hada_w1_b": r"hada_w1_b(?:\.{adapter})?",
    "hada_w2_a": r"hada_w2_a(?:\.{adapter})?",
    "hada_w2_b": r"hada_w2_b(?:\.{adapter})?",
    "lokr_w1": r"lokr_w1(?:\.{adapter})?",
    "lokr_w1_a": r"lokr_w1_a(?:\.{adapter})?",
    "lokr_w1_b": r"lokr_w1_b(?:\.{adapter})?",
    "lokr_w2": r"lokr_w2(?:\.{adapter})?",
    "lokr_w2_a": r"lokr_w2_a(?:\.{adapter})?",
    "lokr_w2_b": r"lokr_w2_b(?:\.{adapter})?",
    "vera_lambda_b": r"vera_lambda_b(?:\.{adapter})?",
    "vera_lambda_d": r"vera_lambda_d(?:\.{adapter})?",
    "original_weight": r"original_module\.weight",
    "original_bias": r"original_module\.bias",
    "saved_weight": "weight",
    "saved_bias": "bias",
}
"""Role → how it ends a tensor's name. ``{adapter}`` is the adapter's name, left in by some savers."""

_ENDINGS = [
    (role, re.compile(r"(?P<module>.+)\." + ending.replace("{adapter}", r"[\w-]+") + r"\Z"))
    for role, ending in ROLES.items()
]
_SHARED = {"vera_A": "vera_A", "vera_B": "vera_B"}
_WRAPPED = ".base_layer"
_SAVED = re.compile(r"\.modules_to_save(?:\.[\w-]+)?\Z")
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Place:
    """Where a stored tensor belongs."""

    module: str
    """Full dotted name in the base, ``model.layers.0.self_attn.q_proj``; empty for tensors that all modules share."""
    role: str
    """Key of `ROLES`, or ``vera_A`` and ``vera_B``."""
    depth: int = 0
    """How many wrappers lie around it; PEFT nests one per parameter of a module with fused experts."""


def place(name: str) -> Place | None:
    """Say where a tensor of an adapter file belongs.

    Args:
        name: As stored, such as ``base_model.model.model.layers.0.mlp.up_proj.lora_A.weight``.

    Returns:
        Its place, or None where the name is not one that any supported PEFT type writes.
    """
    if not name.isprintable():
        return None
    bare = next((name.removeprefix(root) for root in ROOTS if name.startswith(root)), name)
    if bare in _SHARED:
        return Place("", _SHARED[bare])
    for role, ending in _ENDINGS:
        if match := ending.match(bare):
            module = _SAVED.sub("", match["module"])
            depth = 0
            while module.endswith(_WRAPPED):
                module, depth = module.removesuffix(_WRAPPED), depth + 1
            if "lora_" in module or module.endswith(_WRAPPED.removeprefix(".")):
                return None
            return Place(module, role, depth)
    return None


def layer_of(module: str) -> int | None:
    """The layer a module lies in: the first number in its dotted name."""
    return next((int(part) for part in module.split(".") if _NUMBER.fullmatch(part)), None)


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if _NUMBER.fullmatch(part) else (-1, part) for part in name.split(".")]
