"""The part of the screen that stays: the unfinished line of an answer, the prompt, and the bar under it."""

from __future__ import annotations

from collections.abc import Callable

from prompt_toolkit.application import Application
from prompt_toolkit.buffer import Buffer
from prompt_toolkit.filters import Condition, has_completions
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.layout import (
    BufferControl,
    ConditionalContainer,
    Float,
    FloatContainer,
    FormattedTextControl,
    HSplit,
    Layout,
    VerticalAlign,
    Window,
)
from prompt_toolkit.layout.menus import CompletionsMenu
from prompt_toolkit.layout.processors import AfterInput, ConditionalProcessor
from prompt_toolkit.renderer import CPR_Support
from prompt_toolkit.styles import Style
from prompt_toolkit.widgets import SearchToolbar

PROMPT = ">>> "
CONTINUED = "... "
MENU_ROWS = 8
STYLE = Style.from_dict(
    {
        "prompt": "ansigreen bold",
        "hint": "ansibrightblack",
        "bar.name": "",
        "bar.selected": "bold reverse",
        "bar.positive": "ansicyan",
        "bar.negative": "ansired",
        "bar.over": "ansimagenta",
        "bar.empty": "ansibrightblack",
        "bar.right": "ansibrightblack",
        "bar.more": "ansibrightblack",
    }
)


def make_application(
    buffer: Buffer,
    keys: KeyBindings,
    *,
    tail: Callable[[], AnyFormattedText],
    bar: Callable[[], AnyFormattedText],
    hint: Callable[[], str],
) -> Application[None]:
    """Lay out the prompt.

    Args:
        buffer: What is being typed.
        keys: What keys do beyond editing.
        tail: Gives the unfinished line of an answer.
        bar: Gives the line under the prompt.
        hint: Gives what stands in the prompt while nothing is typed.
    """
    search = SearchToolbar(ignore_case=True)
    hinted = ConditionalProcessor(AfterInput(lambda: [("class:hint", hint())]), Condition(lambda: not buffer.text))
    typing = BufferControl(buffer, [hinted], search_buffer_control=search.control)
    rows = HSplit(
        [
            ConditionalContainer(_line(tail), Condition(lambda: bool(tail()))),
            Window(typing, wrap_lines=True, dont_extend_height=True, get_line_prefix=_prefix),
            ConditionalContainer(Window(height=MENU_ROWS), has_completions),
            search,
            _line(bar),
        ],
        align=VerticalAlign.TOP,
    )
    menu = Float(CompletionsMenu(max_height=MENU_ROWS), xcursor=True, ycursor=True)
    app: Application[None] = Application(
        Layout(FloatContainer(rows, [menu]), focused_element=typing),
        key_bindings=keys,
        style=STYLE,
        erase_when_done=True,
    )
    # Do not ask the terminal for the cursor's place: the bar stands right under the prompt, wherever that is.
    app.renderer.cpr_support = CPR_Support.NOT_SUPPORTED
    return app


def _line(content: AnyFormattedText) -> Window:
    return Window(FormattedTextControl(content), height=1)


def _prefix(line: int, wrapped: int) -> AnyFormattedText:
    if line == 0 and wrapped == 0:
        return [("class:prompt", PROMPT)]
    return [("class:hint", CONTINUED if wrapped == 0 else " " * len(CONTINUED))]
