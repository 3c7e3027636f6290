"""Which stored tensor of a base an adapter's module means, from names and shapes alone.

Adapters name modules as the model class does, checkpoints name tensors as they were saved; both change between versions
of transformers. What differs: wrappers in front (``model.``, ``transformer.``, ``language_model.``), tied output heads,
Conv1D's transposed weights, and experts of a mixture stored one by one or fused into one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lmoe_cli.adapter.contents import Part
from lmoe_cli.adapter.names import EMBEDDINGS, HEAD
from lmoe_cli.adapter.names import HEADS as HEADS
from lmoe_cli.checkpoint.index import Stored

WRAPPERS = {"model", "transformer", "language_model", "base_model", "text_model", "gpt_neox", "backbone", "decoder"}
CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc", "q_attn"), "openai-gpt": ("c_attn", "c_proj", "c_fc")}
"""model_type → modules that keep their weight as (d_in, d_out)."""
TRANSPOSED_EXPERTS = ("aria_text", "gpt_oss")
"""model_types whose fused experts are (experts, d_in, d_out)."""
UNBLENDED_EXPERTS = ("llama4", "llama4_text", "longcat_flash")
"""model_types whose module of fused experts is not called with tokens, choices and weights, or is only theirs."""
PARALLEL_EXPERTS = ("jetmoe",)
"""model_types that stack the weights of experts in modules which are called as layers of a kind of their own."""
UNCALLED = {
    **dict.fromkeys(("mamba", "falcon_mamba", "jamba"), ("dt_proj",)),
    "rwkv": ("attention.output", "feed_forward.value"),
}
"""model_type → ends of modules whose weights the class computes with, or changes, without calling them."""
OTHER_LOOKUPS = {
    **dict.fromkeys(
        (
            "bart",
            "bigbird_pegasus",
            "biogpt",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "opt",
            "pegasus",
            "plbart",
            "roformer",
            "trocr",
            "whisper",
        ),
        ("embed_positions",),
    ),
    "prophetnet": ("position_embeddings",),
    **dict.fromkeys(("inkling_text", "inkling2_text", "muse_glimmer_text", "muse_spark_text"), ("embed_tokens",)),
}
"""model_type → ends of embeddings that are more than a look-up of their rows."""
INTERLEAVED_EXPERTS = ("gpt_oss",)
"""model_types whose fused gate and up projections alternate row by row."""
HALVES = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1}
"""Which half of a fused ``gate_up_proj`` an expert's own projection is."""
UP = tuple(name for name, half in HALVES.items() if half == 1)
DOWN = ("down_proj", "w2")
RENAMED = (
    (".block_sparse_moe.input_linear", ".mlp.experts.gate_up_proj"),
    (".block_sparse_moe.output_linear", ".mlp.experts.down_proj"),
    (".block_sparse_moe.router.layer", ".mlp.router"),
    (".block_sparse_moe.", ".mlp."),
    (".mlp.experts.fc1.weight", ".mlp.experts.gate_up_proj"),
    (".mlp.experts.fc2.weight", ".mlp.experts.down_proj"),
    ("vision_tower.vision_model.", "vision_tower."),
)
"""Parts of names that differ between versions of transformers, or between checkpoints and classes."""
ONE_EXPERT = re.compile(r"(?P<parent>.+\.experts)\.(?P<number>\d+)\.(?P<leaf>\w+)\Z")


@dataclass(frozen=True)
class Target:
    """One matrix of the base that adapters may change, and where it is stored."""

    module: str
    """As the checkpoint calls it; of an expert in a mixture, its own projection: ``….experts.3.up_proj``."""
    tensor: str
    """Name in the checkpoint."""
    d_out: int
    d_in: int
    transposed: bool = False
    """Stored as (d_in, d_out)."""
    index: int | None = None
    """Which slice of a fused tensor."""
    rows: tuple[int, int] | None = None
    """Which outputs of that slice, where gate and up are fused."""
    tied: bool = False
    """An output head without a tensor of its own: it reads the input embedding's."""
    packed: bool = False
    """Stored quantised; the shape is what the adapter says."""


@dataclass(frozen=True)
class Assignment:
    """What one part of an adapter does to one target."""

    part: Part
    target: Target
    expert: int = 0
    """Which of the experts stacked in the part's tensors."""
    rows: tuple[int, int] | None = None
    """Which outputs of the part's B, where the base keeps them apart."""


class Layout:
    """A base's tensors, found by the names that adapters use.

    Args:
        stored: The checkpoint's tensors by name.
        config: The base's ``config.json``.
        looked_up: Tensors beside the input embedding that are embeddings too, as positions may be.
    """

    def __init__(
        self, stored: Mapping[str, Stored], config: Mapping[str, Any], looked_up: Collection[str] = ()
    ) -> None:
        self.stored = stored
        self._looked_up = looked_up
        self.model_type = str(config.get("model_type", ""))
        self._by_key: dict[str, list[str]] = {}
        for name in stored:
            self._by_key.setdefault(module_key(name), []).append(name)

    def tensor(self, module: str, leaf: str = "weight") -> str | None:
        """The stored name of a module's parameter, or None where there is none or no telling which."""
        exact = f"{module}.{leaf}" if leaf else module
        if exact in self.stored:
            return exact
        found = self._by_key.get(module_key(exact), [])
        return found[0] if len(found) == 1 else None

    @cached_property
    def embedding(self) -> str | None:
        """The tensor of the input embedding."""
        found = [name for name in self.stored if name.rpartition(".")[0].rpartition(".")[2] in EMBEDDINGS]
        return found[0] if len(found) == 1 else None

    def assign(self, part: Part) -> list[Assignment]:
        """Find the matrices that a part changes.

        Returns:
            One assignment per matrix; none where the base has no such module.
        """
        if part.experts > 1:
            return list(self._fused(part))
        if match := ONE_EXPERT.match(part.module):
            return list(self._one_of_fused(part, match["parent"], int(match["number"]), match["leaf"]))
        target = self._plain(part)
        return [Assignment(part, target)] if target else []

    def other_ends(self, placed: Sequence[Assignment], *, is_tied: bool) -> list[Assignment]:
        """What an adapter does to the other end of a tied base, where it brings the matrix that its factors stand on.

        PEFT writes that matrix into the one that embedding and head share; beside a module that was trained whole the
        other end stays the base's.

        Args:
            placed: All that the adapter does.
            is_tied: Whether the base is.
        """
        if not is_tied:
            return []
        ends = [item for item in placed if item.target.tied or item.target.tensor == self.embedding]
        if len({item.target for item in ends}) > 1:
            return []
        found = []
        for item in ends:
            if item.part.kind != "saved" and "saved_weight" in item.part.tensors:
                other = self.embedding.rpartition(".")[0] if item.target.tied and self.embedding else HEAD
                saved = {"saved_weight": item.part.tensors["saved_weight"]}
                found += self.assign(Part(other, "saved", saved, is_beneath=True))
        return found

    def _plain(self, part: Part) -> Target | None:
        name, tied = self.tensor(part.module), False
        parent, _, leaf = part.module.rpartition(".")
        if name is None and leaf in HEADS:
            stored = (self.tensor(f"{parent}.{head}" if parent else head) for head in HEADS)
            name = next((found for found in stored if found), None)
            name, tied = (name, False) if name else (self.embedding, True)
        if name is None and part.kind == "saved":
            name = self.tensor(part.module, "bias")
        if name is None:
            return None
        shape = self.stored[name].info.shape
        looked_up = name == self.embedding or name in self._looked_up
        transposed = (looked_up or is_conv1d(self.model_type, part.module)) and not tied
        if len(shape) == 2 and not self._is_packed(name):
            d_out, d_in = (shape[1], shape[0]) if transposed else (shape[0], shape[1])
            return Target(HEAD if tied else _module_of(name), name, d_out, d_in, transposed, tied=tied)
        if self._is_packed(name) and part.shape:
            return Target(_module_of(name), name, *part.shape, packed=True)
        if len(shape) == 1 and part.kind == "saved":  # a norm's weight, or a bias
            return Target(_module_of(name), name, shape[0], 1)
        return None

    def _is_packed(self, name: str) -> bool:
        return self.stored[name].info.dtype in ("U8", "I8", "I32") or f"{name}.absmax" in self.stored

    def _one_of_fused(self, part: Part, parent: str, number: int, leaf: str) -> Iterator[Assignment]:
        if plain := self._plain(part):
            yield Assignment(part, plain)
            return
        if self.model_type in INTERLEAVED_EXPERTS:
            return
        half = HALVES.get(leaf)
        targets = list(self._slices(parent, "down_proj" if half is None else "gate_up_proj", number))
        if not targets and leaf in UP:  # experts without a gate
            half, targets = None, list(self._slices(parent, "up_proj", number))
        for target in targets:
            if half is None:
                yield Assignment(part, target)
            else:
                middle = target.d_out // 2
                rows = (half * middle, (half + 1) * middle)
                module = f"{parent}.{number}.{leaf}"
                yield Assignment(
                    part,
                    Target(module, target.tensor, middle, target.d_in, target.transposed, number, rows),
                )

    def _fused(self, part: Part) -> Iterator[Assignment]:
        parent, _, leaf = renamed(part.module).rpartition(".")
        for number in range(part.experts):
            if targets := list(self._slices(parent, leaf, number)):
                yield from (Assignment(part, target, number) for target in targets)
            else:
                yield from self._split(part, parent, leaf, number)

    def experts_of(self, target: Target) -> int:
        """How many experts the mixture has that a matrix is of; 0 where it is of none."""
        shape = self.stored[target.tensor].info.shape
        if target.index is not None and len(shape) == 3:
            return shape[0]
        match = ONE_EXPERT.match(target.module)
        return len(self._mixtures.get(match["parent"], ())) if match else 0

    @cached_property
    def _mixtures(self) -> Mapping[str, set[str]]:
        """Mixture whose experts are stored one by one → their numbers."""
        found: dict[str, set[str]] = {}
        for name in self.stored:
            if match := ONE_EXPERT.match(_module_of(name)):
                found.setdefault(match["parent"], set()).add(match["number"])
        return found

    def _slices(self, parent: str, leaf: str, number: int) -> Iterator[Target]:
        """A slice of a tensor that holds all experts."""
        name = self.tensor(f"{parent}.{leaf}", "") or self.tensor(f"{parent}.{leaf}")
        if name is None or len(self.stored[name].info.shape) != 3:
            return
        count, first, second = self.stored[name].info.shape
        transposed = self.model_type in TRANSPOSED_EXPERTS
        d_out, d_in = (second, first) if transposed else (first, second)
        if number < count:
            yield Target(f"{parent}.{number}.{leaf}", name, d_out, d_in, transposed, number)

    def _split(self, part: Part, parent: str, leaf: str, number: int) -> Iterator[Assignment]:
        """The same expert where the checkpoint stores its projections one by one."""
        names = {"gate_up_proj": sorted(HALVES, key=lambda name: HALVES[name]), "up_proj": UP}.get(leaf, DOWN)
        start = 0
        for name in names:
            stored = self.tensor(f"{parent}.{number}.{name}")
            if stored is None:
                continue
            d_out, d_in = self.stored[stored].info.shape
            target = Target(_module_of(stored), stored, d_out, d_in)
            yield Assignment(part, target, number, (start, start + d_out) if leaf == "gate_up_proj" else None)
            start += d_out


def is_conv1d(model_type: str, module: str) -> bool:
    """Whether a model class keeps the weight of a linear layer as (d_in, d_out)."""
    return module.rpartition(".")[2] in CONV1D.get(model_type, ())


def module_key(name: str) -> str:
    """A dotted name without the wrappers in front that differ between classes and versions."""
    parts = renamed(name).split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        del parts[0]
    return ".".join(parts)


def renamed(name: str) -> str:
    """A dotted name in the words of the newest version."""
    for before, after in RENAMED:
        name = name.replace(before, after)
    return name


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0]
