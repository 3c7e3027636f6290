"""A remembered hash is that of the bytes as they are now, or it is not used."""

from __future__ import annotations

import hashlib
import os

import pytest

from lmoe_cli import files, hashes


@pytest.fixture
def read(monkeypatch):
    """Every size is worth remembering at once. Gives the paths that were read for their hash."""
    seen = []
    whole = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: seen.append(path) or whole(path))
    monkeypatch.setattr(hashes, "SMALL", 0)
    monkeypatch.setattr(hashes, "SETTLED_NS", 0)
    return seen


def of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_read_once_for_its_hash_until_it_changes(tmp_path, read):
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    assert [hashes.sha256(path), hashes.sha256(path)] == [of(b"first")] * 2
    assert read == [path]
    path.write_bytes(b"other")
    assert hashes.sha256(path) == of(b"other")


def test_a_change_that_hides_behind_size_and_modification_time_is_seen(tmp_path, read):
    path, beside = tmp_path / "weights", tmp_path / "beside"
    path.write_bytes(b"first")
    then = path.stat()
    hashes.sha256(path)
    path.write_bytes(b"other")
    os.utime(path, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert hashes.sha256(path) == of(b"other")
    beside.write_bytes(b"third")
    os.utime(beside, ns=(then.st_atime_ns, then.st_mtime_ns))
    beside.replace(path)
    assert hashes.sha256(path) == of(b"third")


def test_a_file_changed_a_moment_ago_is_not_remembered(tmp_path, read, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED_NS", 3600 * 10**9)
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    assert [hashes.sha256(path), hashes.sha256(path)] == [of(b"first")] * 2
    assert read == [path, path]


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b'{"sha256": 3}', b"\xff" * 9, b"[" * 99999])
def test_a_damaged_memory_is_not_believed(tmp_path, read, damage):
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    hashes.sha256(path)
    hashes._memory(path).write_bytes(damage)
    assert hashes.sha256(path) == of(b"first")


def test_a_file_that_nothing_can_be_remembered_of_is_hashed_all_the_same(tmp_path, read, monkeypatch):
    (tmp_path / "no-folder").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    path = tmp_path / "weights"
    path.write_bytes(b"first")
    assert hashes.sha256(path) == of(b"first")
