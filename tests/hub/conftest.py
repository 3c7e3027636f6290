"""The real Hub client against a Hub on this machine, with an empty cache, in this process.

The client reads ``HF_*`` variables when its module of constants is imported, so that module is loaded again around
every test.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.hub.loopback import Loopback

FORGOTTEN = (
    "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy",
)  # fmt: skip


class Environment(NamedTuple):
    """Variables for the client, in this process and in those it starts."""

    patch: pytest.MonkeyPatch
    cache: Path
    """Where repositories are cached."""

    def set(self, **variables: str) -> None:
        for name, value in variables.items():
            self.patch.setenv(name, value)
        _start_again()


def _start_again() -> None:
    from huggingface_hub import close_session, constants

    from lmoe_cli.hub.client import client

    close_session()
    importlib.reload(constants)
    client.cache_clear()  # it sets some constants of its own


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[Environment]:
    with pytest.MonkeyPatch.context() as patch:
        for name in FORGOTTEN:
            patch.delenv(name, raising=False)
        made = Environment(patch, tmp_path / "hf" / "hub")
        made.set(HF_HOME=str(tmp_path / "hf"), XDG_CACHE_HOME=str(tmp_path / "cache"), NO_COLOR="1", NO_PROXY="*")
        yield made
    _start_again()


@pytest.fixture
def served(environment: Environment) -> Iterator[Loopback]:
    """A Hub that the client believes to be the Hub."""
    with Loopback() as hub:
        environment.set(HF_ENDPOINT=hub.url)
        yield hub


class Answer(NamedTuple):
    """What a command said."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def data(self) -> Any:
        return self.document["data"]

    @property
    def codes(self) -> list[str]:
        return [item["code"] for item in self.document["findings"]]


@pytest.fixture
def lmoe(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Run a command line in this process."""
    from lmoe_cli.cli.main import main

    def run(*arguments: object, stdin: str = "") -> Answer:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["lmoe", *map(str, arguments)])
        read, write = os.pipe()
        os.write(write, stdin.encode())
        os.close(write)
        with os.fdopen(read) as file:
            monkeypatch.setattr(sys, "stdin", file)
            with pytest.raises(SystemExit) as ended:
                main()
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Answer(int(ended.value.code or 0), out, err)

    return run
