"""Is this the base an adapter was trained on? What names can tell, and weights where both models are on this machine.

A name in an ``adapter_config.json`` is a claim: an organisation's repository, a mirror or a quantised copy of it, or a
folder on somebody's disk.
"""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path, PurePosixPath

from lmoe_cli.errors import LmoeError
from lmoe_cli.loadout.base import Base, read_base
from lmoe_cli.source import Folder

MIRRORS = (
    "unsloth",
    "mlx-community",
    "llmcompressor",
    "neuralmagic",
    "redhatai",
    "casperhansen",
    "thebloke",
    "nousresearch",
)
"""Organisations that republish the models of others, often quantised."""

QUANTIZED = re.compile(
    r"([-_.](unsloth|bnb|dynamic|gptq|awq|fp8|int[48]|nf4|gguf|[48]bit|w[48]a(8|16)|marlin|hqq|quantized))+$"
)
RENAMED = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "decapoda-research/llama-7b-hf": "huggyllama/llama-7b",
    "decapoda-research/llama-13b-hf": "huggyllama/llama-13b",
    "yahma/llama-7b-hf": "huggyllama/llama-7b",
    "yahma/llama-13b-hf": "huggyllama/llama-13b",
    "unsloth/tinyllama": "tinyllama/tinyllama-1.1b-intermediate-step-1431k-3t",
    "unsloth/tinyllama-chat": "tinyllama/tinyllama-1.1b-chat-v1.0",
    "unsloth/mistral-7b": "mistralai/mistral-7b-v0.1",
    "unsloth/llama-2-7b": "meta-llama/llama-2-7b-hf",
    "unsloth/llama-2-13b": "meta-llama/llama-2-13b-hf",
    "unsloth/llama-3-8b": "meta-llama/meta-llama-3-8b",
    "unsloth/llama-3-8b-instruct": "meta-llama/meta-llama-3-8b-instruct",
}
"""Names the Hub has redirected, mirrors whose names differ from the original's, and conversions of one release."""

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+\Z")
CACHED = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/")
SAYS_NOTHING = ("main", "unsloth")
"""Revisions that adapters name without meaning any: Unsloth once wrote its own name."""
SHORT_COMMIT = 7
"""Letters of a commit that name it."""
COMMIT = re.compile(r"[0-9a-f]{7,64}\Z")
SAMPLES, SAMPLE_BYTES = 8, 4096
"""How many tensors of two models are compared, and how much of each."""


class Match(Enum):
    """What names say about two bases."""

    SAME = "same"
    OTHER = "other"
    UNKNOWN = "unknown"


def compare(claim: str | None, base: Base) -> Match:
    """Compare the base an adapter names with the one at hand.

    Args:
        claim: ``base_model_name_or_path`` of the adapter.
        base: The base of the loadout.

    Returns:
        What the weights say, where the claim is a folder on this machine. Otherwise SAME where the names agree after
        mirrors, quantised copies and renamings; OTHER where both are names of repositories and differ; UNKNOWN where
        either is only a folder.
    """
    if not claim:
        return Match.UNKNOWN
    if Path(claim).is_absolute() and (verdict := _compare_weights(Path(claim), base)) is not Match.UNKNOWN:
        return verdict
    here = _names(base)
    wanted = canonical(claim)
    if any(same(wanted, name) for name in here):
        return Match.SAME
    both_public = _is_public(claim) and any(_is_public(name) for name in here)
    return Match.OTHER if both_public else Match.UNKNOWN


def at_revision(claim: str, revision: str | None, base: Base) -> Match:
    """Compare the revision of its base that an adapter names with that of the base at hand.

    Args:
        claim: ``base_model_name_or_path`` of the adapter, which means the base at hand; see `compare`.
        revision: A branch, tag or commit of it; None, ``main`` and what tools write there of themselves say nothing.
        base: The base of the loadout.

    Returns:
        SAME where they agree, and where the base is a folder or another repository, such as a mirror; OTHER where two
        names are told that differ; UNKNOWN where either is a commit: the weights may be the same in both.
    """
    name, commit = base.source.repository_name, base.source.revision or ""
    if revision is None or revision in SAYS_NOTHING or name is None or claim.lower() != name.lower():
        return Match.SAME
    asked = base.ref.partition("@")[2] or "main"
    if revision == asked or (len(revision) >= SHORT_COMMIT and commit.startswith(revision)):
        return Match.SAME
    return Match.UNKNOWN if COMMIT.match(revision) or COMMIT.match(asked) else Match.OTHER


def _compare_weights(claimed: Path, base: Base) -> Match:
    """Read the beginnings of the largest tensors of two models that are both here."""
    try:
        if not (base.source.path and claimed.is_dir()):
            return Match.UNKNOWN
        if claimed.samefile(base.source.path):
            return Match.SAME
    except OSError:  # a folder that may not be looked into, such as somebody's home
        return Match.UNKNOWN
    try:
        other = read_base(Folder(str(claimed), claimed))
        largest = sorted(base.stored.values(), key=lambda tensor: (-tensor.info.size, tensor.name))[:SAMPLES]
        for mine in largest:
            theirs = other.stored.get(mine.name)
            if theirs is None or theirs.info.dtype != mine.info.dtype:
                return Match.UNKNOWN  # another layout or precision of what may well be the same model
            if theirs.info.shape != mine.info.shape:
                return Match.OTHER
            if other.beginning(theirs, SAMPLE_BYTES) != base.beginning(mine, SAMPLE_BYTES):
                return Match.OTHER
    except LmoeError:  # what the claim leads to is no model
        return Match.UNKNOWN
    return Match.SAME


def same(first: str, second: str) -> bool:
    """Whether two canonical names mean one model; an organisation counts only where both have one."""
    first_org, _, first_name = first.rpartition("/")
    second_org, _, second_name = second.rpartition("/")
    if _plain(first_name) != _plain(second_name):
        return False
    known = [org for org in (first_org, second_org) if org and org not in MIRRORS]
    return len(set(known)) < 2


def canonical(name: str) -> str:
    """A base's name in lower case, without quantisation marks and after known renamings; a path's last part."""
    if cached := CACHED.search(name):
        name = f"{cached['org']}/{cached['name']}"
    name = name.removeprefix("hf://").partition("@")[0] if not name.startswith("/") else name
    name = name.replace("\\", "/").rstrip("/").lower()
    if not _is_public(name):
        name = PurePosixPath(name).name
    bare = QUANTIZED.sub("", name)
    return RENAMED.get(bare, bare)


def _names(base: Base) -> list[str]:
    """Everything the base at hand may be called."""
    names = [name] if (name := base.source.repository_name) else []
    if base.ref.startswith("demo:"):
        names.append(base.ref)
    if base.source.path:
        names.append(str(base.source.path.resolve()))  # a relative path looks like a repository's name
    claimed = base.config.get("_name_or_path")
    if isinstance(claimed, str) and claimed:
        names.append(claimed)
    return [canonical(name) for name in names]


def _is_public(name: str) -> bool:
    return (
        name.startswith("demo:")
        or name.lower() in RENAMED
        or bool(REPOSITORY.match(name) and not name.startswith((".", "~")))
    )


def _plain(name: str) -> str:
    return name.removeprefix("meta-").removesuffix("-hf")
