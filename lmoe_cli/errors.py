"""Every error a user can cause.

* LmoeError                 exit 1    the verdict is no
  - UsageError              exit 2    a bad argument, or arguments that do not go together
  - InvalidFileError        exit 2    a file that is not what it should be
  - NotFoundError           exit 3    a file, repository, revision or name that is not there
  - AccessError             exit 4    not authorised, gated, or no permission
  - NetworkError            exit 5    no network, or a download that did not arrive whole
  - ResourceError           exit 6    no memory, or no room on the disk

A bug ends with exit 70, an interrupt with 130, another signal with 128 and its number. Every error has a stable code,
explained in `codes.CODES`.
"""

from __future__ import annotations

from lmoe_cli.readable import readable

EXIT_BUG = 70
EXIT_INTERRUPTED = 130
EXIT_SIGNAL = 128
"""Plus the number of the signal that ended the program."""


class LmoeError(Exception):
    """A problem the user can act on.

    Args:
        code: Stable name of the kind of problem, such as ``"header-truncated"``; a key of `codes.CODES`.
        message: What is wrong, naming the thing and the value that was seen, however long; it is kept `readable`.
        hint: What to do next, as a command or an edit. Printed on its own line.
        where: File, repository or place in one, for machine-readable output.
    """

    exit_code = 1

    def __init__(self, code: str, message: str, *, hint: str = "", where: str = "") -> None:
        self.code = code
        self.message = readable(message)
        self.hint = readable(hint)
        super().__init__(self.message)
        self.where = where


class UsageError(LmoeError):
    """A bad argument, or arguments that do not go together."""

    exit_code = 2


class InvalidFileError(LmoeError):
    """A file that is not what it should be."""

    exit_code = 2


class NotFoundError(LmoeError):
    """A file, repository, revision or name that is not there."""

    exit_code = 3


class AccessError(LmoeError):
    """Not authorised, gated, or no permission."""

    exit_code = 4


class NetworkError(LmoeError):
    """No network, or a download that did not arrive whole."""

    exit_code = 5


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that there is no memory left; torch's allocators say so by words."""
    is_named_so = type(error).__name__ == "OutOfMemoryError"  # torch's, which may not be loaded here
    return isinstance(error, MemoryError) or is_named_so or "allocate memory" in str(error)


class ResourceError(LmoeError):
    """No memory, or no room on the disk."""

    exit_code = 6
