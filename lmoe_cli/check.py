"""Do the parts of a loadout fit together? What names, headers and configs can tell, before a weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from lmoe_cli.adapter.names import HEADS
from lmoe_cli.adapter.summary import quantization_in_name
from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.findings import Finding, RefusedError, errors, finding
from lmoe_cli.loadout.about_router import about_router
from lmoe_cli.loadout.dequantized import METHOD
from lmoe_cli.loadout.identity import Match, canonical, compare, same
from lmoe_cli.loadout.layout import ONE_EXPERT, UNBLENDED_EXPERTS, Assignment, Target
from lmoe_cli.loadout.loadout import Expert, Loadout
from lmoe_cli.loadout.profile import matches, weight_at
from lmoe_cli.loadout.saved import conflicts
from lmoe_cli.loadout.tokenizer import chat_template, differences

EXTREME_SCALING = 64.0
"""Alpha/rank beyond which an adapter is more often broken than strong; real ones lie between 0.25 and 32."""
CONTEXT_TOKENS = 4096
"""Of the conversation that memory is told for, where the base takes as many."""
MAX_NAMED = 3


@dataclass(frozen=True)
class Pair:
    """Two experts side by side."""

    first: str
    second: str
    shared: int
    """Matrices of the base that both change, whatever the adapters call them."""
    overlap: float
    """Share of the matrices that the smaller one changes, 0 to 1."""
    same_base: bool
    """Whether they name the same base."""
    same_rank: bool


@dataclass(frozen=True)
class Report:
    """What a check found out."""

    findings: tuple[Finding, ...]
    pairs: tuple[Pair, ...]
    memory: dict[str, int]
    """Bytes: ``base``, ``experts``, ``cache_per_token`` and ``total`` for a conversation of 4096 tokens."""

    @property
    def ok(self) -> bool:
        return not errors(self.findings)


def check(loadout: Loadout, *, trust_remote_code: bool = False) -> Report:
    """Find everything that would stop a loadout from running, or make it something else than its author thinks.

    Args:
        loadout: What to look at. No tensor is read.
        trust_remote_code: The user lets the base's own code run.
    """
    found = [*_about_base(loadout, trust_remote_code=trust_remote_code)]
    for expert in loadout.experts:
        found += expert.adapter.findings
        if expert.adapter.parts:
            found += _about_expert(loadout, expert)
    found += conflicts(loadout)
    found += about_router(loadout)
    memory = _memory(loadout)
    found += _about_memory(loadout, memory)
    order = {"error": 0, "warning": 1, "note": 2}
    found.sort(key=lambda item: order[item.severity])
    return Report(tuple(found), tuple(_pairs(loadout)), memory)


def require(loadout: Loadout, *, trust_remote_code: bool = False) -> Report:
    """Check a loadout and stop where it does not fit.

    Raises:
        RefusedError: With every finding. Exit code 1.
    """
    report = check(loadout, trust_remote_code=trust_remote_code)
    if not report.ok:
        raise RefusedError(f"{loadout.origin}: the parts do not fit", report.findings)
    return report


def _about_base(loadout: Loadout, *, trust_remote_code: bool) -> Iterator[Finding]:
    base = loadout.base
    if base.remote_code and not trust_remote_code:
        hint = "read that code, then --trust-remote-code"
        yield finding("remote-code", base.ref, f"{base.ref}: its config asks to run code of its repository", hint)
    if base.quantization:
        message = f"{base.ref}: stored quantised ({base.quantization}); it runs, but cannot be folded"
        hint = "bake onto the unquantised model"
        if base.quantization == METHOD:
            hint = "to bake it, choose --base-weights original or dequantized"
        yield finding("base-quantized", base.ref, message, hint)
    else:
        yield from _dtypes(loadout)
    if not base.has_tokenizer:
        yield finding("tokenizer-missing", base.ref, f"{base.ref}: no tokenizer, so it cannot chat")
    elif base.chat_template is None:
        yield finding("template-missing", base.ref, f"{base.ref}: no chat template; text is continued as it is")


def _dtypes(loadout: Loadout) -> Iterator[Finding]:
    """Weights that experts change must be floating-point numbers that are computed with."""
    stored = loadout.base.stored
    strange = [target for target in loadout.by_target if stored[target.tensor].info.dtype not in FLOATS]
    if strange:
        kinds = ", ".join(sorted({stored[target.tensor].info.dtype for target in strange}))
        message = f"{loadout.base.ref}: {_named(target.module for target in strange)} stored as {kinds}"
        hint = f"name a base whose weights are {', '.join(FLOATS.values())}"
        yield finding("base-dtype-unsupported", loadout.base.ref, message, hint)


def _about_expert(loadout: Loadout, expert: Expert) -> Iterator[Finding]:
    yield from _placement(loadout, expert)
    yield from _identity(loadout, expert)
    yield from _weights(loadout, expert)
    yield from _tokenizer(loadout, expert)
    steep = max((part for part in expert.adapter.parts.values()), key=lambda part: abs(part.scaling))
    if abs(steep.scaling) > EXTREME_SCALING:
        message = f"{expert.name}: scaling {steep.scaling:g} at {steep.module}"
        yield finding("scaling-extreme", expert.name, message, "is alpha right? turn its weight down if not")


def _placement(loadout: Loadout, expert: Expert) -> Iterator[Finding]:
    """Every module of the adapter must exist in the base, with the shapes it was trained on."""
    placed, homeless = loadout.assignments[expert.name]
    if homeless:
        of = f"{len(homeless)} of {len(expert.adapter.parts)} modules"
        names = _named(part.module for part in homeless)
        message = f"{expert.name}: {of} do not exist in {loadout.base.ref}: {names}"
        hint = f"it names {expert.adapter.config.base} as its base" if expert.adapter.config else ""
        yield finding("module-missing", expert.name, message, hint)
    model_type = loadout.base.model_type
    strange = [item for item in placed if item.target.index is not None and model_type in UNBLENDED_EXPERTS]
    if strange:
        names = _named(item.part.module for item in strange)
        message = f"{expert.name}: changes fused experts, which lmoe cannot blend in {model_type}: {names}"
        yield finding("experts-unsupported", expert.name, message, "its other modules can be blended")
    biased = [item for item in placed if "lora_B_bias" in item.part.tensors and ONE_EXPERT.match(item.target.module)]
    if biased:
        names = _named(item.part.module for item in biased)
        message = f"{expert.name}: brings biases for fused experts, which have none of their own: {names}"
        yield finding("experts-unsupported", expert.name, message, "its other modules can be blended")
    misfits = [(item, reason) for item in placed if item not in strange and (reason := _misfit(item))]
    for is_vocabulary in (True, False):
        reasons = [reason for item, reason in misfits if _is_vocabulary(loadout, item) is is_vocabulary]
        if reasons:
            code = "vocabulary-resized" if is_vocabulary else "shape-mismatch"
            hint = "resize the base first, or leave it out" if is_vocabulary else "it was trained on another base"
            message = f"{expert.name}: {len(reasons)} shapes do not fit: {_named(reasons)}"
            yield finding(code, expert.name, message, hint)
    for item in placed:
        if item.part.rank > min(item.target.d_out, item.target.d_in):
            message = f"{expert.name}: rank {item.part.rank} is more than {item.part.module} can have"
            yield finding("rank-excessive", expert.name, message)
            break


def _misfit(item: Assignment) -> str | None:
    """How the tensors of a part contradict the shape of its target."""
    part, target = item.part, item.target
    if target.packed:
        return None
    due = (target.d_out, target.d_in)
    shape = part.shape
    if shape and item.rows:
        shape = (item.rows[1] - item.rows[0], shape[1])
    if shape and shape != due:
        return f"{part.module} {shape} on {due}"
    for role, tensor in part.tensors.items():
        if (reason := _role_misfit(role, tensor.info.shape, item)) is not None:
            return f"{part.module} {reason}"
    return None


def _role_misfit(role: str, shape: tuple[int, ...], item: Assignment) -> str | None:
    d_out, d_in = item.target.d_out, item.target.d_in
    elements = math.prod(shape)
    stored = (d_in, d_out) if item.target.transposed else (d_out, d_in)
    match role:
        case "ia3":
            fits = shape in ((d_out, 1), (1, d_in))
        case "saved_weight":
            fits = shape == (stored if len(shape) > 1 else (d_out,))
        case "saved_bias" | "vera_lambda_b":
            fits = elements == d_out
        case _:
            return None
    return None if fits else f"{role} {shape} on {(d_out, d_in)}"


def _is_vocabulary(loadout: Loadout, item: Assignment) -> bool:
    """Whether one side of a matrix is the vocabulary: the input embedding or the output head."""
    is_head = item.target.module.rpartition(".")[2] in HEADS
    return is_head or item.target.tensor == loadout.base.layout.embedding


def _identity(loadout: Loadout, expert: Expert) -> Iterator[Finding]:
    config = expert.adapter.config
    claim = config.base if config else None
    verdict = compare(claim, loadout.base)
    name = expert.name
    if verdict is Match.OTHER and claim:
        if any(same(canonical(accepted), canonical(claim)) for accepted in expert.entry.accept_base):
            yield finding("base-accepted", name, f"{name}: trained on {claim}, accepted by the recipe")
        else:
            message = f"{name}: trained on {claim}, not on {loadout.base.ref}"
            hint = f"use that base, or accept it by name: accept_base: [{claim}]"
            yield finding("base-mismatch", name, message, hint)
    elif verdict is Match.UNKNOWN:
        said = f"names {claim} as its base" if claim else "does not name its base"
        yield finding("base-unconfirmed", name, f"{name}: {said}; only the shapes speak for {loadout.base.ref}")
    if (mark := quantization_in_name(claim)) and verdict is Match.SAME and loadout.base.quantization is None:
        message = f"{name}: trained on a base quantised as {mark}; on full weights it is slightly another function"
        yield finding("base-was-quantized", name, message)


def _weights(loadout: Loadout, expert: Expert) -> Iterator[Finding]:
    if isinstance(expert.entry.weight, float | int):
        return
    placed, _ = loadout.assignments[expert.name]
    modules = [item.part.module for item in placed]
    for rule in expert.entry.weight:
        if not any(matches(rule.match, module) for module in modules):
            message = f"{expert.name}: the weight rule '{rule.match}' matches none of its {len(modules)} modules"
            yield finding("weight-unmatched", expert.name, message, f"its modules look like {_named(modules[:1])}")
    left = [module for module in modules if not any(matches(rule.match, module) for rule in expert.entry.weight)]
    if left:
        message = f"{expert.name}: no weight rule matches {len(left)} modules, which keep weight 1: {_named(left)}"
        yield finding("weight-default", expert.name, message, 'end the list with {match: "*", value: …}')
    if all(weight_at(expert.entry.weight, module) == 0 for module in modules):
        yield finding("weight-zero", expert.name, f"{expert.name}: its rules give every module weight 0")


def _tokenizer(loadout: Loadout, expert: Expert) -> Iterator[Finding]:
    """A tokenizer or template that the adapter brings along is not used; say so where it differs."""
    source, base = expert.adapter.source, loadout.base
    if different := differences(source, base.source):
        message = f"{expert.name}: brings a tokenizer whose {_named(different)} differs from the base's; it is not used"
        yield finding("tokenizer-differs", expert.name, message, "were tokens added? then the base must be resized")
    try:
        template = chat_template(source)
    except InvalidFileError:  # a damaged file that nobody uses
        return
    if template is not None and template.strip() != (base.chat_template or "").strip():
        message = f"{expert.name}: was trained with another chat template, which is not used"
        yield finding("template-differs", expert.name, message)


def _memory(loadout: Loadout) -> dict[str, int]:
    config = loadout.base.text_config

    def number(*names: str, default: int = 0) -> int:
        return next((value for name in names if isinstance(value := config.get(name), int)), default)

    heads = number("num_attention_heads", "n_head", default=1)
    width = number("head_dim") or number("hidden_size", "n_embd") // max(heads, 1)
    keys = number("num_key_value_heads", default=heads)
    item = 4 if loadout.base.dtype == "float32" else 2
    per_token = 2 * number("num_hidden_layers", "n_layer") * keys * width * item
    base, experts = loadout.base.size, sum(expert.adapter.size for expert in loadout.experts)
    context = min(CONTEXT_TOKENS, number("max_position_embeddings", "n_positions", default=CONTEXT_TOKENS))
    total = base + experts + per_token * context
    return {"base": base, "experts": experts, "cache_per_token": per_token, "context": context, "total": total}


def _about_memory(loadout: Loadout, memory: dict[str, int]) -> Iterator[Finding]:
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system that does not tell
        return
    if memory["total"] > installed:
        message = f"needs about {memory['total'] / 1e9:.1f} GB, this machine has {installed / 1e9:.1f} GB"
        yield finding("memory-short", loadout.origin, message, "use a GPU with enough memory, or --quantize nf4")


def _pairs(loadout: Loadout) -> Iterator[Pair]:
    ranks: list[dict[Target, int]] = [{} for _ in loadout.experts]
    for target, items in loadout.by_target.items():
        for number, item in items:
            ranks[number][target] = max(item.part.rank, ranks[number].get(target, 0))
    for (one, first), (two, second) in combinations(enumerate(loadout.experts), 2):
        shared = ranks[one].keys() & ranks[two].keys()
        smaller = min(len(ranks[one]), len(ranks[two]))
        claims = [canonical(item.adapter.config.base or "") if item.adapter.config else "" for item in (first, second)]
        yield Pair(
            first.name,
            second.name,
            len(shared),
            len(shared) / smaller if smaller else 0.0,
            bool(claims[0]) and same(*claims),
            all(ranks[one][target] == ranks[two][target] for target in shared),
        )


def _named(names: Any) -> str:
    """The first few of many names."""
    found = list(dict.fromkeys(str(name) for name in names))
    more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
    return ", ".join(found[:MAX_NAMED]) + more
