"""A loadout that runs: set weights, generate, fold."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lmoe_cli.bank.bank import Bank
from lmoe_cli.bank.blended import Blended
from lmoe_cli.engine.attach import attach, detach, listen
from lmoe_cli.engine.cache import KeyValues
from lmoe_cli.engine.compiled import compiled_step, key_values
from lmoe_cli.engine.embed import embedded
from lmoe_cli.engine.fold import Folded, fold
from lmoe_cli.engine.generate import Generation
from lmoe_cli.engine.prompt import Message
from lmoe_cli.engine.sampling import Sampling
from lmoe_cli.engine.some_logits import logits_at
from lmoe_cli.engine.widened import for_prompts
from lmoe_cli.engine.wording import Wording
from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.loadout import Loadout
from lmoe_cli.router.prompt import PromptRouter
from lmoe_cli.router.static import StaticRouter
from lmoe_cli.router.surroundings import Surroundings


class Engine(Wording):
    """A base with experts on it. Made by `load`.

    Args:
        loadout: What runs.
        model: The base; the bank is put onto it.
        bank: The experts.
        router: What produces the gates.
        compiles: Let torch compile the steps of answers.
        trusts: Let the tokenizer run code of its repository.
    """

    def __init__(
        self,
        loadout: Loadout,
        model: nn.Module,
        bank: Bank,
        router: StaticRouter,
        *,
        compiles: bool = False,
        trusts: bool = False,
    ) -> None:
        self.loadout = loadout
        self.trusts = trusts
        self.model = model
        self.bank = bank
        self.router = router
        self.sampling = Sampling.of(loadout.recipe.chat)
        self._folded: Folded | None = None
        self.is_attached = False
        self._worn: Mapping[str, Blended] = {}
        self._listening: list[RemovableHandle] = []
        self._computing = threading.Lock()
        self._turned = True
        self.attach()
        self._step = compiled_step(model) if compiles else None
        self._settle()
        router.prepare(Surroundings(loadout, model, bank.places, self.embed, bank.gates.values.device))

    # -- weights

    @property
    def weights(self) -> dict[str, float]:
        """Expert's name → weight in force. Dimensionless."""
        return self.router.weights

    def set_weights(self, weights: Mapping[str, float] | None = None, **named: float) -> None:
        """Turn weights; the next token is computed with them, also where another thread is generating.

        Raises:
            NotFoundError: No expert of that name.
            UsageError: Not a number, the router is static, or the blend is folded.
        """
        if self.router.can_turn:
            self._require_unfolded()
        self.router.turn({**(weights or {}), **named})
        self._turned = True
        self._settle()

    def set_gates(self, gates: Tensor | Sequence[Any]) -> None:
        """Give each row of a batch, or each token, its own blend, until weights are set again.

        Args:
            gates: g, (rows, E) or (rows, tokens, E), in the order of ``bank.names``.

        Raises:
            UsageError: The blend is folded.
            ValueError: Not a finite number per expert.
        """
        self._require_unfolded()
        with self.still():
            self.bank.gates.set(gates)

    def _require_unfolded(self) -> None:
        if self._folded:
            raise UsageError("folded", "the blend is folded into the base", hint="unfold it first")

    def _require_rows(self, batch: int) -> None:
        rows = self.bank.gates.rows
        if self.is_attached and rows not in (1, batch):
            raise ValueError(f"a batch of {batch} rows cannot carry {rows} rows of gates")

    def _settle(self) -> None:
        """Bring turned weights to the gates, unless a token is being computed: then its thread does it afterwards."""
        while self._turned and self._computing.acquire(blocking=False):
            try:
                self._apply()
            finally:
                self._computing.release()

    def _apply(self) -> None:
        if self._turned:
            self._turned = False
            self.bank.gates.set(self.router.gates())

    @contextmanager
    def still(self, routed: Tensor | None = None) -> Iterator[Hashable]:
        """Hold the blend still for the length of a block, which is given its identity; see `blend`.

        Args:
            routed: What a router that reads prompts gave for this one; it may have read another one since.
        """
        router = self.router
        if routed is not None and self.is_attached and isinstance(router, PromptRouter) and router.routed is not routed:
            router.routed, self._turned = routed, True
        if self._folded and not self._folded.is_whole:  # an unfolding that failed half-way: nothing is right before
            self.unfold()
        try:
            with self._computing:
                self._apply()
                yield self.blend
        finally:
            self._settle()

    @property
    def blend(self) -> Hashable:
        """Identity of the function computed now: every cache is keyed by it."""
        return (self.loadout.digest, self.bank.gates.told, self.is_attached or self.is_folded)

    # -- the base

    def attach(self) -> None:
        """Put the experts onto the base."""
        self.is_attached = True
        self._wear(self.bank.bare if self._folded else self.bank.live)

    def detach(self) -> nn.Module:
        """Take the experts off and return the base, bit for bit as it was loaded."""
        self.is_attached = False
        self.unfold()
        self._wear({})
        return self.model

    def _wear(self, modules: Mapping[str, Blended]) -> None:
        """Put modules onto the base in place of those that stand there."""
        for handle in self._listening:
            handle.remove()
        detach(self.model, self._worn)
        attach(self.model, modules)
        self._worn = modules
        self._listening = listen(self.model, self.bank.places) if modules is not self.bank.bare and modules else []

    def fold(self) -> None:
        """Fold the weights in force into the base in memory: from then on the blend costs nothing.

        Raises:
            UsageError: The base is quantised, or a router decides per prompt or token.
        """
        if self._folded and self._folded.is_whole:
            return
        self.unfold()
        if self.router.scope != "fixed":
            message = f"the router '{self.router.settings.type}' decides per {self.router.scope}: nothing stays folded"
            raise UsageError("router-dynamic", message, hint="bake it: --mean-gates, or --prompt")
        worn = self._worn
        self._wear({})
        self._folded = Folded()
        try:
            gates = self.router.gates()[0].tolist()
            fold(self.model, self.loadout, dict(zip(self.weights, gates, strict=True)), self._folded)
        except BaseException:
            if self._folded.is_undone:
                self._folded = None
                self._wear(worn)
            raise
        if self.is_attached:
            self.attach()
        self._turned = True  # gates that `set_gates` gave are not what was folded
        self._settle()

    def unfold(self) -> None:
        """Undo `fold`, to the last bit."""
        if self._folded:
            self._wear({})
            self._folded.unfold()
            self._folded = None
            if self.is_attached:
                self.attach()

    @contextmanager
    def alone(self) -> Iterator[nn.Module]:
        """The base alone, bit for bit as it was loaded, for the length of a block; then everything is as before."""
        was_attached, was_folded = self.is_attached, self.is_folded
        try:
            yield self.detach()
        finally:
            if was_attached:
                self.attach()
            if was_folded:
                self.fold()

    @property
    def is_folded(self) -> bool:
        return self._folded is not None

    # -- text

    def stream(
        self,
        prompt: str | Sequence[Message],
        sampling: Sampling | None = None,
        values: KeyValues | None = None,
    ) -> Generation:
        """Begin an answer; iterate over the result to get it piece by piece.

        Args:
            prompt: See `encode`.
            sampling: How to choose tokens; the recipe's ``chat:`` when None.
            values: Keys and values of this conversation so far.

        Raises:
            UsageError: See `encode`.
            ValueError: Rows of a batch have been given blends of their own: an answer is one row.
        """
        self._require_rows(1)
        tokens = self.encode(prompt)
        self.route(prompt)
        return Generation(
            values or self.key_values(),
            tokens,
            sampling or self.sampling,
            partial(self.still, self.router.routed if isinstance(self.router, PromptRouter) else None),
            self.decode,
            self.ends,
            self.context,
            continues=not self.has_template,
        )

    def route(self, prompt: str | Sequence[Message]) -> None:
        """Let a router that decides per prompt do so, as `stream` does."""
        if isinstance(self.router, PromptRouter) and self.is_attached:
            self.router.read(self.messages(prompt))
            self._turned = True
            self._settle()

    def embed(self, text: str) -> Tensor:
        """A text as one vector, by the base alone.

        Args:
            text: More than the model can hold is cut off.

        Returns:
            (d,), float32, on the CPU: the mean over tokens of what leaves the block that the router's ``layer`` names.

        Raises:
            UsageError: The base has no such block.
        """
        return embedded(self, text)

    def generate(self, prompt: str | Sequence[Message], **settings: Any) -> str:
        """Answer a prompt, and return the whole answer.

        Args:
            prompt: See `encode`.
            **settings: Any of `Sampling`'s, such as ``temperature=0`` or ``seed=1``.
        """
        return "".join(piece.text for piece in self.stream(prompt, self.sampling.with_(**settings)))

    def key_values(self, *, keep: bool | None = None) -> KeyValues:
        """An empty cache for a conversation.

        Args:
            keep: Whether a change of weights leaves it as it is; as the recipe says when None.
        """
        if keep is None:
            keep = getattr(self.loadout.recipe.router, "on_change", "recompute") == "keep"
        return key_values(self.model, self._step, keep=keep, around=partial(for_prompts, self))

    @torch.inference_mode()
    def logits(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """Logits of every position, (B, T, V), or of some, (B, P, V).

        Args:
            tokens: (B, T), int64.
            places: Positions, (P,), int64; all when None.

        Raises:
            ValueError: Rows of a batch have been given blends of their own, and these are not as many rows.
        """
        with self.still(), for_prompts(self):
            self._require_rows(tokens.shape[0])
            ids = tokens.to(self.bank.gates.values.device)
            if places is not None:
                return logits_at(self.model, places.to(ids.device), input_ids=ids)
            output: Tensor = self.model(input_ids=ids).logits
        return output
