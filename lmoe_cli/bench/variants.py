"""The ways to run a base that are measured against each other, each put in place and taken away again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_cli.bank.bank import Bank, build_bank
from lmoe_cli.bank.linear import BlendedLinear
from lmoe_cli.bench.work import SEED, Prepare
from lmoe_cli.engine.attach import attach, detach, put
from lmoe_cli.engine.base_model import quietly
from lmoe_cli.engine.compiled import compiled_step, unroll
from lmoe_cli.engine.engine import Engine
from lmoe_cli.loadout.loadout import Loadout


def _nothing(*_: Any) -> None:
    pass


@dataclass(frozen=True)
class Variant:
    """One way to run the base."""

    name: str
    """``base``, ``bare``, ``blend``, ``routed``, ``folded`` or ``peft``."""
    experts: int = 0
    size: int = 0
    """Bytes of experts that a step reads."""
    held: int = 0
    """Bytes of experts in memory."""
    enter: Callable[[], None] = _nothing
    leave: Callable[[], None] = _nothing
    prepare: Prepare = _nothing


def base() -> Variant:
    """The base as it was loaded, computed as transformers does."""
    return Variant("base")


def bare(model: nn.Module, bank: Bank) -> Variant:
    """The base without experts, by the kernels that a blend is computed with: what experts cost is against this."""
    return Variant("bare", enter=lambda: attach(model, bank.bare), leave=lambda: detach(model, bank.bare))


def blend(model: nn.Module, bank: Bank, gating: Gating | None = None) -> Variant:
    """The base with a bank on it.

    Args:
        model: The base.
        bank: Its gates stay as they are where ``gating`` is None.
        gating: What gives rows or tokens blends of their own.
    """
    experts = len(bank.names)
    read = bank.size if gating is None or gating.top is None else bank.size * min(gating.top, experts) // experts
    return Variant(
        "blend",
        experts,
        read,
        bank.size,
        lambda: attach(model, bank.live),
        lambda: detach(model, bank.live),
        _nothing if gating is None else lambda rows, tokens: bank.gates.set(gating.gates(rows, tokens, experts)),
    )


class Gating:
    """Makes gates as a router would: those of each row of a batch, or of each token.

    Args:
        top: How many experts a token meets; None gives blends of all experts.
        of_tokens: Give such a blend to each token, rather than to each row.
    """

    def __init__(self, top: int | None = None, *, of_tokens: bool = False) -> None:
        self.top = top
        self._of_tokens = of_tokens
        self._generator = torch.Generator().manual_seed(SEED)

    def gates(self, rows: int, tokens: int, experts: int) -> Tensor:
        """Random gates: (rows, E), or (rows, tokens, E), of which all but ``top`` are zero where that is said."""
        if self.top is None:
            shape = (rows, tokens, experts) if self._of_tokens else (rows, experts)
            return torch.rand(shape, generator=self._generator) / experts
        chance = torch.rand(rows, tokens, experts, generator=self._generator)
        chosen = chance.topk(min(self.top, experts), dim=-1).indices
        return torch.zeros_like(chance).scatter(-1, chosen, 1.0 / self.top)


def counts(most: int) -> list[int]:
    """Numbers of experts to measure, doubled each time.

    The banks of all of them together hold less than three times the bytes of the largest.
    """
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def of_engine(engine: Engine, experts: int, gating: Gating | None = None) -> Variant:
    """An engine's base with the first few of its experts on it, at the recipe's weights unless told otherwise.

    Of a recipe whose router decides for each token these are fixed weights, too; see `routed`.
    """
    loadout = engine.loadout.live
    if experts == len(loadout.experts) and engine.router.scope != "token":
        return blend(engine.model, engine.bank, gating)
    few = replace(loadout, experts=loadout.experts[:experts])
    bank = build_bank(engine.model, few, next(engine.model.parameters()).dtype)
    bank.gates.set([expert.weight for expert in few.experts])
    return blend(engine.model, bank, gating)


def routed(engine: Engine) -> Variant:
    """An engine's base with all of its experts, and the recipe's router that decides for each token."""
    experts, settings, gate = len(engine.loadout.experts), engine.loadout.recipe.router, engine.loadout.gate
    kept = gate.settings.kept if gate else getattr(settings, "top_k", None)
    read = engine.bank.size * min(kept or experts, experts) // max(experts, 1)
    return Variant("routed", experts, read, engine.bank.size, engine.attach, lambda: _off(engine))


def _off(engine: Engine) -> None:
    engine.detach()


def folded_engine(engine: Engine) -> Variant:
    """An engine's base with all of its experts folded in."""

    def enter() -> None:
        engine.attach()
        engine.fold()

    return Variant("folded", len(engine.loadout.experts), enter=enter, leave=lambda: _off(engine))


def folded(model: nn.Module, bank: Bank, restore: Callable[[str, nn.Parameter], None]) -> Variant:
    """The base with a bank's low-rank deltas folded into its weights.

    Args:
        model: The base.
        bank: What to fold.
        restore: Makes a parameter as it was, by its name.
    """

    def enter() -> None:
        with torch.no_grad():
            for module in bank.modules.values():
                if isinstance(module, BlendedLinear):
                    weight: Tensor = module.base.weight  # type: ignore[assignment]
                    weight.add_(module.delta().to(weight.dtype))
        attach(model, bank.bare)

    def leave() -> None:
        detach(model, bank.bare)
        changed = {id(module.base) for module in bank.modules.values()}
        for name, module in model.named_modules():
            if id(module) in changed:
                restore(f"{name}.weight", module.weight)

    return Variant("folded", len(bank.names), enter=enter, leave=leave)


def random_adapters(experts: int, rank: int) -> Callable[[nn.Module], Any]:
    """Makes PEFT put random LoRA adapters on all linear layers and activate them together."""

    def make(model: nn.Module) -> Any:
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False)
        wrapped = peft.get_peft_model(model, config, adapter_name="expert1")
        for number in range(1, experts):
            wrapped.add_adapter(f"expert{number + 1}", config)
        return wrapped

    return make


def stored_adapters(loadout: Loadout) -> Callable[[nn.Module], Any]:
    """Makes PEFT load a loadout's own adapters and activate them together, each at weight 1."""

    def make(model: nn.Module) -> Any:
        import peft

        folders = {expert.name: expert.adapter.source.fetch(expert.adapter.files) for expert in loadout.experts}
        (first, folder), *others = folders.items()
        wrapped = peft.PeftModel.from_pretrained(model, folder, adapter_name=first)
        for name, other in others:
            wrapped.load_adapter(other, adapter_name=name)
        return wrapped

    return make


def peft(model: nn.Module, make: Callable[[nn.Module], Any]) -> Variant:
    """The base with all adapters of PEFT active at once.

    Args:
        model: The base. PEFT wraps its layers; the wrappers are put in place and taken away like a bank.
        make: Lets PEFT load adapters onto the model.
    """
    with quietly():
        wrapped = make(model)
        names = list(wrapped.peft_config)
        wrapped.base_model.set_adapter(names)
    wrapped.eval().requires_grad_(False)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    own: dict[str, nn.Module] = {name: module.get_submodule("base_layer") for name, module in layers.items()}
    size = sum(
        parameter.numel() * parameter.element_size()
        for module in layers.values()
        for name, parameter in module.named_parameters()
        if "lora_" in name
    )

    put(model, own)
    return Variant("peft", len(names), size, size, lambda: put(model, layers), lambda: put(model, own))


def compiled(model: nn.Module, variant: Variant) -> Variant:
    """A variant of which torch's compiler makes the decoding steps, as CUDA graphs on a GPU."""
    plain = model.forward
    quick = compiled_step(model, f"{variant.name}{variant.experts}")

    def forward(input_ids: Tensor, **rest: Any) -> Any:
        return (quick if input_ids.shape[1] == 1 else plain)(input_ids=input_ids, **rest)

    def enter() -> None:
        variant.enter()
        unroll(model)
        model.forward = forward

    def leave() -> None:
        del model.forward
        variant.leave()

    return replace(variant, enter=enter, leave=leave)
