"""What a recipe says, as typed values. The JSON Schema is made from these models."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from lmoe_cli.errors import UsageError
from lmoe_cli.loadout.routers import Router, WeightedRouter

Name = Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]{0,39}$")]
Number = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]


class Entry(BaseModel):
    """Base of all parts of a recipe: closed, immutable, strictly typed."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class WeightRule(Entry):
    """The weight of an expert on some of the base's modules."""

    match: str = Field(
        min_length=1,
        max_length=200,
        description="Consecutive parts of a module's name: `mlp`, `*.q_proj`, `layers.0-11`. `*` stands for any part.",
    )
    value: Number


def _weight_tag(value: Any) -> str:
    return "<rules>" if isinstance(value, list) else "<number>"


Weight = Annotated[
    Annotated[Number, Tag("<number>")] | Annotated[list[WeightRule], Field(min_length=1), Tag("<rules>")],
    Discriminator(_weight_tag),
]


class ExpertEntry(Entry):
    """One adapter and how strongly it acts."""

    adapter: str = Field(min_length=1, description="`org/name[@revision]`, `hf://org/name`, a folder, or `demo:NAME`.")
    weight: Weight = Field(
        1.0,
        description="Multiplies the adapter's own scaling. A list of rules weighs modules differently: the first rule "
        "that matches counts, and what none matches keeps weight 1.",
    )
    accept_base: list[str] = Field(
        [], description="Bases this adapter may have been trained on, other than this one, accepted by name."
    )
    description: str = Field("", max_length=2000, description="What this expert is for, in a sentence.")
    examples: list[str] = Field([], description="Prompts this expert is for; routers that read prompts use them.")
    data: str | None = Field(
        None,
        min_length=1,
        description="A file of such prompts beside the recipe: JSONL with `messages` or `text`, or a prompt per line.",
    )


class Take(Entry):
    """Use only the saved modules of one expert, with its weight."""

    take: Name


def _policy_tag(value: Any) -> str:
    return "<take>" if isinstance(value, dict | Take) else "<word>"


SavedPolicy = Annotated[
    Annotated[Literal["refuse", "blend"], Tag("<word>")] | Annotated[Take, Tag("<take>")], Discriminator(_policy_tag)
]


class ChatSettings(Entry):
    """How answers are sampled."""

    system: str | None = Field(None, description="System message that opens every conversation.")
    temperature: float = Field(0.7, ge=0, le=10, description="Divides the logits; 0 takes the most likely token.")
    top_p: float = Field(1.0, gt=0, le=1, description="Keep the most likely tokens up to this probability.")
    top_k: int = Field(0, ge=0, description="Keep this many of the most likely tokens; 0 keeps all.")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="Divides the logits of tokens that occurred.")
    max_new_tokens: int = Field(256, ge=1, le=1_000_000, description="Longest answer, in tokens.")
    seed: int | None = Field(None, ge=0, lt=1 << 63, description="Makes sampled answers repeatable.")
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=16, description="Texts that end an answer.")

    def with_(self, **changes: Any) -> ChatSettings:
        """The same with some settings changed, each checked as in a recipe.

        Raises:
            UsageError: A setting is unknown or out of range.
        """
        known = list(type(self).model_fields)
        for name in changes:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"settings: {', '.join(known)}"
                raise UsageError("setting-unknown", f"no setting '{name}'", hint=hint)
        stop = changes.get("stop")
        if isinstance(stop, str | tuple):
            changes["stop"] = [stop] if isinstance(stop, str) else list(stop)
        try:
            return type(self).model_validate({**self.model_dump(), **changes})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            message = f"{first['loc'][0]}: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
            raise UsageError("setting-invalid", message) from error


Method = Literal["linear", "ties", "dare", "dare_ties", "della", "magnitude"]
Dtype = Literal["float32", "float16", "bfloat16"]


class BakeSettings(Entry):
    """How the loadout becomes ordinary weights."""

    method: Method = Field("linear", description="`linear` is exact; the others thin out deltas against interference.")
    dtype: Dtype | None = Field(None, description="Of the baked tensors; that of the base when left out.")
    density: float = Field(0.5, gt=0, le=1, description="Share of each delta kept by methods that thin out.")
    epsilon: float = Field(0.1, ge=0, lt=0.5, description="della: how far the chance to be kept spreads by magnitude.")
    normalize: bool | None = Field(
        None, description="Divide by the sum of the weights; by default only `ties` and `della` do."
    )
    seed: int = Field(0, ge=0, lt=1 << 63, description="For methods that drop at random.")


class Recipe(Entry):
    """A base model, the experts on it and the router between them."""

    version: Literal[1] = 1
    name: str = Field("", max_length=100)
    description: str = ""
    base: str = Field(min_length=1, description="`org/name[@revision]`, `hf://org/name`, a folder, or `demo:NAME`.")
    experts: dict[Name, ExpertEntry] = Field(
        max_length=256, description="Adapters by a name of their own. With none, the loadout is just its base."
    )
    router: Router = WeightedRouter(type="weighted")
    modules_to_save: SavedPolicy = Field(
        "refuse",
        description="What to do when several experts bring whole modules of their own: `refuse`, `blend` them by "
        "weight, or `{take: NAME}` to leave out those of the others.",
    )
    skip_below: float = Field(0.001, ge=0, lt=1, description="Experts with smaller weights are skipped.")
    chat: ChatSettings = ChatSettings()
    bake: BakeSettings = BakeSettings()

    @model_validator(mode="after")
    def _take_names_an_expert(self) -> Recipe:
        if isinstance(self.modules_to_save, Take) and self.modules_to_save.take not in self.experts:
            raise ValueError(f"modules_to_save takes those of '{self.modules_to_save.take}', which is no expert here")
        return self
