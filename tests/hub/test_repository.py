"""What `hub` reads without downloading, with the real client."""

from __future__ import annotations

import json
import os
import time

import pytest

from lmoe_cli import hub
from lmoe_cli.errors import AccessError, LmoeError, NetworkError, NotFoundError, UsageError
from lmoe_cli.hub.client import patience
from tests.hub.loopback import BAD, GOOD

FILES = {f"folder/{number}.txt": b"text %d" % number for number in range(7)}
WEIGHTS = os.urandom(5000)


@pytest.fixture
def impatient(monkeypatch, environment):
    """Give up after a third of a second."""
    environment.set(HF_HUB_DOWNLOAD_TIMEOUT="1")
    monkeypatch.setattr(patience, "silence_s", 0.1)


def test_a_repository_lists_all_pages_of_its_files_with_what_the_hub_announces(served):
    commit = served.add("acme/lora", {**FILES, "adapter_model.safetensors": WEIGHTS})
    found = hub.look_up("acme/lora")
    assert (found.name, found.commit, found.online) == ("acme/lora", commit, True)
    assert {name: file.size for name, file in found.files.items()} == {
        **{name: len(data) for name, data in FILES.items()},
        "adapter_model.safetensors": 5000,
    }
    assert found.files["adapter_model.safetensors"].sha256
    assert found.files["folder/1.txt"].git_sha1


def test_branches_tags_and_commits_are_found(served):
    first = served.add("acme/lora", {"a": b"1"})
    second = served.commit("acme/lora", {"a": b"22"}, branch="refs/pr/1")
    assert hub.look_up("acme/lora").commit == first
    assert hub.look_up("acme/lora", "refs/pr/1").commit == second
    assert hub.look_up("acme/lora", first).commit == first
    with pytest.raises(NotFoundError, match="no revision 'nope'") as error:
        hub.look_up("acme/lora", "nope")
    assert error.value.code == "revision-not-found"


def test_a_range_follows_the_redirect_to_storage_and_the_token_stays_behind(served):
    served.add("acme/lora", {"adapter_model.safetensors": WEIGHTS, "a.txt": b"0123456789"}, private=True)
    found = hub.look_up("acme/lora", token=GOOD)
    served.requests.clear()
    assert hub.read_range(found, "adapter_model.safetensors", 8, 100, GOOD) == WEIGHTS[8:108]
    assert hub.read_range(found, "adapter_model.safetensors", 4990, 100, GOOD) == WEIGHTS[4990:]
    assert hub.read_range(found, "a.txt", 2, 3, GOOD) == b"234"
    assert {(item.server, item.token) for item in served.requests} == {("hub", GOOD), ("storage", None)}
    assert [item.range for item in served.asked("GET", "/", "storage")] == ["bytes=8-107", "bytes=4990-5089"]


def test_a_server_that_ignores_ranges_still_gives_the_bytes_that_were_asked_for(served):
    served.add("acme/lora", {"adapter_model.safetensors": WEIGHTS})
    served.misbehave("safetensors", "whole")
    assert hub.read_range(hub.look_up("acme/lora"), "adapter_model.safetensors", 8, 100) == WEIGHTS[8:108]


@pytest.mark.parametrize(
    ("name", "token", "kind", "code"),
    [
        ("acme/none", None, NotFoundError, "repository-not-found"),
        ("acme/none", GOOD, NotFoundError, "repository-not-found"),
        ("acme/private", None, NotFoundError, "repository-not-found"),
        ("acme/private", BAD, AccessError, "not-authorised"),
        ("acme/open", BAD, AccessError, "not-authorised"),
        ("acme/-bad-", None, UsageError, "bad-reference"),
        ("acme/bad--name", None, UsageError, "bad-reference"),
        ("../../etc", None, UsageError, "bad-reference"),
    ],
)
def test_what_is_not_to_be_had_is_said_in_one_error(served, name, token, kind, code):
    served.add("acme/private", FILES, private=True)
    served.add("acme/open", FILES)
    with pytest.raises(kind) as error:
        hub.look_up(name, token=token)
    assert error.value.code == code
    assert name in error.value.message


def test_a_private_repository_opens_with_the_token(served, environment):
    served.add("acme/private", FILES, private=True)
    assert hub.look_up("acme/private", token=GOOD).files
    environment.set(HF_TOKEN=GOOD)
    assert hub.look_up("acme/private").files


def test_a_gated_repository_can_be_listed_but_not_read_and_the_error_names_its_page(served):
    served.add("acme/gated", {"adapter_config.json": b"{}"}, gated=True)
    found = hub.look_up("acme/gated")
    for attempt in (
        lambda: hub.read_range(found, "adapter_config.json", 0, 2),
        lambda: hub.download(found, found.files),
    ):
        with pytest.raises(AccessError) as error:
            attempt()
        assert error.value.code == "gated"
        assert f"{served.url}/acme/gated," in error.value.hint
    assert hub.read_range(found, "adapter_config.json", 0, 2, GOOD) == b"{}"


def test_a_renamed_repository_is_found_under_its_old_name(served):
    served.add("acme/old", {"adapter_model.safetensors": WEIGHTS})
    served.rename("acme/old", "acme/new")
    found = hub.look_up("acme/old")
    assert hub.read_range(found, "adapter_model.safetensors", 0, 8) == WEIGHTS[:8]
    folder = hub.download(found, found.files)
    assert (folder / "adapter_model.safetensors").read_bytes() == WEIGHTS


def test_a_busy_hub_is_asked_again(served):
    served.add("acme/lora", {"adapter_model.safetensors": WEIGHTS})
    served.misbehave("/api/models", 429, times=1, retry_after=0)
    found = hub.look_up("acme/lora")
    served.misbehave("/resolve/", 503, times=1, retry_after=0)
    assert hub.read_range(found, "adapter_model.safetensors", 0, 8) == WEIGHTS[:8]


@pytest.mark.parametrize(
    ("fault", "retry_after", "code"),
    [
        (429, 3600, "hub-busy"),
        (503, 3600, "hub-busy"),
        (500, 0, "hub-busy"),
        (418, None, "hub-answer"),
        ("nonsense", None, "hub-answer"),
    ],
)
def test_a_hub_that_does_not_work_is_said_so_and_not_waited_for_long(served, monkeypatch, fault, retry_after, code):
    monkeypatch.setattr("lmoe_cli.hub.repository.RETRIES", 0)
    served.add("acme/lora", FILES)
    served.misbehave("/api/models", fault, retry_after=retry_after)
    begun = time.monotonic()
    with pytest.raises(NetworkError) as error:
        hub.look_up("acme/lora")
    assert error.value.code == code
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize(
    "answer",
    [b"[]", b"{}", b"null", b'{"sha": 3}', b'{"sha": "../.."}', b"[" * 100_000, b"\xff\xfe", b'{"sha": null}'],
    ids=lambda answer: repr(answer[:16]),
)
def test_an_answer_that_is_not_one_of_a_hub_is_an_error(served, monkeypatch, answer):
    monkeypatch.setattr(
        "tests.hub.loopback.Handler.route",
        lambda self, *_: self.answer(200, answer, {"Content-Type": "application/json"}),
    )
    with pytest.raises(NetworkError) as error:
        hub.look_up("acme/lora")
    assert error.value.code == "hub-answer"


@pytest.mark.parametrize("size", [-1, None, "5", 1.5, True])
def test_a_file_of_impossible_size_is_an_error(served, monkeypatch, size):
    served.add("acme/lora", FILES)
    rows = json.dumps([{"type": "file", "path": "a", "oid": "x", "size": size}]).encode()
    monkeypatch.setattr("tests.hub.loopback.Handler.tree", lambda self, *_: self.answer(200, rows, {}))
    with pytest.raises(NetworkError) as error:
        hub.look_up("acme/lora")
    assert error.value.code == "hub-answer"


@pytest.mark.parametrize("endpoint", ["no-scheme", "http://127.0.0.1:1", "ftp://x"])
def test_an_endpoint_that_leads_nowhere_is_an_error(environment, endpoint):
    environment.set(HF_ENDPOINT=endpoint)
    with pytest.raises(NetworkError) as error:
        hub.look_up("acme/lora")
    assert error.value.code in ("unreachable", "hub-answer")
    assert "\n" not in error.value.message


@pytest.mark.parametrize("fault", ["mute", "drip", "truncate"])
@pytest.mark.parametrize("what", ["/api/models/acme/lora/revision", "/tree/", "^GET /adapter_model"])
def test_a_slow_or_broken_server_is_given_up(served, impatient, fault, what):
    served.add("acme/lora", {**FILES, "adapter_model.safetensors": WEIGHTS})
    served.misbehave(what, fault)
    begun = time.monotonic()
    with pytest.raises(NetworkError) as error:
        hub.read_range(hub.look_up("acme/lora"), "adapter_model.safetensors", 0, 4000)
    assert error.value.code == "unreachable"
    assert time.monotonic() - begun < 10


def test_without_a_network_the_cache_answers(served, environment):
    commit = served.add("acme/lora", {**FILES, "adapter_model.safetensors": WEIGHTS})
    hub.download(hub.look_up("acme/lora"), ["folder/1.txt"])
    environment.set(HF_HUB_OFFLINE="1")
    offline = hub.look_up("acme/lora")
    environment.set(HF_HUB_OFFLINE="0")
    served.close()
    for found in (offline, hub.look_up("acme/lora"), hub.look_up("acme/lora", commit)):
        assert (found.commit, found.online, list(found.files)) == (commit, False, ["folder/1.txt"])
    for name, revision in (("acme/other", None), ("acme/lora", "branch")):
        with pytest.raises(NetworkError) as error:
            hub.look_up(name, revision)
        assert error.value.code == "unreachable"


def test_offline_what_is_not_in_the_cache_says_so(served, environment):
    served.add("acme/lora", FILES)
    environment.set(HF_HUB_OFFLINE="1")
    with pytest.raises(LmoeError, match="not in the local cache, and offline") as error:
        hub.look_up("acme/lora")
    assert (error.value.code, error.value.exit_code) == ("offline", 5)
