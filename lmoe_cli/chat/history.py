"""What was typed before, in a file that may well be impossible to write."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import FileHistory

from lmoe_cli import files
from lmoe_cli.errors import LmoeError


class History(FileHistory):
    """Lines that were typed, kept where that is possible.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with suppress(LmoeError):  # what cannot be made, and what is there already
            files.write_file(path, b"", mode=0o600)

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            return list(super().load_history_strings()) if self._is_file else []
        return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            if self._is_file:
                super().store_string(string)

    @property
    def _is_file(self) -> bool:
        """Whether it is no device or pipe, which would never end or wait for somebody at the other end."""
        return Path(os.fsdecode(self.filename)).is_file()
