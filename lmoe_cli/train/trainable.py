"""The factors of a bank as parameters: trained where they are computed with, as adapters store them.

    B = s B_0,   so that y = W x + sum_e g_e s_e B_0e A_e x

A and B_0 are what is trained, stacked over experts and over the modules that read one input, in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lmoe_cli.adapter.contents import Part
from lmoe_cli.bank.bank import Bank
from lmoe_cli.bank.linear import BlendedLinear
from lmoe_cli.bank.shared import SharedInput
from lmoe_cli.bank.stacked import StackedB
from lmoe_cli.bank.tree import Tree
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.loadout import Loadout


class TrainedB(StackedB):
    """A stack of B whose numbers are a parameter times each expert's scaling.

    Args:
        stack: Made of B with the scalings folded in.
        scaling: s of each column, (sum of R,), float32.
    """

    def __init__(self, stack: StackedB, scaling: Tensor) -> None:
        self._columns = stack._columns
        self._is_piled = False
        self._scaling = scaling.to(stack.matrix.device)
        self.parameter = nn.Parameter((stack.matrix.float() / self._scaling).T.contiguous())  # (sum of R, d_out)

    @property
    def tensor(self) -> Tensor:  # type: ignore[override]
        return (self.parameter * self._scaling[:, None]).T

    @property
    def _transposed(self) -> Tensor:  # type: ignore[override]
        return self.parameter * self._scaling[:, None]


@dataclass(frozen=True)
class TrainedSite:
    """Modules that read one input, and what is trained on them."""

    names: tuple[str, ...]
    shared: SharedInput
    stacks: tuple[TrainedB, ...]

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Name → parameter."""
        a: nn.Parameter = self.shared.a  # type: ignore[assignment]
        return {f"{self.names[0]}.a": a} | {
            f"{name}.b": stack.parameter for name, stack in zip(self.names, self.stacks, strict=True)
        }

    def factors(self, expert: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Module → A (r, d_in) and B_0 (d_out, r) of an expert."""
        found = {}
        for name, member, stack in zip(self.names, self.shared.members, self.stacks, strict=True):
            for piece in member.pieces.get(expert, ()):
                found[name] = (self.shared.a[piece.rows], stack.parameter[piece.columns].T)
        return found


def require_plain(loadout: Loadout) -> None:
    """Refuse experts that hold more than plain LoRA on linear layers.

    Raises:
        UsageError: Naming what they hold.
    """
    for expert in loadout.experts:
        for part in expert.adapter.parts.values():
            odd = sorted(set(part.tensors) - {"lora_A", "lora_B"})
            if part.kind != "lora" or odd or part.experts > 1:
                what = f"{', '.join(odd)} on {part.module}" if odd else f"{part.kind} on {part.module}"
                message = f"{expert.name}: holds {what}; only plain LoRA on linear layers is trained"
                hint = "keep it as it is and train the gate alone (train: gate), or begin with another adapter"
                raise UsageError("train-unsupported", message, hint=hint)


def make_trainable(model: nn.Module, bank: Bank, loadout: Loadout) -> list[TrainedSite]:
    """Turn the factors of a bank into parameters, with the numbers that the adapters store.

    Args:
        model: The base, with the bank on it or without.
        bank: Of the loadout.
        loadout: Of plain LoRA on linear layers; see `require_plain`.
    """
    parts = parts_at(model, loadout)
    groups: dict[int, list[tuple[str, BlendedLinear]]] = {}
    for name, module in bank.modules.items():
        assert isinstance(module, BlendedLinear), "plain LoRA on linear layers"
        module.has_plain_siblings = False
        groups.setdefault(id(module.shared), []).append((name, module))
    sites = [_trained(group, parts) for group in groups.values()]
    for number, expert in enumerate(loadout.experts):
        adapter = expert.adapter
        with TensorReader(adapter.stored, adapter.weights.require) as reader, torch.no_grad():
            for site in sites:
                for name, (a, b) in site.factors(number).items():
                    tensors = parts[name, number].tensors
                    a.copy_(reader.tensor(tensors["lora_A"].name))
                    b.copy_(reader.tensor(tensors["lora_B"].name))
    return sites


def parts_at(model: nn.Module, loadout: Loadout) -> dict[tuple[str, int], Part]:
    """Module of the model and number of an expert → what its adapter holds there.

    Raises:
        UsageError: An adapter names a module in several ways.
    """
    tree = Tree(model)
    found: dict[tuple[str, int], Part] = {}
    for items in loadout.by_target.values():
        for number, item in items:
            name = tree.find(item).module
            if (name, number) in found:
                expert = loadout.experts[number].name
                message = f"{expert}: names {name} in several ways; only one place of each can be trained"
                raise UsageError("train-unsupported", message, hint="train the gate alone (train: gate)")
            found[name, number] = item.part
    return found


def _trained(group: list[tuple[str, BlendedLinear]], parts: Mapping[tuple[str, int], Part]) -> TrainedSite:
    shared = group[0][1].shared
    assert shared is not None, "plain LoRA"
    group.sort(key=lambda pair: pair[1].member)
    a = shared.a.detach().float().clone()
    del shared._buffers["a"]
    shared.register_parameter("a", nn.Parameter(a))
    stacks = []
    for name, module in group:
        assert module.b is not None, "plain LoRA"
        pieces = [(expert, piece) for expert, own in shared.members[module.member].pieces.items() for piece in own]
        scalings = [torch.full((piece.rank,), parts[name, expert].scaling) for expert, piece in pieces]
        module.b = stack = TrainedB(module.b, torch.cat(scalings))
        stacks.append(stack)
    shared.use(stacks)
    return TrainedSite(tuple(name for name, _ in group), shared, tuple(stacks))
