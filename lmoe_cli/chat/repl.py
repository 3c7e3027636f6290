"""The chat in a terminal: the prompt and the weights stay in place while the answer streams above them.

One thread runs the prompt, another one does what takes time, one line after the other. Commands that only turn or show
something act at once, in the middle of an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from prompt_toolkit.buffer import Buffer
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import History
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.patch_stdout import patch_stdout
from rich.console import Console
from rich.text import Text as Styled

from lmoe_cli.chat.actions import greeting
from lmoe_cli.chat.bar import weights_bar
from lmoe_cli.chat.commands import acts_at_once, handle
from lmoe_cli.chat.complete import SessionCompleter
from lmoe_cli.chat.events import Answer, Event, Leave, Note, Text
from lmoe_cli.chat.painter import Painter, fragment_style
from lmoe_cli.chat.prompt import CONTINUED, PROMPT, make_application
from lmoe_cli.chat.quoted import is_open
from lmoe_cli.chat.screen import Screen
from lmoe_cli.chat.session import Session
from lmoe_cli.chat.show import rendered
from lmoe_cli.errors import LmoeError
from lmoe_cli.findings import Finding, from_error

HELLO = Note("/help lists the commands, Alt-↑↓ turn the weights, Ctrl-D leaves")
BYE = Note("/bye or Ctrl-D leaves")


class Repl:
    """Talks with a user until they leave.

    Args:
        session: The conversation.
        history: What was typed before.
    """

    def __init__(self, session: Session, history: History) -> None:
        self.session = session
        self.buffer = Buffer(
            completer=SessionCompleter(session), history=history, accept_handler=self._accept, multiline=True
        )
        self.app = make_application(self.buffer, self._keys(), tail=self._tail, bar=self._bar, hint=self._hint)
        self.screen = Screen(self.app, Console(highlight=False))
        self._painter = Painter(lambda: self.session.engine.bank.names, is_coloured=self.screen.is_coloured)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="answers")
        self._jobs: list[Future[None]] = []
        self._is_ascii = not self.app.output.encoding().lower().startswith("utf")

    def run(self) -> None:
        """Show the prompt until the user leaves."""
        with patch_stdout(raw=True):
            try:
                self.app.run(pre_run=self._greet)
            finally:
                self.session.stop()
                self._worker.shutdown(cancel_futures=True)
                self.screen.close()

    # -- what was typed

    def _greet(self) -> None:
        self._show([*greeting(self.session), HELLO])
        self.screen.print("")

    def _accept(self, buffer: Buffer) -> bool:
        line = buffer.text.encode(errors="replace").decode()  # a terminal may send bytes that are no text
        if acts_at_once(line):
            self._echo(line)
            self._show(handle(self.session, line))
            if not self.is_busy:
                self.screen.print("")
        elif line.strip():
            if not self.is_busy:
                self.session.go_on()
            job = self._worker.submit(self._work, line)
            self._jobs = [*(other for other in self._jobs if not other.done()), job]
            job.add_done_callback(self._done)
        return False  # the line is taken: start with an empty one

    @property
    def is_busy(self) -> bool:
        """Whether an answer is being given, or anything else that takes time."""
        return any(not job.done() for job in self._jobs)

    def _work(self, line: str) -> None:
        self._echo(line)
        for event in handle(self.session, line):
            if isinstance(event, Finding):  # an answer that failed has no end of its own
                self._end()
            self._show([event])
        self.screen.print("")
        self.session.go_on()

    def _done(self, job: Future[None]) -> None:
        """Hand a bug in the other thread to whoever started the chat."""
        if not job.cancelled() and (error := job.exception()):
            self._leave(error)
        self.app.invalidate()

    def _leave(self, error: BaseException | None = None) -> None:
        def leave() -> None:
            if self.app.is_running and not self.app.is_done:
                self.app.exit(exception=error) if error else self.app.exit()

        if self.app.loop:
            self.app.loop.call_soon_threadsafe(leave)

    # -- what comes back

    def _echo(self, line: str) -> None:
        first, *rest = line.strip("\n").split("\n")
        text = Styled.assemble((PROMPT, "bold green"), first)
        for other in rest:
            text.append(f"\n{CONTINUED}", "dim").append(other)
        self.screen.print(text)

    def _show(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, Text):
                for text, style in self._painter.add(event):
                    self.screen.text(text, style)
                continue
            if isinstance(event, Answer):
                self._end()
            if isinstance(event, Leave):
                self._leave()
            elif (shown := rendered(event)) is not None:
                self.screen.print(shown)

    def _end(self) -> None:
        """Complete the last line of an answer."""
        if closing := self._painter.end():
            self.screen.text(closing)
        self.screen.end()

    def _tail(self) -> AnyFormattedText:
        return [(fragment_style(style), text) for style, text in self.screen.tail.runs]

    def _bar(self) -> AnyFormattedText:
        mixer, speed = self.session.mixer, self.session.speed
        right = f"{speed:.1f} tok/s" if speed else ""
        selected = mixer.selected if mixer.can_turn else -1
        return weights_bar(mixer.labelled, selected, self.screen.columns, f"{right:>12}", ascii_only=self._is_ascii)

    def _hint(self) -> str:
        """Stands in the empty prompt."""
        if not self.is_busy:
            return "a message, or /help"
        waiting = sum(not job.done() for job in self._jobs) - 1
        return f"Ctrl-C stops{f', {waiting} waiting' if waiting > 0 else ''}"

    # -- keys

    def _keys(self) -> KeyBindings:
        acts: dict[tuple[str, ...], Callable[[], None]] = {
            ("enter",): self._enter,
            ("escape", "enter"): self._newline,
            ("c-c",): self._interrupt,
            ("<sigint>",): self._interrupt,
            ("c-d",): self._delete,
            ("c-z",): lambda: self.app.suspend_to_background(),
            ("escape", "up"): partial(self._turn, +1),
            ("escape", "down"): partial(self._turn, -1),
            ("escape", "right"): partial(self._select, +1),
            ("escape", "left"): partial(self._select, -1),
        }
        keys = KeyBindings()
        for pressed, act in acts.items():
            keys.add(*pressed, filter=has_focus(self.buffer))(partial(_press, act))
        return keys

    def _enter(self) -> None:
        if is_open(self.buffer.text):
            self._newline()
        else:
            self.buffer.validate_and_handle()

    def _newline(self) -> None:
        self.buffer.newline(copy_margin=False)

    def _interrupt(self) -> None:
        """Stop what is going on and drop the lines that wait for it; with nothing going on, clear the line."""
        if self.is_busy:
            started = [job for job in self._jobs if not job.cancel()]
            if not all(job.done() for job in started):
                self.session.stop()
        elif self.buffer.text:
            self.buffer.reset()
        else:
            self._show([BYE])
            self.screen.print("")

    def _delete(self) -> None:
        if self.buffer.text:
            self.buffer.delete()
        else:
            self._leave()

    def _turn(self, steps: int) -> None:
        try:
            self.session.mixer.nudge(steps)
        except LmoeError as error:
            self._show([from_error(error)])
            self.screen.print("")

    def _select(self, steps: int) -> None:
        self.session.mixer.select(steps)


def _press(act: Callable[[], None], _: KeyPressEvent) -> None:
    act()
