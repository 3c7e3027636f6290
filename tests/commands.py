"""Commands as a script would call them: with an exit code, what they print, and no terminal."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from subprocess import CompletedProcess
from unittest import mock

from lmoe_cli.cli.root import run

QUIET = {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def lmoe(*words, cwd, text="", **env):
    """A command in this process, which has loaded torch already, with a text on its stdin."""
    arguments, out, error = [str(word) for word in words], io.StringIO(), io.StringIO()
    stdin = mock.patch("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    streams = (contextlib.redirect_stdout(out), contextlib.redirect_stderr(error), stdin)
    with contextlib.ExitStack() as stack:
        for context in (contextlib.chdir(cwd), mock.patch.dict(os.environ, QUIET | env), *streams):
            stack.enter_context(context)
        code = run(arguments)
    return CompletedProcess(arguments, code, out.getvalue(), error.getvalue())


def process(*words, cwd, text="", **env):
    """A command as a process of its own, with a text on its stdin."""
    return subprocess.run(
        [sys.executable, "-m", "lmoe_cli", *(word if isinstance(word, bytes) else str(word) for word in words)],
        capture_output=True, text=True, cwd=cwd, input=text, env={**os.environ, **QUIET, **env},
    )  # fmt: skip
