"""Read tensors by name from a checkpoint on this machine, whichever shard they are in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lmoe_cli.checkpoint.dequantize import Matrix
from lmoe_cli.checkpoint.index import Stored
from lmoe_cli.checkpoint.packed import Packed
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
        """A whole tensor, as stored; of a packed matrix what it stands for.

        Raises:
            InvalidFileError: The file is damaged.
        """
        found = self.rows(name)
        return found[:] if isinstance(found, Matrix) else found

    def rows(self, name: str) -> Tensor | Matrix:
        """The same, but a packed matrix is left packed until some of its rows are asked for."""
        stored = self._stored[name]
        if not isinstance(stored, Packed):
            return self._mapped(stored)
        matrix = self.packed(stored)
        return matrix[:].T if stored.transposed else matrix  # its rows would lie across the blocks

    def packed(self, stored: Packed) -> Matrix:
        """A packed matrix as (d_out, d_in), however the model keeps it."""
        return Matrix(stored, self._mapped)

    def _mapped(self, stored: Stored) -> Tensor:
        try:
            if stored.file not in self._files:
                opened = safe_open(self._locate(stored.file), framework="pt")
                self._files[stored.file] = self._stack.enter_context(opened)
            tensor: Tensor = self._files[stored.file].get_tensor(stored.name)
        except SafetensorError as error:
            message = f"{stored.file}: {stored.name}: {error}"
            raise InvalidFileError("header-truncated", message, where=stored.file) from error
        return tensor

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._files.clear()
