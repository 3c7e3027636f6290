"""Whole modules that adapters bring along: those that are no more than the base's own, and those that contradict.

PEFT writes the embedding and the output head beside an adapter when it is told to (``save_embedding_layers``), trained
or not. A copy of what the base has says nothing and has no delta; the bytes tell it from a module that was trained.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from lmoe_cli.adapter.adapter import Adapter
from lmoe_cli.adapter.contents import Part
from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.checkpoint.packed import Packed
from lmoe_cli.files import opened
from lmoe_cli.findings import Finding, finding
from lmoe_cli.loadout.base import Base
from lmoe_cli.loadout.layout import Assignment
from lmoe_cli.loadout.recipe import Take
from lmoe_cli.source import Source

if TYPE_CHECKING:
    from lmoe_cli.loadout.loadout import Loadout

SAVED = ("saved_weight", "saved_bias")
WIDENED = ("F32", "F16", "BF16")
"""Dtypes whose numbers are compared where a copy has another than the base."""
CHUNK_ELEMENTS = 1 << 20


def without_copies(item: Assignment, adapter: Adapter, base: Base) -> Assignment | None:
    """An assignment without tensors that repeat the base's own.

    Args:
        item: What a part of the adapter does to a matrix of the base.
        adapter: Whose part it is.
        base: Of the loadout.

    Returns:
        The same where nothing repeats the base, or where either file is not on this machine; None where nothing else
        is left.
    """
    roles = [role for role in SAVED if role in item.part.tensors]
    if not roles or item.target.index is not None:
        return item
    copies = {role for role in roles if _is_copy(item, role, adapter, base)}
    if item.part.kind == "saved":
        return None if len(copies) == len(roles) else item
    left = {role: tensor for role, tensor in item.part.tensors.items() if role not in copies}
    return replace(item, part=replace(item.part, tensors=left))


def is_unread(item: Assignment, adapter: Adapter, base: Base) -> bool:
    """Whether a part may yet turn out to repeat the base: it brings a module, and not both files are here."""
    tensors = [item.part.tensors[role] for role in SAVED if role in item.part.tensors]
    own = base.stored[item.target.tensor]
    return any(adapter.weights.local(tensor.file) is None for tensor in tensors) or (
        bool(tensors) and base.source.local(own.file) is None
    )


def is_left_out(loadout: Loadout, expert: str, part: Part) -> bool:
    """Whether the recipe takes another expert's whole modules in place of this part."""
    policy = loadout.recipe.modules_to_save
    return is_whole(part) and isinstance(policy, Take) and policy.take != expert


def is_whole(part: Part) -> bool:
    """Whether a part is a whole module, rather than a bias that was trained beside others."""
    return part.kind == "saved" and SAVED[0] in part.tensors and not part.is_beneath


def conflicts(loadout: Loadout) -> Iterator[Finding]:
    """Modules that several experts bring whole: an error where the recipe does not say how to join them.

    An unread module that its adapter's config does not list may be a copy, and is a note until both files are here.
    """
    if loadout.recipe.modules_to_save != "refuse":
        return
    for target, items in loadout.by_target.items():
        owners = [(number, item) for number, item in items if is_whole(item.part)]
        if len(owners) < 2:
            continue
        names = [loadout.experts[number].name for number, _ in owners]
        unsure = [
            loadout.experts[number].name
            for number, item in owners
            if not is_listed(item, (adapter := loadout.experts[number].adapter))
            and is_unread(item, adapter, loadout.base)
        ]
        if len(owners) - len(unsure) > 1:
            message = f"{', '.join(names)} each bring a whole {target.module} of their own"
            hint = f"say 'modules_to_save: blend' or 'modules_to_save: {{take: {names[0]}}}' in the recipe"
            yield finding("saved-conflict", target.module, message, hint)
        else:
            message = f"{', '.join(unsure)}: a {target.module} that no config lists; a copy of the base's is left out"
            yield finding("saved-unread", target.module, message)


def is_listed(item: Assignment, adapter: Adapter) -> bool:
    """Whether the adapter's config says that the module was trained whole."""
    listed = adapter.config.modules_to_save if adapter.config else []
    return item.part.module.endswith(tuple(listed))


def _is_copy(item: Assignment, role: str, adapter: Adapter, base: Base) -> bool:
    module = item.target.tensor.removesuffix(".weight").removesuffix(".bias")
    own = base.stored.get(f"{module}.{role.removeprefix('saved_')}")
    saved = item.part.tensors[role]
    if isinstance(own, Packed):
        return False
    return own is not None and _equal(adapter.weights, saved, base.source, own)


def _equal(first_source: Source, first: Stored, second_source: Source, second: Stored) -> bool:
    """Whether two tensors on this machine hold the same numbers. Stops at the first that differs."""
    kinds = {first.info.dtype, second.info.dtype}
    if first.info.shape != second.info.shape or (len(kinds) > 1 and not kinds <= set(WIDENED)):
        return False
    paths = first_source.local(first.file), second_source.local(second.file)
    if paths[0] is None or paths[1] is None:
        return False
    with opened(paths[0]) as here, opened(paths[1]) as there:
        for start in range(0, first.info.elements, CHUNK_ELEMENTS):
            count = min(CHUNK_ELEMENTS, first.info.elements - start)
            mine = _read(here.fileno(), first, start, count)
            theirs = _read(there.fileno(), second, start, count)
            if len(kinds) > 1:
                mine, theirs = _widened(mine, first), _widened(theirs, second)
            if mine != theirs:
                return False
    return True


def _read(file: int, tensor: Stored, start: int, count: int) -> bytes:
    width = tensor.info.size // tensor.info.elements
    return os.pread(file, count * width, tensor.info.start + start * width)


def _widened(data: bytes, tensor: Stored) -> bytes:
    """Numbers as float32: those of bfloat16 are the upper halves."""
    if tensor.info.dtype == "F32":
        return data
    if tensor.info.dtype == "F16":
        count = len(data) // 2
        return struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", data))
    wide = bytearray(2 * len(data))
    wide[2::4], wide[3::4] = data[0::2], data[1::2]
    return bytes(wide)
