"""An engine without a model: it answers with given words, one a token, when it is allowed to."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace

from lmoe_cli.chat.session import Outside, Session
from lmoe_cli.engine.generate import Piece, Timings
from lmoe_cli.errors import InvalidFileError, UsageError
from lmoe_cli.loadout.recipe import Recipe
from lmoe_cli.router import registry

WEIGHTS = {"warrior": 0.6, "mage": 0.3, "healer": 0.1}


class FakeEngine:
    def __init__(
        self, words="I draw my sword .", *, weights=WEIGHTS, router="weighted", context=1 << 30, template=True
    ):
        experts = {name: {"adapter": f"demo:{name}", "weight": weight} for name, weight in weights.items()}
        data = {"name": "battlemage", "base": "demo:adventurer", "experts": experts, "router": {"type": router}}
        recipe = Recipe.model_validate(data)
        self.loadout = SimpleNamespace(
            recipe=recipe, origin="battlemage.yaml", base=SimpleNamespace(ref=recipe.base), experts=()
        )
        self.router = registry.load(recipe.router)(recipe.router, weights)
        self.words = words.split()
        self.context = context
        self.has_template = template
        self.asked = []
        """Conversations it was asked to answer."""
        self.turned = []
        """Weights that stood before each token."""
        self.pace = None
        """Where it is a semaphore, every token waits for it."""
        self.is_base = False
        self.fails_after = None
        """Tokens after which the model computes no numbers any more."""

    @property
    def weights(self):
        return self.router.weights

    def set_weights(self, weights):
        self.router.turn(weights)

    def key_values(self, *, keep=False):
        return SimpleNamespace(keep=keep, tokens=0, clear=lambda: None)

    def encode(self, messages):
        tokens = [word for message in messages for word in message["content"].split()]
        if len(tokens) >= self.context:
            raise UsageError("context-full", f"{len(tokens)} tokens do not fit")
        return list(range(len(tokens)))

    def stream(self, messages, sampling, values):
        self.asked.append([message["content"] for message in messages])
        return FakeGeneration(self, len(self.encode(messages)), sampling)

    @contextmanager
    def alone(self):
        self.is_base = True
        try:
            yield
        finally:
            self.is_base = False

    def hold(self):
        """Let no token come until `let`."""
        self.pace = threading.Semaphore(0)

    def let(self, tokens=1000):
        self.pace.release(tokens)


class FakeGeneration:
    def __init__(self, engine, prompt, sampling):
        self.engine, self.prompt, self.sampling = engine, prompt, sampling
        self.text = ""
        self.new = 0

    @property
    def timings(self):
        return Timings(self.prompt, 0, self.new, 0.25, 0.25 + self.new / 40)

    def __iter__(self):
        words = ["base"] if self.engine.is_base else self.engine.words
        for number, word in enumerate(words):
            if self.engine.pace:
                self.engine.pace.acquire(timeout=10)
            if number == self.engine.fails_after:
                raise InvalidFileError("logits-not-finite", "the model computes NaN or infinity")
            self.engine.turned.append(self.engine.weights)
            piece = word if number == 0 or word == "." else f" {word}"
            self.text += piece
            self.new += 1
            yield Piece(piece, number, "stop" if number + 1 == len(words) else None)


def refuse(*_):
    raise AssertionError("not expected here")


def session(engine=None, load=refuse, bake=refuse):
    return Session(engine or FakeEngine(), Outside(load, bake))
