"""Read tensors by name from a checkpoint on this machine, whichever shard they are in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.errors import InvalidFileError


class TensorReader:
    """Tensors of safetensors files, mapped rather than copied. Use it in a ``with`` block.

    Args:
        stored: Tensor name → where it is.
        locate: File name → path on this machine.
    """

    def __init__(self, stored: Mapping[str, Stored], locate: Callable[[str], Path]) -> None:
        self._stored = stored
        self._locate = locate
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, as stored.

        Raises:
            InvalidFileError: The file is damaged.
        """
        file = self._stored[name].file
        try:
            if file not in self._files:
                self._files[file] = self._stack.enter_context(safe_open(self._locate(file), framework="pt"))
            tensor: Tensor = self._files[file].get_tensor(name)
        except SafetensorError as error:
            raise InvalidFileError("header-truncated", f"{file}: {name}: {error}", where=file) from error
        return tensor

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files.clear()
