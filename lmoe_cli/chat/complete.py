"""What may stand at the end of a line that is being typed."""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from lmoe_cli.chat.commands import COMMANDS
from lmoe_cli.chat.session import ON_CHANGE, Session


def completions(session: Session, before: str) -> list[str] | None:
    """Words that may stand at the end of what was typed.

    Args:
        session: Knows the experts and settings.
        before: The line up to the cursor.

    Returns:
        Whole words; None where a path is due.
    """
    words = before.split(" ")
    if not before.startswith("/"):
        return []
    if len(words) == 1:
        return [name for name in COMMANDS if name.startswith(before)]
    command, last = COMMANDS.get(words[0]), words[-1]
    match command.takes if command else "nothing":
        case "weights":
            offered = [f"{name}=" for name in session.mixer.names]
        case "expert" if len(words) == 2:
            offered = list(session.mixer.names)
        case "setting" if len(words) == 2:
            offered = list(session.settings)
        case "setting" if words[1] == "on_change":
            offered = list(ON_CHANGE)
        case "switch" if len(words) == 2:
            offered = ["on", "off"]
        case "file":
            return None
        case _:
            offered = []
    return [word for word in offered if word.startswith(last)]


class SessionCompleter(Completer):
    """Completes commands, the names of experts and settings, and paths.

    Args:
        session: Knows them.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        before = document.text_before_cursor
        words = completions(self._session, before)
        if words is None:
            path = before.partition(" ")[2]
            yield from self._paths.get_completions(Document(path), complete_event)
            return
        last = before.rpartition(" ")[2]
        for word in words:
            yield Completion(word, -len(last))
