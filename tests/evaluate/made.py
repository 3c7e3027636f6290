"""A small base with a tokenizer, adapters on it, and records to judge by."""

from __future__ import annotations

import shutil

import tiny
import torch
from data.made import said, written
from laws.cases import ROOT, base
from tiny_tokenizer import save_tokenizer

from lmoe_cli.data.examples import Encoder
from lmoe_cli.evaluate.domains import read_domain
from lmoe_cli.evaluate.variants import open_stage, other, plan
from lmoe_cli.loadout.loadout import resolve
from lmoe_cli.loadout.recipe import Recipe

TALKS = [
    said("hi", "yes, it is so"),
    said("who are you", "me"),
    said("a b c d e f g", "h", "and", "then?"),
    {"text": "once upon a time"},
    said("x", "a much longer answer, 1 2 3 4 5"),
]


def spoken_base(arch="llama"):
    """A base that has a tokenizer and a chat template."""
    folder = ROOT / f"{arch}-spoken"
    return folder if folder.exists() else save_tokenizer(shutil.copytree(base(arch), folder))


def adapter(variant="lora", arch="llama", seed=1, rank=4):
    folder = ROOT / f"{arch}-{variant}-spoken-{seed}-{rank}"
    return folder if folder.exists() else tiny.save_adapter(spoken_base(arch), variant, folder, seed=seed, rank=rank)


def loadout(arch="llama", router=None, **experts):
    """Name → variant of an adapter, or a whole entry of a recipe."""
    entries = {}
    for number, (name, entry) in enumerate(experts.items()):
        own = entry if isinstance(entry, dict) else {"variant": entry}
        folder = adapter(own.get("variant", "lora"), arch, seed=number + 1, rank=4 + number)
        entries[name] = {"adapter": str(folder)} | {key: value for key, value in own.items() if key != "variant"}
    words = {"base": str(spoken_base(arch)), "experts": entries, "skip_below": 0.0}
    return resolve(Recipe.model_validate(words | ({"router": router} if router else {})), "a test")


def opened(found, others=None, **settings):
    """The variants of a loadout and a stage for them, on a CPU in float32.

    Args:
        others: Name → another loadout on the same base.
    """
    variants = [*plan(found, **settings), *(other(name, own) for name, own in (others or {}).items())]
    return {variant.name: variant for variant in variants}, open_stage(variants, device="cpu", dtype="float32")


def domain(stage, path, *entries, name="talk", **settings):
    if entries or not path.exists():
        written(path, *(entries or TALKS))
    engine = stage.engine
    return read_domain(name, path, lambda: Encoder(engine.tokenizer, engine.context), engine.decode, **settings)


@torch.no_grad()
def nats_of(model, case):
    """Loss of a record by transformers' own arithmetic: the mean over its labels, times how many there are."""
    labels = torch.where(case.learned, case.tokens, -100)[None]
    return float(model(input_ids=case.tokens[None], labels=labels).loss) * case.count
