"""One blend per prompt, by how long the last message is."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lmoe_cli.router.prompt import PromptRouter
from plain_routers.settings import LengthRouter as Settings


class LengthRouter(PromptRouter):
    """One expert for short messages, one for long ones."""

    settings: Settings

    def route(self, messages: Sequence[Mapping[str, str]]) -> Tensor:
        """What the prompt gives each expert, (E,), float32, in the order of the recipe."""
        is_short = len(messages[-1]["content"].split()) <= self.settings.words
        chosen = self.settings.short if is_short else self.settings.long
        return torch.tensor([float(name == chosen) for name in self.weights])
