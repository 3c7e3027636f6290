"""The one module that reads from and writes to the disk, when the disk does not play along."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lmoe_cli import files
from lmoe_cli.errors import AccessError, InvalidFileError, NotFoundError, ResourceError, UsageError
from lmoe_cli.locks import alone_in

KILLED = """
import os, signal, sys
from pathlib import Path
from lmoe_cli import files
with files.new_folder(Path(sys.argv[1])) as partial:
    (partial / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_reading_refuses_what_is_no_ordinary_file_of_bounded_size(tmp_path):
    (tmp_path / "large").write_bytes(b"x" * 11)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    refused = {
        "none": (NotFoundError, "not-found"),
        "dangling": (NotFoundError, "not-found"),
        ".": (InvalidFileError, "not-a-file"),
        "pipe": (InvalidFileError, "not-a-file"),  # and does not wait for a writer
        "large": (InvalidFileError, "file-too-large"),
        "loop": (InvalidFileError, "bad-path"),
        "large/inside": (InvalidFileError, "bad-path"),
        "x" * 300: (InvalidFileError, "bad-path"),
    }
    for name, (kind, code) in refused.items():
        with pytest.raises(kind) as error:
            files.read_bytes(tmp_path / name, 10)
        assert error.value.code == code
    with pytest.raises(InvalidFileError):
        files.read_bytes(Path("/dev/zero"), 10)
    assert files.read_bytes(tmp_path / "large", 11) == b"x" * 11


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_or_written_is_said_so(tmp_path):
    (tmp_path / "secret").write_bytes(b"x")
    (tmp_path / "secret").chmod(0)
    with pytest.raises(AccessError):
        files.read_bytes(tmp_path / "secret", 10)
    tmp_path.chmod(0o500)
    with pytest.raises(AccessError):
        files.write_file(tmp_path / "new", b"x")


def test_a_system_that_refuses_to_read_is_told_in_its_words(tmp_path):
    def refuse():
        with files.reading(tmp_path):
            raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(AccessError) as error:
        refuse()
    assert (error.value.code, error.value.exit_code) == ("unreadable", 4)


@pytest.mark.parametrize(
    ("number", "kind", "code"),
    [
        (errno.ENOSPC, ResourceError, "disk-full"),
        (errno.EDQUOT, ResourceError, "disk-full"),
        (errno.EFBIG, ResourceError, "disk-full"),
        (errno.EROFS, AccessError, "not-writable"),
        (errno.EACCES, AccessError, "not-writable"),
        (errno.ENOMEM, ResourceError, "out-of-memory"),
        (errno.ENAMETOOLONG, InvalidFileError, "bad-path"),
        (errno.EIO, InvalidFileError, "bad-path"),
    ],
)
def test_a_failing_disk_is_an_error_and_leaves_what_was_there(tmp_path, monkeypatch, number, kind, code):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    target = tmp_path / "a.json"
    target.write_bytes(b"old")
    monkeypatch.setattr(files.os, "write", fail)
    with pytest.raises(kind) as error:
        files.write_file(target, b"new", force=True)
    assert error.value.code == code
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert target.read_bytes() == b"old"
    with pytest.raises(kind), files.new_folder(tmp_path / "out") as partial, files.NewFile(partial / "x") as file:
        file.write(b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(kind) as error, files.new_folder(tmp_path / "out") as partial, files.NewFile(partial / "x") as f:
        f.write(b"x")
    assert error.value.where == str(tmp_path / "out" / "x")  # not the name it has until it is whole


def test_a_written_file_is_whole_has_the_umasks_mode_and_replaces_only_when_told(tmp_path):
    mask = os.umask(0o027)
    try:
        files.write_file(tmp_path / "deep" / "a", b"1")
    finally:
        os.umask(mask)
    assert (tmp_path / "deep" / "a").stat().st_mode & 0o777 == 0o640
    with pytest.raises(UsageError) as error:
        files.write_file(tmp_path / "deep" / "a", b"2")
    assert error.value.code == "output-exists"
    files.write_file(tmp_path / "deep" / "a", b"2", force=True)
    assert (tmp_path / "deep" / "a").read_bytes() == b"2"


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def stop():
        with files.new_folder(tmp_path / "out") as partial:
            (partial / "config.json").write_text("half")
            assert not (tmp_path / "out").exists()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert list(tmp_path.iterdir()) == []
    with files.new_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_that_came_meanwhile_is_not_replaced(tmp_path, force):
    def written():
        with files.new_folder(tmp_path / "out", force=force) as folder:
            (folder / "a").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "b").write_text("theirs")

    with pytest.raises(UsageError) as caught:
        written()
    assert caught.value.code == ("output-not-ours" if force else "output-exists")
    assert (tmp_path / "out" / "b").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    with alone_in(tmp_path / "work"):
        with pytest.raises(UsageError) as caught, alone_in(tmp_path / "work"):
            pass
        assert caught.value.code == "output-busy"
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "work"):
        pass
    assert not list(tmp_path.iterdir())


def test_only_folders_that_lmoe_may_have_written_are_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    (tmp_path / "mine" / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for target in ("mine", "link"):
        with pytest.raises(UsageError) as error, files.new_folder(tmp_path / target, force=True):
            pass
        assert error.value.code == "output-not-ours"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / files.REPORT).write_text("old")
    with files.new_folder(tmp_path / "model", force=True) as partial:
        (partial / "new.json").write_text("new")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["new.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "mine", "model"]


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert [path.name.endswith(".partial") for path in tmp_path.iterdir()] == [True]
    with files.new_folder(tmp_path / "out") as partial:
        (partial / "config.json").write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_copying_takes_any_range_and_notices_an_early_end(tmp_path):
    data = os.urandom(100_000)
    (tmp_path / "from").write_bytes(data)
    for hashed in (False, True):
        with files.NewFile(tmp_path / f"to{hashed}", hashed=hashed) as file:
            file.write(b"head")
            file.copy(tmp_path / "from", 10, 90_000)
        assert (tmp_path / f"to{hashed}").read_bytes() == b"head" + data[10:90_010]
        assert file.sha256 == (hashlib.sha256(b"head" + data[10:90_010]).hexdigest() if hashed else "")
    with pytest.raises(InvalidFileError), files.NewFile(tmp_path / "short") as file:
        file.copy(tmp_path / "from", 10, 100_000)


def test_a_hash_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"hello\n")
    assert files.sha256(tmp_path / "a") == hashlib.sha256(b"hello\n").hexdigest()
    with pytest.raises(NotFoundError):
        files.sha256(tmp_path / "none")


def test_room_is_asked_of_the_nearest_folder_that_exists(tmp_path):
    files.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(ResourceError) as error:
        files.require_space(tmp_path / "not" / "yet", 1 << 60)
    assert error.value.code == "disk-full"


def test_removing_is_quiet_about_what_is_not_there(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    files.remove_folder(tmp_path / "a")
    files.remove_folder(tmp_path / "a")
    files.remove(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_what_has_no_name_of_its_own_is_no_new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("new/..", ".", ".."):
        with pytest.raises(UsageError), files.new_folder(Path(name)):
            pass
    with pytest.raises((InvalidFileError, UsageError)):
        files.write_file(Path("."), b"x", force=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc")
def test_what_is_no_disk_is_not_called_full():
    files.require_space(Path("/proc/x"), 1)
    with pytest.raises((InvalidFileError, AccessError)), files.new_folder(Path("/proc/x")):
        pass


@pytest.mark.parametrize("is_refused", [False, True])
def test_a_large_file_is_whole_whatever_its_file_system_says_to_advice(tmp_path, monkeypatch, is_refused):
    asked = []

    def advise(*_):
        asked.append(1)
        if is_refused:
            raise OSError(errno.EINVAL, "no advice here")

    monkeypatch.setattr(os, "posix_fadvise", advise)
    data = os.urandom(files.KEPT // 4 + 3)
    with files.NewFile(tmp_path / "large", hashed=True) as file:
        for _ in range(11):
            file.write(data)
    assert (tmp_path / "large").read_bytes() == data * 11
    assert file.sha256 == hashlib.sha256(data * 11).hexdigest()
    assert len(asked) >= 2
