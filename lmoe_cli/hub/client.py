"""The client library, made patient within bounds, and what it raises turned into errors a user can act on."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from lmoe_cli.disk import FORBIDDEN, FULL, writing
from lmoe_cli.errors import AccessError, InvalidFileError, LmoeError, NetworkError, NotFoundError, UsageError

SILENCE_S = 20.0
"""Longest wait for the next byte; ``HF_HUB_DOWNLOAD_TIMEOUT`` may make it longer."""
SLOWEST = 1000.0
"""Bytes per second, over three such waits; a server that is slower for longer is given up."""
LONGEST_WAIT_S = 10
"""A busy Hub may ask for a longer wait; the user is told instead."""
CHUNK = 1 << 18
"""Bytes that a download moves at once; with the client's own ten million a progress bar would stand still."""
TOKEN = re.compile(r"Bearer [!-~]+")
"""A header that can be sent."""
BUSY = (408, 429, 500, 502, 503, 504)


class GaveUpError(Exception):
    """Raised inside the client's requests, where the repository's name is not known.

    Args:
        code: ``"hub-busy"`` or ``"unreachable"``.
        reason: For the user.
    """

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Patience:
    """Ends an operation whose server is too slow. The client bounds each wait, but not their sum.

    Only operations of this package are watched: other libraries in this process use the same client.
    """

    def __init__(self) -> None:
        self.silence_s = SILENCE_S
        self.is_watching = False

    def begin(self) -> None:
        """An operation begins."""
        self.is_watching = True
        self._renew()

    def end(self) -> None:
        """The operation has ended, one way or another."""
        self.is_watching = False

    def count(self, size: int) -> None:
        """So many bytes arrived."""
        if not self.is_watching:
            return
        self._arrived += size
        elapsed = time.monotonic() - self._since
        if elapsed < 3 * self.silence_s:
            return
        if self._arrived < SLOWEST * elapsed:
            raise GaveUpError("unreachable", f"{self._arrived} bytes arrived in {elapsed:.0f} s")
        self._renew()

    def _renew(self) -> None:
        self._since = time.monotonic()
        self._arrived = 0


patience = Patience()


@cache
def client() -> Any:
    """The library, imported late because that takes a third of a second, with a bound on every request."""
    try:
        import huggingface_hub
        from huggingface_hub.utils import disable_progress_bars, logging
        from huggingface_hub.utils._http import default_client_factory
    except ValueError as error:  # it reads the environment
        raise UsageError(
            "usage", f"the Hub's client: {error}", hint="check HF_ENDPOINT and other HF_* variables"
        ) from error

    huggingface_hub.set_client_factory(lambda: _bounded(default_client_factory(), huggingface_hub))
    huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    logging.set_verbosity_error()
    disable_progress_bars()
    return huggingface_hub


def _bounded(session: Any, library: Any) -> Any:
    """Let an HTTP session of the client lose its patience."""

    class Watched(_http(library).SyncByteStream):  # type: ignore[misc]
        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __iter__(self) -> Iterator[bytes]:
            for chunk in self.stream:
                patience.count(len(chunk))
                yield chunk

        def close(self) -> None:
            self.stream.close()

    def before(request: Any) -> None:
        if not patience.is_watching:
            return
        patience.count(0)
        limit = max(patience.silence_s, library.constants.HF_HUB_DOWNLOAD_TIMEOUT)
        waits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {kind: min(wait or limit, limit) for kind, wait in waits.items()}

    def after(response: Any) -> None:
        if not patience.is_watching:
            return
        asked = re.search(r"\bt\s*=\s*(\d+)", response.headers.get("ratelimit", ""))
        wait = asked[1] if asked else response.headers.get("retry-after", "")
        if response.status_code in BUSY and wait.isdigit() and int(wait) > LONGEST_WAIT_S:
            raise GaveUpError("hub-busy", f"the Hub answered {response.status_code} and asks to wait {wait} s")
        response.stream = Watched(response.stream)

    session.event_hooks = {
        "request": [*session.event_hooks["request"], before],
        "response": [*session.event_hooks["response"], after],
    }
    return session


@contextlib.contextmanager
def translated(name: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the client raises in one operation on a repository into errors a user can act on."""
    kinds = client().errors
    patience.begin()
    try:
        yield
    except LmoeError:
        raise
    except GaveUpError as error:
        raise _gave_up(name, error) from error
    except kinds.GatedRepoError as error:
        page = f"{client().constants.ENDPOINT}/{'/'.join(name.split('/')[:2])}"
        hint = f"accept its terms on {page}, then 'hf auth login' or --token"
        raise AccessError("gated", f"{name}: access is restricted", hint=hint, where=name) from error
    except kinds.RevisionNotFoundError as error:
        hint = f"its branches and tags: {client().constants.ENDPOINT}/{name}/tree/main"
        message = f"{name}: no revision {revision!r}"
        raise NotFoundError("revision-not-found", message, hint=hint, where=name) from error
    except kinds.RepositoryNotFoundError as error:
        hint = "check the spelling; a private repository needs 'hf auth login' or --token"
        raise NotFoundError("repository-not-found", f"{name}: no such repository", hint=hint, where=name) from error
    except kinds.LocalEntryNotFoundError as error:
        raise _caused(name, error) from error
    except kinds.EntryNotFoundError as error:
        raise NotFoundError("not-found", f"{name}: no such file in the repository", where=name) from error
    except kinds.OfflineModeIsEnabled as error:
        raise offline(name) from error
    except kinds.HfHubHTTPError as error:
        raise _refused(name, error) from error
    except (kinds.HTTPError, TimeoutError) as error:
        raise _unreachable(name, error) from error
    except kinds.HFValidationError as error:
        raise UsageError("bad-reference", f"{name}: {error}", hint="write organisation/name", where=name) from error
    except OSError as error:
        if error.filename is None and error.errno not in (*FULL, *FORBIDDEN):
            raise _unreachable(name, error) from error
        raise _local(error) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, _http(client()).InvalidURL) as error:
        message = f"{name}: the server's answer is not one of a Hub"
        raise NetworkError("hub-answer", message, hint="check HF_ENDPOINT", where=name) from error
    except RuntimeError as error:  # of the client's faster transport
        said = re.search(r"os error (\d+)", str(error))
        number = int(said[1]) if said else 0
        if number in FULL:
            raise _local(OSError(number, os.strerror(number))) from error
        raise _unreachable(name, error) from error
    finally:
        patience.end()


def _http(library: Any) -> Any:
    """The HTTP library of the client, which has changed it before."""
    return sys.modules[library.errors.HTTPError.__module__.partition(".")[0]]


def _local(error: OSError) -> LmoeError:
    """What the disk of this machine says while the client uses its cache."""
    path = Path(os.fsdecode(error.filename) if error.filename else client().constants.HF_HUB_CACHE)
    if error.errno in (*FULL, *FORBIDDEN):
        try:
            with writing(path):
                raise error
        except LmoeError as told:
            return told
    hint = "check HF_HOME, HF_HUB_CACHE and HF_TOKEN_PATH"
    return InvalidFileError("bad-path", f"cannot use {path}: {error.strerror}", hint=hint, where=str(path))


def headers(token: str | None) -> dict[str, str]:
    """What a request says of who asks.

    Args:
        token: Overrides the one stored by ``hf auth login``.

    Raises:
        UsageError: No token can look like that. It is not shown.
    """
    made: dict[str, str] = client().utils.build_hf_headers(token=token)
    if not TOKEN.fullmatch(made.get("authorization", "Bearer none")):
        hint = "copy it again from https://huggingface.co/settings/tokens"
        raise UsageError("usage", "the token for the Hub is empty, or holds characters that no token has", hint=hint)
    return made


def _gave_up(name: str, error: GaveUpError) -> NetworkError:
    hint = "try again in a while" if error.code == "hub-busy" else "check the network and HF_ENDPOINT, and try again"
    return NetworkError(error.code, f"{name}: {error}", hint=hint, where=name)


def _caused(name: str, error: BaseException) -> LmoeError:
    """What the client says of a file that it could neither fetch nor find in the cache."""
    kinds, cause = client().errors, error.__cause__
    if isinstance(cause, kinds.OfflineModeIsEnabled):
        return offline(name)
    if isinstance(cause, kinds.HfHubHTTPError):
        return _refused(name, cause)
    return _unreachable(name, cause or error)


def offline(name: str) -> NetworkError:
    """The error for what is not in the cache while there is no network."""
    hint = "unset HF_HUB_OFFLINE, or pull it while there is a network"
    return NetworkError("offline", f"{name}: not in the local cache, and offline", hint=hint, where=name)


def _refused(name: str, error: Any) -> LmoeError:
    status = error.response.status_code
    if isinstance(error, client().errors.DisabledRepoError):
        return AccessError("not-authorised", f"{name}: the Hub has disabled this repository", where=name)
    if status in (401, 403):
        message = f"{name}: the Hub does not accept these credentials"
        hint = "check the token: 'hf auth whoami', 'hf auth login'"
        return AccessError("not-authorised", message, hint=hint, where=name)
    code = "hub-busy" if status in BUSY else "hub-answer"
    return NetworkError(code, f"{name}: the Hub answered {status}", hint="try again in a while", where=name)


def _unreachable(name: str, error: BaseException) -> NetworkError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    hint = "check the network and HF_ENDPOINT; what is in the local cache works with HF_HUB_OFFLINE=1"
    return NetworkError("unreachable", f"{name}: cannot reach the Hub: {reason}", hint=hint, where=name)
