"""Does every part of an adapter have a place in the base, of its own shape?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from lmoe_cli.adapter.names import HEADS
from lmoe_cli.findings import Finding, finding
from lmoe_cli.loadout.layout import (
    ONE_EXPERT,
    OTHER_LOOKUPS,
    PARALLEL_EXPERTS,
    UNBLENDED_EXPERTS,
    UNCALLED,
    Assignment,
    is_conv1d,
)
from lmoe_cli.loadout.loadout import Expert, Loadout
from lmoe_cli.loadout.saved import is_listed, is_unread, is_whole, without_copies
from lmoe_cli.readable import named


def about_placement(loadout: Loadout, expert: Expert) -> Iterator[Finding]:
    """Every module of the adapter must exist in the base, with the shapes it was trained on."""
    placed, homeless = loadout.assignments[expert.name]
    if homeless:
        of = f"{len(homeless)} of {len(expert.adapter.parts)} modules"
        names = named(part.module for part in homeless)
        message = f"{expert.name}: {of} do not exist in {loadout.base.ref}: {names}"
        hint = f"it names {expert.adapter.config.base} as its base" if expert.adapter.config else ""
        yield finding("module-missing", expert.name, message, hint)
    model_type = loadout.base.model_type
    are_strange = model_type in (*UNBLENDED_EXPERTS, *PARALLEL_EXPERTS)
    strange = [item for item in placed if item.target.index is not None and are_strange]
    if strange:
        names = named(item.part.module for item in strange)
        message = f"{expert.name}: changes fused experts, which lmoe cannot blend in {model_type}: {names}"
        yield finding("experts-unsupported", expert.name, message, "its other modules can be blended")
    lookups = [item for item in placed if f".{item.part.module}".endswith(_ends(OTHER_LOOKUPS, model_type))]
    if changed := [item for item in lookups if not _may_be_a_copy(loadout, expert, item)]:
        names = named(item.part.module for item in changed)
        message = f"{expert.name}: in {model_type} an embedding is more than a look-up of its rows: {names}"
        yield finding("module-unsupported", expert.name, message, "train on its other modules")
    yield from _about_stacks(loadout, expert, placed)
    saved = {part.module.rpartition(".")[2] for part in expert.adapter.parts.values() if part.kind == "saved"}
    listed = expert.adapter.config.modules_to_save if expert.adapter.config else []
    absent = [name for name in listed if name.rpartition(".")[2] not in saved and _has_module(loadout, name)]
    if absent:
        message = f"{expert.name}: its config says that {named(absent)} was trained whole, and its files hold none"
        yield finding("saved-missing", expert.name, message, "it may have been saved by half: ask its author")
    uncalled = [item for item in placed if f".{item.part.module}".endswith(_ends(UNCALLED, model_type))]
    if uncalled:
        names = named(item.part.module for item in uncalled)
        message = f"{expert.name}: {model_type} computes with the weights of {names} without calling these modules"
        yield finding("module-uncalled", expert.name, message, "train on its other modules")
    biased = [item for item in placed if "lora_B_bias" in item.part.tensors and ONE_EXPERT.match(item.target.module)]
    if biased:
        names = named(item.part.module for item in biased)
        message = f"{expert.name}: brings biases for fused experts, which have none of their own: {names}"
        yield finding("experts-unsupported", expert.name, message, "its other modules can be blended")
    misfits = [(item, reason) for item in placed if item not in strange and (reason := _misfit(item))]
    for is_vocabulary in (True, False):
        reasons = [reason for item, reason in misfits if _is_vocabulary(loadout, item) is is_vocabulary]
        if reasons:
            code = "vocabulary-resized" if is_vocabulary else "shape-mismatch"
            hint = "resize the base first, or leave it out" if is_vocabulary else "it was trained on another base"
            message = f"{expert.name}: {len(reasons)} shapes do not fit: {named(reasons)}"
            yield finding(code, expert.name, message, hint)
    for item in placed:
        if item.part.rank > min(item.target.d_out, item.target.d_in):
            message = f"{expert.name}: rank {item.part.rank} is more than {item.part.module} can have"
            yield finding("rank-excessive", expert.name, message)
            break


def _has_module(loadout: Loadout, name: str) -> bool:
    return any(f".{stored.rpartition('.')[0]}".endswith(f".{name}") for stored in loadout.base.stored) or name in HEADS


def _ends(names: Mapping[str, tuple[str, ...]], model_type: str) -> tuple[str, ...]:
    return tuple(f".{name}" for name in names.get(model_type, ()))


def _about_stacks(loadout: Loadout, expert: Expert, placed: list[Assignment]) -> Iterator[Finding]:
    """As many experts must be stacked in an adapter's tensors as the base's mixture has, and stored as it has them."""
    layout = loadout.base.layout
    stacks = {item.part.module: (item.part.experts, layout.experts_of(item.target)) for item in placed}
    if wrong := [name for name, (own, due) in stacks.items() if own > 1 and own != due]:
        told = named(f"{name} of {stacks[name][0]} experts on {stacks[name][1]}" for name in wrong)
        message = f"{expert.name}: {len(wrong)} parameters do not fit: {told}"
        yield finding("shape-mismatch", expert.name, message, "it was trained on another base")
    if turned := [item for item in placed if item.part.is_parameter and is_conv1d(layout.model_type, item.part.module)]:
        names = named(item.part.module for item in turned)
        message = f"{expert.name}: changes parameters that {layout.model_type} keeps transposed: {names}"
        yield finding("module-unsupported", expert.name, message, "train these layers by target_modules")


def _may_be_a_copy(loadout: Loadout, expert: Expert, item: Assignment) -> bool:
    """Whether a module repeats the base's own, or may yet turn out to, when both files are here."""
    change = without_copies(item, expert.adapter, loadout.base)
    return change is None or (
        is_whole(item.part) and not is_listed(item, expert.adapter) and is_unread(item, expert.adapter, loadout.base)
    )


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
