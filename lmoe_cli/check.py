"""Do the parts of a loadout fit together? What names, headers and configs can tell, before a weight is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

from lmoe_cli.adapter.summary import quantization_in_name
from lmoe_cli.checkpoint.header import FLOATS
from lmoe_cli.errors import InvalidFileError
from lmoe_cli.findings import Finding, RefusedError, errors, finding
from lmoe_cli.loadout.about_router import about_router
from lmoe_cli.loadout.dequantized import METHOD
from lmoe_cli.loadout.identity import Match, at_revision, canonical, compare, same
from lmoe_cli.loadout.layout import Target
from lmoe_cli.loadout.loadout import Expert, Loadout
from lmoe_cli.loadout.placement import about_placement
from lmoe_cli.loadout.profile import matches, weight_at
from lmoe_cli.loadout.saved import conflicts
from lmoe_cli.loadout.tokenizer import chat_template, differences
from lmoe_cli.readable import named

EXTREME_SCALING = 64.0
"""Alpha/rank beyond which an adapter is more often broken than strong; real ones lie between 0.25 and 32."""
CONTEXT_TOKENS = 4096
"""Of the conversation that memory is told for, where the base takes as many."""


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
        message = f"{loadout.base.ref}: {named(target.module for target in strange)} stored as {kinds}"
        hint = f"name a base whose weights are {', '.join(FLOATS.values())}"
        yield finding("base-dtype-unsupported", loadout.base.ref, message, hint)


def _about_expert(loadout: Loadout, expert: Expert) -> Iterator[Finding]:
    yield from about_placement(loadout, expert)
    yield from _identity(loadout, expert)
    yield from _weights(loadout, expert)
    yield from _tokenizer(loadout, expert)
    steep = max((part for part in expert.adapter.parts.values()), key=lambda part: abs(part.scaling))
    if abs(steep.scaling) > EXTREME_SCALING:
        message = f"{expert.name}: scaling {steep.scaling:g} at {steep.module}"
        yield finding("scaling-extreme", expert.name, message, "is alpha right? turn its weight down if not")


def _identity(loadout: Loadout, expert: Expert) -> Iterator[Finding]:
    config = expert.adapter.config
    claim = config.base if config else None
    verdict = compare(claim, loadout.base)
    name = expert.name
    if verdict is Match.SAME and config and claim:
        verdict = at_revision(claim, config.revision, loadout.base)
        claim += f"@{config.revision}" if verdict is not Match.SAME else ""
    if verdict is Match.OTHER and claim:
        if any(_accepts(accepted, claim) for accepted in expert.entry.accept_base):
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


def _accepts(accepted: str, claim: str) -> bool:
    """Whether a base that a recipe accepts is the one that an adapter names, at its revision where it names one."""
    revision = claim.partition("@")[2]
    return same(canonical(accepted), canonical(claim)) and revision in ("", accepted.partition("@")[2])


def _weights(loadout: Loadout, expert: Expert) -> Iterator[Finding]:
    if isinstance(expert.entry.weight, float | int):
        return
    placed, _ = loadout.assignments[expert.name]
    modules = [item.part.module for item in placed]
    for rule in expert.entry.weight:
        if not any(matches(rule.match, module) for module in modules):
            message = f"{expert.name}: the weight rule '{rule.match}' matches none of its {len(modules)} modules"
            yield finding("weight-unmatched", expert.name, message, f"its modules look like {named(modules[:1])}")
    left = [module for module in modules if not any(matches(rule.match, module) for rule in expert.entry.weight)]
    if left:
        message = f"{expert.name}: no weight rule matches {len(left)} modules, which keep weight 1: {named(left)}"
        yield finding("weight-default", expert.name, message, 'end the list with {match: "*", value: …}')
    if all(weight_at(expert.entry.weight, module) == 0 for module in modules):
        yield finding("weight-zero", expert.name, f"{expert.name}: its rules give every module weight 0")


def _tokenizer(loadout: Loadout, expert: Expert) -> Iterator[Finding]:
    """A tokenizer or template that the adapter brings along is not used; say so where it differs."""
    source, base = expert.adapter.source, loadout.base
    if different := differences(source, base.source):
        message = f"{expert.name}: brings a tokenizer whose {named(different)} differs from the base's; it is not used"
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
