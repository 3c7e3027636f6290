"""Does what was baked compute what the live blend computes, up to one rounding?

Both run in float32 on the same prompts. How far one rounding may move the logits is not guessed but measured: blended
weights are moved by random amounts of at most half a unit in the last place of the baked dtype, which is what rounding
does, and by how much that moves the logits is what the baked files may be from the live blend, within a small factor. A
dropped expert, a wrong scale or a transposed matrix is further by orders of magnitude.

The measure is taken between two versions of the same folded weights, and so does not grow with a mistake that folding
and baking have in common; the live blend has no code in common with them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmoe_cli.bake.plan import STORED_AS
from lmoe_cli.checkpoint.header import FLOATS, read_header
from lmoe_cli.engine.base_model import load_model, quietly
from lmoe_cli.engine.build import start
from lmoe_cli.engine.engine import Engine
from lmoe_cli.errors import LmoeError, UsageError
from lmoe_cli.loadout.base import Base, read_base
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.source import Folder

PROMPTS = ("Hello.", "Tell me about the weather in the mountains.", "What should I do next, and why?")
GREEDY_TOKENS = 24
SLACK = 3.0
"""How many times further than a random rounding of the same size the baked logits may be."""
ARITHMETIC = 8.0
"""How many times further than a float32 rounding of the weights another order of float32 sums may move the logits."""
FLOOR = 2e-5
"""Relative difference that float32 arithmetic makes by itself in the shallowest model."""


@dataclass(frozen=True)
class Verdict:
    """What a verification saw."""

    ok: bool
    prompts: int
    positions: int
    difference: float
    """Root mean square over all logits, baked less live."""
    allowed: float
    """What one rounding allows."""
    largest: float
    """Largest difference of one logit."""
    effect: float
    """Root mean square of what the blend changes at all, live less base."""
    same_text: bool
    """Whether greedy answers agree, but for ties that rounding may turn."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def verify(
    loadout: Loadout, folder: Path, prompts: tuple[str, ...] = (), *, trust_remote_code: bool = False
) -> Verdict:
    """Compare a baked model with the live blend.

    Args:
        loadout: What was baked; also on a base that is taken as dequantised, which then runs with the weights that
            bitsandbytes' own functions give.
        folder: The checkpoint.
        prompts: To run; the experts' examples and a few general ones when empty.
        trust_remote_code: Let the base run code of its repository, and what was baked the copy of it.

    Raises:
        UsageError: The recipe's method has no live counterpart.
        LmoeError: They differ by more than one rounding. Exit code 1.
    """
    if loadout.recipe.bake.method != "linear":
        hint = "leave out --verify, or use method linear"
        message = f"there is no live blend of method {loadout.recipe.bake.method} to compare with"
        raise UsageError("verify-impossible", message, hint=hint)
    engine = start(loadout.live, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
    live = _Live.of(engine, prompts)
    _fold(engine)
    baked = read_base(Folder(str(folder), folder))
    changed = None if _is_rounded_everywhere(loadout.base, baked) else set(engine.bank.modules)
    rounded = [
        parameter
        for name, module in engine.model.named_modules()
        if changed is None or name.removesuffix(".base") in changed
        for parameter in module.parameters(recurse=False)
    ]
    moved = live.moves(engine.model, list(engine.model.parameters()), rounded, baked.dtype or "float32")
    plain = live.logits_of(engine.detach())
    del engine
    cpu = torch.device("cpu")
    other = load_model(baked, dtype=torch.float32, device=cpu, trust_remote_code=trust_remote_code)
    return live.judge(other, moved, plain, folder)


def _fold(engine: Engine) -> None:
    """Fold the blend, which compares what the files say with what runs.

    Raises:
        LmoeError: Packed matrices were read as other numbers than bitsandbytes gives. Exit code 1.
    """
    try:
        engine.fold()
    except UsageError as error:
        if error.code != "fold-unsafe" or engine.loadout.base.dequantized_from is None:
            raise
        message = f"what was baked is not what bitsandbytes makes of the base: {error.message}"
        hint = "nothing was written: please report this"
        raise LmoeError("verify-failed", message, hint=hint, where=error.where) from error


def _is_rounded_everywhere(base: Base, baked: Base) -> bool:
    """Whether also tensors that no expert changes were rounded when they were written."""
    if base.dequantized_from is None:
        return baked.dtype != base.dtype
    kinds = {tensor.info.dtype for tensor in base.stored.values()} & FLOATS.keys()
    return kinds != {STORED_AS.get(baked.dtype or "")}


def verify_adapter(
    loadout: Loadout, folder: Path, prompts: tuple[str, ...] = (), *, trust_remote_code: bool = False
) -> Verdict:
    """Compare a baked adapter, as PEFT runs it, with the live blend.

    Args:
        loadout: What was baked. A base that bitsandbytes packed is compared as what it stands for: its own products
            would hide in their rounding what is looked for.
        folder: The adapter, cut to no rank.
        prompts: To run; the experts' examples and a few general ones when empty.
        trust_remote_code: Let the base run code of its repository.

    Raises:
        LmoeError: They differ by more than the rounding of its factors. Exit code 1.
    """
    engine = start(loadout.dequantized.live, device="cpu", dtype="float32", trust_remote_code=trust_remote_code)
    live = _Live.of(engine, prompts)
    base = engine.detach()
    del engine
    plain = live.logits_of(base)
    with quietly():
        from peft import PeftModel

        other = PeftModel.from_pretrained(base, folder).eval()
    factors = [parameter for name, parameter in other.named_parameters() if "default" in name]
    before = [parameter.detach().clone() for parameter in factors]
    stored = read_header(folder / "adapter_model.safetensors").tensors
    kinds = {FLOATS[info.dtype] for info in stored.values()}
    moved = live.moves(other, factors, factors, min(kinds))
    for parameter, value in zip(factors, before, strict=True):
        parameter.data = value
    return live.judge(other, moved, plain, folder)


@dataclass(frozen=True)
class _Live:
    """What the live blend does with the prompts."""

    inputs: list[list[int]]
    logits: list[Tensor]
    """(T, V) of each prompt, float32."""
    paths: list[list[int]]
    """What greedy decoding adds to each."""

    @classmethod
    def of(cls, engine: Engine, prompts: tuple[str, ...]) -> _Live:
        inputs = _inputs(engine, prompts)
        paths = [_greedy(engine.model, tokens) for tokens in inputs]
        return cls(inputs, [_logits(engine.model, tokens) for tokens in inputs], paths)

    def logits_of(self, model: nn.Module) -> list[Tensor]:
        return [_logits(model, tokens) for tokens in self.inputs]

    def moves(
        self, model: nn.Module, computed: list[nn.Parameter], rounded: list[nn.Parameter], dtype: str
    ) -> tuple[Tensor, Tensor]:
        """How far rounding moves the logits of a model, whose weights are moved for that.

        Args:
            model: Holds the exact blend in float32.
            computed: What a float32 rounding would move.
            rounded: What was rounded when it was written.
            dtype: To which.

        Returns:
            Differences of all logits, by the rounding of sums in float32, and by that of the files.
        """
        exact = self.logits_of(model)
        _jitter(computed, "float32")
        noise = _apart(self.logits_of(model), exact)
        _jitter(rounded, dtype)
        return noise, _apart(self.logits_of(model), exact)

    def judge(self, other: nn.Module, moves: tuple[Tensor, Tensor], plain: list[Tensor], folder: Path) -> Verdict:
        """Compare what was baked with the live blend.

        Raises:
            LmoeError: They differ by more than rounding. Exit code 1.
        """
        noise, moved = moves
        floor = FLOOR * _rms(torch.cat(self.logits))
        allowed = SLACK * _rms(moved) + ARITHMETIC * _rms(noise) + floor
        gap = SLACK * float(moved.abs().max()) + ARITHMETIC * float(noise.abs().max()) + floor
        apart = _apart(self.logits_of(other), self.logits)
        same_text = all(_agrees(other, *pair, gap) for pair in zip(self.inputs, self.paths, strict=True))
        difference = _rms(apart)
        verdict = Verdict(
            difference <= allowed and same_text,
            len(self.inputs),
            sum(len(tokens) for tokens in self.inputs),
            difference,
            allowed,
            float(apart.abs().max()),
            _rms(_apart(self.logits, plain)),
            same_text,
        )
        if not verdict.ok:
            text = "" if same_text else ", and greedy answers differ"
            found = f"{difference:.2g} from the live blend where rounding allows {allowed:.2g}{text}"
            message = f"what was baked is {found}"
            raise LmoeError("verify-failed", message, hint="nothing was written: please report this", where=str(folder))
        return verdict


def _inputs(engine: Engine, prompts: tuple[str, ...]) -> list[list[int]]:
    """Tokens of the prompts, or arbitrary ones where the base has no tokenizer."""
    if not engine.loadout.base.has_tokenizer:
        generator = torch.Generator().manual_seed(0)
        size = engine.loadout.base.vocab_size or 2
        return [torch.randint(size, (24,), generator=generator).tolist() for _ in range(4)]
    examples = tuple(example for expert in engine.loadout.experts for example in expert.entry.examples)
    return [engine.encode(prompt) for prompt in prompts or (*examples[:8], *PROMPTS)]


@torch.inference_mode()
def _logits(model: nn.Module, tokens: list[int]) -> Tensor:
    """(T, V), float32."""
    logits: Tensor = model(input_ids=torch.tensor([tokens])).logits[0].float()
    return logits


@torch.inference_mode()
def _greedy(model: nn.Module, tokens: list[int]) -> list[int]:
    """The tokens that greedy decoding adds, without a cache so that nothing else is compared."""
    path: list[int] = []
    for _ in range(GREEDY_TOKENS):
        path.append(int(_logits(model, tokens + path)[-1].argmax()))
    return path


def _agrees(model: nn.Module, tokens: list[int], path: list[int], gap: float) -> bool:
    """Whether a model would take the same path, but where its two best tokens are closer than ``gap``."""
    logits = _logits(model, tokens + path)[len(tokens) - 1 : -1]  # (steps, V)
    chosen = logits.gather(1, torch.tensor(path)[:, None])[:, 0]
    return bool((logits.amax(dim=1) - chosen <= 2 * gap).all())


def _jitter(parameters: list[nn.Parameter], dtype: str) -> None:
    """Move weights by at most half a unit in the last place of a dtype, at random."""
    epsilon = torch.finfo(getattr(torch, dtype)).eps
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters:
            exponent = torch.frexp(parameter).exponent - 1
            unit = torch.ldexp(torch.full_like(parameter, epsilon), exponent)
            parameter.add_((torch.rand(parameter.shape, generator=generator) - 0.5) * unit)


def _apart(first: list[Tensor], second: list[Tensor]) -> Tensor:
    return torch.cat([(one - other).flatten() for one, other in zip(first, second, strict=True)])


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())
