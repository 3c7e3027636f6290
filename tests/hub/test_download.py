"""What `hub` brings into the ordinary cache, with the real client."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from types import SimpleNamespace

import pytest

from lmoe_cli import files, hub
from lmoe_cli.errors import AccessError, NetworkError, ResourceError
from lmoe_cli.hub.client import patience
from lmoe_cli.hub.download import _bar, git_blob_sha1
from tests.hub.loopback import GOOD

WEIGHTS = os.urandom(5000)
ADAPTER = {"adapter_config.json": b"{}", "README.md": b"# hi", "adapter_model.safetensors": WEIGHTS}
NAMES = ["adapter_config.json", "adapter_model.safetensors"]


class Told:
    def __init__(self):
        self.started: list[tuple[str, int]] = []
        self.advanced = 0

    def start(self, name: str, size: int) -> None:
        self.started.append((name, size))

    def advance(self, size: int) -> None:
        self.advanced += size


@pytest.fixture
def restless(monkeypatch):
    """The client retries without its pause of a second."""
    monkeypatch.setattr("huggingface_hub.file_download.time", SimpleNamespace(sleep=lambda _: None))


def contents(environment):
    """Every whole or partial content in the cache, by name."""
    return {path.name: path.read_bytes() for path in environment.cache.glob("models--*/blobs/*")}


def test_only_what_was_asked_for_arrives_and_progress_is_told(served, environment):
    commit = served.add("acme/lora", ADAPTER)
    told = Told()
    folder = hub.download(hub.look_up("acme/lora"), NAMES, progress=told)
    assert folder == environment.cache / "models--acme--lora" / "snapshots" / commit
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {name: ADAPTER[name] for name in NAMES}
    assert told.started == [("adapter_config.json", 2), ("adapter_model.safetensors", 5000)]
    assert told.advanced == 5002


def test_what_is_there_is_not_fetched_again(served):
    served.add("acme/lora", ADAPTER)
    found = hub.look_up("acme/lora")
    hub.download(found, NAMES)
    served.requests.clear()
    hub.download(found, NAMES)
    assert served.requests == []


def test_other_programs_find_it_offline_under_its_branch(served, environment):
    served.add("acme/lora", ADAPTER)
    hub.download(hub.look_up("acme/lora"), NAMES)
    served.commit("acme/lora", {"adapter_config.json": b'{"r": 8}'})
    folder = hub.download(hub.look_up("acme/lora"), NAMES)
    environment.set(HF_HUB_OFFLINE="1")
    from huggingface_hub import hf_hub_download

    assert hf_hub_download("acme/lora", "adapter_config.json") == str(folder / "adapter_config.json")
    assert hub.download(hub.look_up("acme/lora"), NAMES) == folder


def test_the_token_never_reaches_the_storage(served):
    served.add("acme/lora", ADAPTER, private=True)
    hub.download(hub.look_up("acme/lora", token=GOOD), NAMES, GOOD)
    assert {item.token for item in served.asked("GET", "/", "storage")} == {None}
    assert {item.token for item in served.asked("GET", "/resolve/", "hub")} == {GOOD}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("fault", "code"), [("flip", "hash-mismatch"), ("short", "unreachable")])
def test_a_file_that_is_not_the_announced_one_is_refused_and_not_kept(served, environment, restless, name, fault, code):
    commit = served.add("acme/lora", ADAPTER)
    served.misbehave(f"^GET .*{name}", fault)
    found = hub.look_up("acme/lora")
    with pytest.raises(NetworkError) as error:
        hub.download(found, [name])
    assert error.value.code == code
    assert f"acme/lora/{name}" in error.value.message
    assert contents(environment) == {}
    assert hub.cached_path("acme/lora", commit, name) is None
    served.behave()
    assert (hub.download(found, [name]) / name).read_bytes() == ADAPTER[name]


def test_a_wrong_content_in_the_cache_is_replaced_in_every_commit_that_shares_it(served, environment):
    first = served.add("acme/lora", ADAPTER)
    second = served.commit("acme/lora", {"README.md": b"# new"})
    folder = hub.download(hub.look_up("acme/lora", first), NAMES)
    content = (folder / NAMES[1]).resolve()
    content.write_bytes(WEIGHTS[:-1] + b"?")
    later = hub.download(hub.look_up("acme/lora", second), NAMES)
    assert content.read_bytes() == WEIGHTS
    assert (later / NAMES[1]).read_bytes() == WEIGHTS
    assert not (folder / NAMES[1]).is_symlink()  # rather than a link to nothing, which would break scans of the cache
    assert [item.commit for item in hub.cached_repositories()] == sorted([first, second])


def test_damage_done_after_the_download_can_be_discarded(served):
    served.add("acme/lora", ADAPTER)
    found = hub.look_up("acme/lora")
    folder = hub.download(found, NAMES)
    assert hub.discard_damaged(found, NAMES) == []
    (folder / NAMES[1]).resolve().write_bytes(b"?" * 5000)
    assert hub.discard_damaged(found, NAMES) == [NAMES[1]]
    assert (hub.download(found, NAMES) / NAMES[1]).read_bytes() == WEIGHTS


def test_a_connection_that_breaks_once_goes_on_where_it_was(served, restless):
    data = os.urandom(1 << 20)
    served.add("acme/lora", {NAMES[1]: data})
    served.misbehave("^GET /adapter_model", "truncate", times=1)
    folder = hub.download(hub.look_up("acme/lora"), [NAMES[1]])
    assert (folder / NAMES[1]).read_bytes() == data
    assert [item.range for item in served.asked("GET", "adapter_model", "storage")] == [None, "bytes=524288-"]


def test_a_busy_storage_is_asked_again(served, monkeypatch):
    served.add("acme/lora", ADAPTER)
    served.misbehave("^GET /adapter_model", 429, times=1, retry_after=0)
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))
    assert (hub.download(hub.look_up("acme/lora"), NAMES) / NAMES[1]).read_bytes() == WEIGHTS


def test_a_connection_that_starts_over_and_over_is_given_up(served, environment, restless):
    data = os.urandom(1 << 20)
    served.add("acme/lora", {"adapter_model.safetensors": data})
    served.misbehave("^GET /adapter_model", "restart")
    found = hub.look_up("acme/lora")
    with pytest.raises(NetworkError, match="breaks again and again"):
        hub.download(found, found.files)
    assert contents(environment) == {}


@pytest.mark.parametrize("fault", ["mute", "drip"])
def test_a_download_that_does_not_get_on_is_given_up(served, environment, restless, monkeypatch, fault):
    environment.set(HF_HUB_DOWNLOAD_TIMEOUT="1")
    monkeypatch.setattr(patience, "silence_s", 0.1)
    served.add("acme/lora", ADAPTER)
    served.misbehave("^GET /adapter_model", fault)
    begun = time.monotonic()
    with pytest.raises(NetworkError) as error:
        hub.download(hub.look_up("acme/lora"), NAMES)
    assert error.value.code == "unreachable"
    assert time.monotonic() - begun < 5
    assert list(contents(environment)) == [hashlib.sha1(b"blob 2\0{}").hexdigest()]


@pytest.mark.parametrize(("status", "code"), [(500, "hub-busy"), (403, "not-authorised"), (404, "hub-answer")])
@pytest.mark.parametrize("where", ["^HEAD", "^GET /adapter_model"])
def test_a_server_that_refuses_a_file_is_told_as_it_answered(served, monkeypatch, restless, status, code, where):
    served.add("acme/lora", ADAPTER)
    served.misbehave(where, status, retry_after=60)
    with pytest.raises((NetworkError, AccessError)) as error:
        hub.download(hub.look_up("acme/lora"), NAMES)
    assert error.value.code == code


def test_a_disk_without_room_is_refused_before_the_first_byte(served, monkeypatch):
    served.add("acme/lora", ADAPTER)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(total=1 << 40, free=5001))
    with pytest.raises(ResourceError) as error:
        hub.download(hub.look_up("acme/lora"), NAMES)
    assert error.value.code == "disk-full"
    assert served.asked("GET", "/resolve/") == []


def test_a_disk_that_fills_up_leaves_nothing_half_written(served, environment, monkeypatch):
    served.add("acme/lora", ADAPTER)

    def full(url, temp_file, **_):
        temp_file.write(WEIGHTS[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(ResourceError) as error:
        hub.download(hub.look_up("acme/lora"), NAMES)
    assert error.value.code == "disk-full"
    assert contents(environment) == {}


def test_an_interrupt_leaves_nothing_half_written(served, environment):
    served.add("acme/lora", ADAPTER)
    told = Told()

    def interrupt(size):
        raise KeyboardInterrupt

    told.advance = interrupt
    with pytest.raises(KeyboardInterrupt):
        hub.download(hub.look_up("acme/lora"), NAMES[1:], progress=told)
    assert contents(environment) == {}


def test_the_faster_transport_can_tell_its_progress():
    from huggingface_hub.utils._xet_progress_reporting import XetDownloadProgressReporter

    told = Told()
    report = SimpleNamespace(
        total_bytes=100,
        total_bytes_completed=100,
        total_bytes_completion_rate=1.0,
        total_transfer_bytes_completed=40,
        total_transfer_bytes_completion_rate=None,
    )
    with XetDownloadProgressReporter(
        reconstruction_desc="a", total=100, log_level=0, tqdm_class=_bar(100, told)
    ) as reporter:
        reporter.update_progress(report)
    assert told.advanced == 100


def test_cached_commits_are_listed_and_deleted(served, environment):
    first = served.add("acme/lora", ADAPTER)
    second = served.commit("acme/lora", {"adapter_config.json": b'{"r": 8}'})
    assert hub.cached_repositories() == []
    for commit in (first, second, "main"):
        hub.download(hub.look_up("acme/lora", commit), NAMES)
    listed = {item.commit: item for item in hub.cached_repositories()}
    assert {commit: (item.name, item.refs, item.size) for commit, item in listed.items()} == {
        first: ("acme/lora", (), 5002),
        second: ("acme/lora", ("main",), 5008),
    }
    assert hub.delete([first]) == 2
    assert [item.commit for item in hub.cached_repositories()] == [second]
    assert hub.delete([second]) == 5008
    assert not (environment.cache / "models--acme--lora").exists()


def test_a_git_blob_is_named_as_git_names_it(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")
    assert git_blob_sha1(tmp_path / "a") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_other_libraries_may_use_the_same_client_as_slowly_as_they_like(served, monkeypatch):
    from huggingface_hub import HfApi

    served.add("acme/lora", ADAPTER)
    monkeypatch.setattr(patience, "silence_s", 0.0)
    with pytest.raises(NetworkError):
        hub.download(hub.look_up("acme/lora"), NAMES)
    assert HfApi().model_info("acme/lora").id == "acme/lora"
