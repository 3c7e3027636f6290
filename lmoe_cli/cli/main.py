"""Where the program begins and ends."""

from __future__ import annotations

import sys
from typing import NoReturn

from lmoe_cli.errors import EXIT_INTERRUPTED


def main() -> NoReturn:
    """Run the command line of this process and leave with its exit code."""
    try:  # what loads the modules can be interrupted too
        from lmoe_cli.cli.process import standard_streams, terminable
        from lmoe_cli.cli.root import run, unwritten

        arguments = sys.argv[1:]
        with standard_streams() as stdout, terminable():
            code = run(arguments)
            code = unwritten(stdout, code)
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    sys.exit(code)
