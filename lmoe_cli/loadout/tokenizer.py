"""What a tokenizer does, as far as its files tell: to see whether an adapter was trained with the base's own."""

from __future__ import annotations

from typing import Any

from lmoe_cli.errors import InvalidFileError
from lmoe_cli.source import Source
from lmoe_cli.strict_json import parse_object

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 1 << 20
MAX_TOKENIZER_BYTES = 64 << 20
STAGES = ("added_tokens", "normalizer", "pre_tokenizer", "model", "post_processor", "decoder")
"""Keys of ``tokenizer.json`` that decide which ids a text has; padding and truncation are settings of a training."""


def read_settings(source: Source) -> dict[str, Any]:
    """What ``tokenizer_config.json`` holds; empty where there is none.

    Raises:
        InvalidFileError: It is not JSON.
    """
    if not source.has(SETTINGS):
        return {}
    return parse_object(source.read(SETTINGS, MAX_TOKENIZER_BYTES), source.where(SETTINGS))


def chat_template(source: Source) -> str | None:
    """The Jinja template of conversations that stands beside a model or adapter, where there is one.

    Raises:
        InvalidFileError: Its ``tokenizer_config.json`` is not JSON.
    """
    if source.has(TEMPLATE):
        return source.read(TEMPLATE, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")
    template = read_settings(source).get("chat_template")
    if isinstance(template, list):  # several by name
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def differences(mine: Source, theirs: Source) -> list[str]:
    """Which stages of two tokenizers differ.

    Args:
        mine: Where one ``tokenizer.json`` may be.
        theirs: Where the other may be.

    Returns:
        Names of `STAGES`; none where either has no such file. Where one is only on the Hub, and their sizes differ,
        ``"file"``: it may be written otherwise and mean the same.
    """
    if not (mine.has(TOKENIZER) and theirs.has(TOKENIZER)):
        return []
    if mine.local(TOKENIZER) is None or theirs.local(TOKENIZER) is None:  # megabytes to fetch, only to compare them
        return [] if mine.sizes[TOKENIZER] == theirs.sizes[TOKENIZER] else ["file"]
    try:
        first, second = (source.read(TOKENIZER, MAX_TOKENIZER_BYTES) for source in (mine, theirs))
        if first == second:
            return []
        here, there = parse_object(first, mine.where(TOKENIZER)), parse_object(second, theirs.where(TOKENIZER))
    except InvalidFileError:  # what is compared is not necessarily used: no reason to stop
        return ["file"]
    return [stage for stage in STAGES if _meaning(here.get(stage)) != _meaning(there.get(stage))]


def _meaning(value: Any) -> Any:
    """A stage without what versions of the library write differently: unset keys, and merges as pairs or as text."""
    if isinstance(value, dict):
        kept = {key: _meaning(item) for key, item in value.items() if key != "merges" and not _is_unset(item)}
        if isinstance(merges := value.get("merges"), list):
            kept["merges"] = [" ".join(map(str, pair)) if isinstance(pair, list) else pair for pair in merges]
        return kept
    return [_meaning(item) for item in value] if isinstance(value, list) else value


def _is_unset(value: Any) -> bool:
    return value is None or value is False
