"""Draw the picture of the chat from the program itself: python docs/picture.py.

`lmoe chat` runs in a pseudo-terminal, someone types, and what then stands on the screen becomes docs/chat.svg.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import select
import struct
import sys
import termios
import time
from pathlib import Path

import pyte
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

COLUMNS, ROWS = 92, 24
COMMAND = "lmoe chat --loadout recipes/battlemage.yaml"
ROOT = Path(__file__).resolve().parent.parent
TYPED = (
    "A goblin blocks the bridge.\r",
    "/w warrior=0 mage=0.9\r",
    "A goblin blocks the bridge.\r",
    "/w mage=0.2 healer=0.8\r",
    "/retry\r",
)
SECONDS_UNTIL_STILL = 4.0
FRAME = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="A chat">
<style>
.{unique_id}-matrix {{ font-family: "DejaVu Sans Mono", Menlo, Consolas, ui-monospace, monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
<rect rx="8" width="100%" height="100%" fill="#1c1c22"/>
<g transform="translate({terminal_x}, 16)">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""


def main() -> None:
    """Run the chat, type, wait until the screen is still, draw it."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(ROOT)
        os.environ |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
        os.execv(sys.executable, [sys.executable, "-m", "lmoe_cli", *COMMAND.split()[1:]])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    _watch(terminal, stream, still=15.0)
    for line in TYPED:
        os.write(terminal, line.encode())
        _watch(terminal, stream, still=SECONDS_UNTIL_STILL)
    target = ROOT / "docs" / "chat.svg"
    target.write_text(_svg(screen), encoding="utf-8")
    os.write(terminal, b"\x04")
    _watch(terminal, stream, still=1.0)
    os.close(terminal)
    os.waitpid(process, 0)


def _watch(terminal: int, stream: pyte.ByteStream, *, still: float) -> None:
    """Read what is written until nothing has changed for some seconds. Questions of the program are answered."""
    changed = time.monotonic()
    while time.monotonic() - changed < still:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            data = os.read(terminal, 1 << 16)
        except OSError:  # the program has ended
            return
        if b"\x1b[6n" in data:
            cursor = stream.listener.cursor
            os.write(terminal, f"\x1b[{cursor.y + 1};{cursor.x + 1}R".encode())
        stream.feed(data)
        changed = time.monotonic()


def _svg(screen: pyte.Screen) -> str:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text("$ ", style="bold green").append(COMMAND, style="not bold default"))
    last = max(row for row in range(ROWS) if screen.display[row].strip())
    for row in range(last + 1):
        line = Text()
        for column in range(COLUMNS):
            cell = screen.buffer[row][column]
            line.append(cell.data or " ", style=_style(cell))
        line.rstrip()
        console.print(line, soft_wrap=True)
    return console.export_svg(theme=MONOKAI, code_format=FRAME, unique_id="chat", title="lmoe chat")


def _style(cell: pyte.screens.Char) -> str:
    named = {"brown": "yellow", "brightblack": "bright_black"}
    words = [word for word in ("bold", "italics", "reverse") if getattr(cell, word)]
    words = ["italic" if word == "italics" else word for word in words]
    for prefix, colour in (("", cell.fg), ("on ", cell.bg)):
        if colour != "default":
            is_hex = len(colour) == 6 and all(digit in "0123456789abcdef" for digit in colour)
            words.append(prefix + (f"#{colour}" if is_hex else named.get(colour, colour.replace("bright", "bright_"))))
    return " ".join(words)


if __name__ == "__main__":
    main()
