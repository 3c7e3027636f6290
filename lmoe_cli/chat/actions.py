"""What each command does: a session and the rest of the line in, events out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmoe_cli.chat.events import Event, Facts, Note, weights_text
from lmoe_cli.chat.quoted import message
from lmoe_cli.chat.session import CONTINUES, Session
from lmoe_cli.disk import expanded
from lmoe_cli.errors import UsageError
from lmoe_cli.findings import RefusedError
from lmoe_cli.loadout.routers import Scope
from lmoe_cli.loadout.text import parse_yaml

# -- weights


def turn(session: Session, argument: str) -> Iterator[Event]:
    """Turn weights, or show them."""
    changes: dict[str, float] = {}
    for word in argument.split():
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError("usage", f"/w {word}: not NAME=WEIGHT", hint="/w mage=0.7")
        try:
            changes[name] = float(value)
        except ValueError as error:
            hint = f"/w {name}=0.7"
            raise UsageError("weight-invalid", f"{name}: {value!r} is not a weight", hint=hint) from error
    if changes:
        session.mixer.turn(changes)
        yield _in_force(session)
    else:
        yield _knobs(session)


def _knobs(session: Session) -> Event:
    mixer = session.mixer
    if not mixer.names:
        return Note("there are no experts: the base answers")
    rows = []
    for name, weight in mixer.weights.items():
        rules = "  × the recipe's rules per module" if mixer.multiplies(name) else ""
        muted = f"  muted, was {mixer.aside[name]:.2f}" if name in mixer.aside else ""
        rows.append((name, f"{weight:.2f}{rules}{muted}"))
    return Facts("weights", tuple(rows))


def _in_force(session: Session) -> Event:
    return Note(weights_text(session.mixer.labelled))


def solo(session: Session, name: str) -> Iterator[Event]:
    """Mute all experts but one, or bring all back."""
    if name:
        session.mixer.solo(name)
    else:
        session.mixer.restore()
    yield _in_force(session)


def mute(session: Session, name: str) -> Iterator[Event]:
    """Mute an expert, or bring it back."""
    if not name:
        raise UsageError("usage", "/mute needs the name of an expert", hint=f"one of {', '.join(session.mixer.names)}")
    is_muted = session.mixer.mute(name)
    yield Note(f"{weights_text(session.mixer.labelled)}  ({name} {'muted' if is_muted else 'is back'})")


def base(session: Session, _: str) -> Iterator[Event]:
    """Mute all experts, or bring them back."""
    is_muted = session.mixer.base()
    yield Note(
        "the base alone; /base again brings the experts back" if is_muted else weights_text(session.mixer.labelled)
    )


def route(session: Session, argument: str) -> Iterator[Event]:
    """Show what the router chose, or no longer, or say whether it is shown."""
    if argument not in ("on", "off", ""):
        raise UsageError("usage", f"/route {argument}: not on or off", hint="/route on")
    settings = session.engine.loadout.recipe.router
    if settings.scope == "fixed" and argument != "off":
        message = f"the gates of the router '{settings.type}' are the same for every token: there is no route to show"
        yield Note(f"{message}; /w shows the weights")
        return
    if argument:
        session.shows_route = argument == "on"
    yield Note(_shown(settings.scope) if session.shows_route else "what the router chooses is not shown")


def _shown(scope: Scope) -> str:
    if scope == "prompt":
        return "after each answer, how much say each expert has by its prompt"
    return "each token by the expert with most say in it; after each answer, all shares"


# -- the conversation


def compare(session: Session, text: str) -> Iterator[Event]:
    """Answer under the blend and under the base."""
    if not text:
        raise UsageError("usage", "/ab needs a message", hint="/ab A goblin blocks the bridge.")
    yield from session.compare(message(text))


def retry(session: Session, _: str) -> Iterator[Event]:
    """Answer the last message again."""
    yield from session.retry()


def undo(session: Session, _: str) -> Iterator[Event]:
    """Forget the last message and its answer."""
    yield Note(f"forgotten: {_short(session.undo().user)}")


def clear(session: Session, _: str) -> Iterator[Event]:
    """Start a new conversation."""
    session.clear()
    yield Note("a new conversation")


def system(session: Session, text: str) -> Iterator[Event]:
    """Set the system message, or drop it."""
    session.set("system", message(text) or None)
    yield Note("system message set" if text else "no system message")


# -- settings and facts


def set_(session: Session, argument: str) -> Iterator[Event]:
    """Change a setting, or show one or all."""
    key, _, text = argument.partition(" ")
    if not key:
        yield Facts("settings", tuple((name, _value(value)) for name, value in session.settings.items()))
        return
    if text or key not in session.settings:
        session.set(key, _read(key, text.strip()))
    yield Note(f"{key}: {_value(session.settings[key])}")


def _read(key: str, text: str) -> Any:
    """A value as a recipe would read it."""
    if key in ("system", "on_change"):
        return text
    if text.lower() == "none":
        return [] if key == "stop" else None
    try:
        return parse_yaml(text.encode(), "/set").data
    except RefusedError:
        return text


def _value(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(repr(item) for item in value) if isinstance(value, list) else _short(str(value))


def show(session: Session, _: str) -> Iterator[Event]:
    """Tell what is loaded, and every setting."""
    loadout, recipe = session.engine.loadout, session.engine.loadout.recipe
    rows = [("recipe", loadout.origin), ("base", loadout.base.ref), ("router", recipe.router.type)]
    rows += [
        (expert.name, f"{session.mixer.weights[expert.name]:.2f}  {expert.adapter.source.ref}")
        for expert in loadout.experts
    ]
    rows += [(name, _value(value)) for name, value in session.settings.items()]
    yield Facts(recipe.name or "loadout", tuple(rows))


def stats(session: Session, _: str) -> Iterator[Event]:
    """Tell speed, tokens and memory."""
    told = [answer.timings for answer in session.answers]
    tokens = sum(timings.new_tokens for timings in told)
    seconds = sum(timings.total_s - timings.first_token_s for timings in told)
    later = sum(timings.new_tokens - 1 for timings in told)
    engine = session.engine
    context = f" of {engine.context}" if engine.context < 1 << 30 else ""
    place = next(engine.model.parameters())
    rows = (
        ("answers", str(len(told))),
        ("tokens", str(tokens)),
        ("speed", f"{later / seconds:.1f} tok/s" if seconds else "–"),
        ("exchanges", str(len(session.exchanges))),
        ("context", f"{session.values.tokens}{context} tokens"),
        ("experts", f"{engine.bank.size / 1e6:.1f} MB"),
        ("device", f"{place.device} {str(place.dtype).removeprefix('torch.')}"),
    )
    yield Facts("session", rows)


# -- files


def save(session: Session, argument: str) -> Iterator[Event]:
    """Write a recipe with the weights in force."""
    path, force = _path("/save my.yaml", argument)
    session.save(path, force=force)
    yield Note(f"saved with {weights_text(session.mixer.labelled)}: {path}")


def load(session: Session, argument: str) -> Iterator[Event]:
    """Go on with another loadout."""
    path, _ = _path("/load my.yaml", argument)
    yield Note(f"loading {path} …")
    yield from (finding for finding in session.load(path) if finding.severity != "note")
    yield from greeting(session)


def bake(session: Session, argument: str) -> Iterator[Event]:
    """Bake the weights in force."""
    path, force = _path("/bake out/", argument)
    yield Note(f"baking {weights_text(session.mixer.labelled)} …")
    yield Note(session.bake(path, force=force))


def _path(example: str, argument: str) -> tuple[Path, bool]:
    """The path that was typed, and whether what stands there may be replaced."""
    words = argument.split()
    force = "--force" in words
    name = argument.replace("--force", "").strip() if force else argument
    if not name:
        raise UsageError("usage", f"{example.partition(' ')[0]} needs a path", hint=example)
    return expanded(name), force


def greeting(session: Session) -> Iterator[Event]:
    """What a user should know of the loadout that answers."""
    loadout = session.engine.loadout
    name = f"{loadout.recipe.name}: " if loadout.recipe.name else ""
    experts = f" + {weights_text(session.mixer.labelled)}" if session.mixer.names else ""
    yield Note(f"{name}{loadout.base.ref}{experts}")
    if not session.engine.has_template:
        yield Note(CONTINUES)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"
