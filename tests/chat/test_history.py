"""Where lines that were typed are kept, when that is no ordinary file."""

from __future__ import annotations

import os

import pytest

from lmoe_cli.chat.history import History


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_history_that_is_no_file_is_neither_read_nor_written(tmp_path, kind):
    path = tmp_path / "history"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/full")
    else:
        path.mkdir()
    history = History(path)
    assert list(history.load_history_strings()) == []
    history.store_string("hello")
    assert list(history.load_history_strings()) == []


def test_a_history_that_is_a_link_to_a_file_is_kept_there(tmp_path):
    (tmp_path / "kept").write_text("")
    (tmp_path / "history").symlink_to("kept")
    History(tmp_path / "history").store_string("hello")
    assert list(History(tmp_path / "history").load_history_strings()) == ["hello"]
    assert "hello" in (tmp_path / "kept").read_text()
