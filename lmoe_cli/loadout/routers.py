"""The settings of routers as a recipe writes them. Light: naming a router loads none.

A distribution may bring more: the entry point group ``lmoe.routers`` maps a type to a subclass of `RouterSettings`,
in a module that imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from lmoe_cli.findings import Finding

if TYPE_CHECKING:
    from lmoe_cli.loadout.loadout import Loadout

GROUP = "lmoe.routers"
"""Entry point group of routers that other distributions bring."""
IMPLEMENTATION = re.compile(r"[\w.]+:\w+\Z")
Scope = Literal["fixed", "prompt", "token"]
Share = Literal["model", "block", "site"]
Activation = Literal["softmax", "topk", "sigmoid", "hard1"]


class RouterSettings(BaseModel):
    """Base of all routers' settings: closed, immutable, strictly typed. Each has a field ``type``."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    scope: ClassVar[Scope]
    """What gates depend on: nothing, the prompt, or each token."""
    implementation: ClassVar[str]
    """``module:Class`` of the router itself, imported when a loadout is loaded."""

    type: str

    @property
    def shared(self) -> Share:
        """Of a token router, what has gates of its own."""
        return "site"

    def about(self, loadout: Loadout) -> Iterable[Finding]:
        """What keeps it from working with a loadout, as far as settings and headers tell; `lmoe check` says it."""
        del loadout
        return ()


OnChange = Annotated[
    Literal["recompute", "keep"],
    Field(
        description="What a change of weights does to the keys and values cached so far: compute them again, so that "
        "the answer is that of a fresh session, or keep them, which is faster and a different function.",
    ),
]


class StaticRouter(RouterSettings):
    """The recipe's weights, for good."""

    scope = "fixed"
    implementation = "lmoe_cli.router.static:StaticRouter"

    type: Literal["static"]
    fold: bool = Field(True, description="Fold the blend into the base in memory, so that it costs nothing.")


class WeightedRouter(RouterSettings):
    """The recipe's weights, turned while it runs."""

    scope = "fixed"
    implementation = "lmoe_cli.router.weighted:WeightedRouter"

    type: Literal["weighted"]
    on_change: OnChange = "recompute"


class EncoderRouter(RouterSettings):
    """One blend per prompt, by how close its text is to what each expert is for."""

    scope = "prompt"
    implementation = "lmoe_cli.router.encoder:EncoderRouter"

    type: Literal["encoder"]
    per: Literal["prompt", "turn", "conversation"] = Field(
        "turn",
        description="The text that decides: all messages of the prompt, the newest message of the user, or the first "
        "one of the conversation.",
    )
    temperature: float = Field(0.1, ge=1e-6, le=100, description="Divides the similarities; small values choose one.")
    top_k: int | None = Field(None, ge=1, description="Most experts that act; all of them when left out.")
    layer: int | None = Field(
        None, ge=0, description="Block of the base whose output embeds the text; the middle one when left out."
    )
    encoder: str | None = Field(
        None, min_length=1, description="A sentence-transformers model in place of the base: a folder or `org/name`."
    )
    on_change: OnChange = "recompute"


class ArrowRouter(RouterSettings):
    """One blend per token, by the direction that each expert's weights amplify most; nothing is trained."""

    scope = "token"
    implementation = "lmoe_cli.router.arrow:ArrowRouter"

    type: Literal["arrow"]
    top_k: int = Field(3, ge=1, description="Experts that act on a token, at each site.")
    temperature: float = Field(1.0, ge=1e-6, le=1e6, description="Divides the similarities.")


class GateRouter(RouterSettings):
    """One blend per token, by a trained gate. What is left out is as it was trained."""

    scope = "token"
    implementation = "lmoe_cli.router.gate:GateRouter"

    type: Literal["gate"]
    artefact: str = Field(
        min_length=1,
        description="The folder `router/` in what `lmoe train` wrote, that of `lmoe router`, or `org/name[@revision]`.",
    )
    activation: Activation | None = Field(None, description="How scores become gates.")
    top_k: int | None = Field(None, ge=1, description="topk: experts that act on a token, at each site.")
    temperature: float | None = Field(None, ge=1e-6, le=1e6, description="Divides the scores.")


class PluginRouter(RouterSettings):
    """A router of another distribution, by its entry point in the group ``lmoe.routers``."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    type: str = Field(min_length=1, description="Name of the entry point. The other keys are that router's own.")

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> Any:
        schema = handler(core_schema)
        handler.resolve_ref_schema(schema)["properties"]["type"]["not"] = {"enum": list(BUILT_IN)}
        return schema


BUILT_IN: dict[str, type[RouterSettings]] = {
    "static": StaticRouter,
    "weighted": WeightedRouter,
    "encoder": EncoderRouter,
    "arrow": ArrowRouter,
    "gate": GateRouter,
}


@cache
def plugins() -> dict[str, EntryPoint]:
    """Type → entry point of the routers that other distributions bring; built-in types cannot be replaced."""
    return {point.name: point for point in entry_points(group=GROUP) if point.name not in BUILT_IN}


def router_types() -> list[str]:
    """All types that a recipe may name here."""
    return [*BUILT_IN, *sorted(plugins())]


def plugin_settings(type_: str) -> type[RouterSettings]:
    """The model of a plug-in's settings.

    Raises:
        PydanticCustomError: There is no such plug-in, or it is not one.
    """
    point = plugins().get(type_)
    if point is None:
        words = {"expected_tags": ", ".join(router_types())}
        raise PydanticCustomError("union_tag_invalid", "no such router", words)
    try:
        model = point.load()
    except Exception as error:  # code of somebody else, which fails with whatever it raises
        raise _broken(point, f"cannot be imported: {type(error).__name__}: {str(error)[:200]}") from error
    if not (isinstance(model, type) and issubclass(model, RouterSettings)):
        raise _broken(point, "is no subclass of RouterSettings")
    if getattr(model, "scope", None) not in get_args(Scope):
        raise _broken(point, f"has no 'scope' out of {', '.join(get_args(Scope))}")
    if not IMPLEMENTATION.match(str(getattr(model, "implementation", ""))):
        raise _broken(point, "has no 'implementation' such as 'package.module:Class'")
    return model


def _broken(point: EntryPoint, reason: str) -> PydanticCustomError:
    brought = f" of the package {point.dist.name}" if point.dist else ""
    words = {"hint": f"update{brought.replace(' of', '')}, or use another router"}
    return PydanticCustomError(
        "router_broken", f"the router '{point.name}'{brought} is broken: {point.value} {reason}", words
    )


def _tag(value: Any) -> str:
    type_ = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return type_ if isinstance(type_, str) and type_ in BUILT_IN else "<plugin>"


def _by_its_own_model(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """The settings of a plug-in's router, checked by the model that it brings."""
    if isinstance(value, RouterSettings):
        return value
    return plugin_settings(validate(value).type).model_validate(value)  # its errors keep their places


Router = Annotated[
    Annotated[StaticRouter, Tag("static")]
    | Annotated[WeightedRouter, Tag("weighted")]
    | Annotated[EncoderRouter, Tag("encoder")]
    | Annotated[ArrowRouter, Tag("arrow")]
    | Annotated[GateRouter, Tag("gate")]
    | Annotated[SerializeAsAny[PluginRouter], WrapValidator(_by_its_own_model), Tag("<plugin>")],
    Discriminator(_tag),
]
"""What a recipe may say under ``router``."""
