"""One blend per prompt: experts whose texts are most like it act most. Nothing is trained.

    p_e = mean over the expert's texts of h(t) / |h(t)|        prototypes
    c   = mean over e of p_e                                   what all of them have in common
    s_e = cos(h(x)/|h(x)| - c, p_e - c)
    g   = softmax(s / tau) over the k largest, else 0

h is the base's own hidden state by default, meaned over the text's tokens; such states point almost the same way for
all texts, which is why c is taken off (ours). Or h is that of a sentence-transformers model (Reimers and Gurevych 2019,
https://arxiv.org/abs/1908.10084). Prototypes are computed from the recipe's texts whenever it is loaded, always alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.examples import found_beside, texts_of
from lmoe_cli.loadout.routers import EncoderRouter as Settings
from lmoe_cli.router.prompt import PromptRouter
from lmoe_cli.router.surroundings import Embed, Surroundings


class EncoderRouter(PromptRouter):
    """Gates from how close a prompt is to what experts are for. See `StaticRouter` for arguments."""

    settings: Settings
    scores: Tensor | None = None
    """s of the last prompt, (E,), float32, from -1 to 1; None before the first one, and with less than two experts."""

    def prepare(self, around: Surroundings) -> None:
        folder, name = around.loadout.folder, self.settings.encoder
        self._embed = _sentence_transformer(name, folder) if name else around.embed
        texts = [texts_of(expert, folder) for expert in around.loadout.experts]
        own = [torch.stack([F.normalize(self._embed(text), dim=0) for text in found]).mean(0) for found in texts]
        if own:
            prototypes = torch.stack(own)  # (E, d)
            self._centre = prototypes.mean(0)
            self._prototypes = F.normalize(prototypes - self._centre, dim=1)

    def route(self, messages: Sequence[Mapping[str, str]]) -> Tensor:
        if len(self._weights) < 2:
            return torch.ones(len(self._weights))
        text = self._text(messages)
        state = F.normalize(F.normalize(self._embed(text), dim=0) - self._centre, dim=0)
        self.scores = self._prototypes @ state  # (E,)
        scores = self.scores / self.settings.temperature
        kept = min(self.settings.top_k or len(scores), len(scores))
        best, experts = scores.topk(kept)
        return torch.zeros_like(scores).scatter(0, experts, torch.softmax(best, dim=0))

    def _text(self, messages: Sequence[Mapping[str, str]]) -> str:
        said = [one["content"] for one in messages if one["role"] == "user"] or [one["content"] for one in messages]
        match self.settings.per:
            case "turn":
                return said[-1]
            case "conversation":
                return said[0]
            case "prompt":
                return "\n".join(one["content"] for one in messages)


def _sentence_transformer(name: str, folder: Path | None) -> Embed:
    """Embed by a sentence-transformers model.

    Args:
        name: A folder, or a repository of the Hub.
        folder: Of the recipe, beside which a folder is looked for first.

    Raises:
        UsageError: The extra is not installed, or there is no such model.
    """
    try:
        from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        message = "the router's 'encoder' needs sentence-transformers, which is not installed"
        raise UsageError("extra-missing", message, hint="pip install 'lmoe-cli[encoder]'") from error
    found = found_beside(name, folder)
    try:
        model = SentenceTransformer(str(found) if found.is_dir() else name, device="cpu")
    except (OSError, ValueError) as error:
        raise UsageError("encoder-missing", f"{name}: {str(error)[:200]}", hint="a folder, or org/name") from error

    def embed(text: str) -> Tensor:
        return torch.as_tensor(model.encode(text, show_progress_bar=False), dtype=torch.float32)

    return embed
