"""Arguments that no command can use: one clear error each, and never a bug."""

from __future__ import annotations

import pytest
from commands import process

from tests.adapter import made

BROKEN = b"a\xff"
NAME = b"a" * 150 + b".yaml"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chat", "--prompt", BROKEN], "'a\\udcff' is not UTF-8"),
        (["chat", "--prompt", "hi", "--system", BROKEN], "'--system'"),
        (["chat", "--prompt", "hi", "--stop", BROKEN], "'--stop'"),
        (["check", "--base", BROKEN], "'--base'"),
        (["init", "new.yaml", "--from", BROKEN], "'--from'"),
        (["init", b"a\xff.yaml", "--from", "./one", "--base", "demo:adventurer"], "a\\udcff.yaml: name:"),
        (["init", NAME, "--from", "./one", "--base", "demo:adventurer"], "at most 100 characters"),
        (["inspect", "adapter", b"a/\xff"], "bad-reference"),
        (["bake", "--base", "demo:adventurer", "--out", "new/.."], "no name for a new folder"),
        (["bake", "--base", "demo:adventurer", "--out", "."], "no name for a new folder"),
    ],
)
def test_what_cannot_be_used_is_refused_and_nothing_is_left(tmp_path, words, told):
    made.write(tmp_path / "one", made.adapter())
    done = process(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert told in done.stderr
    assert "  hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_a_size_beyond_all_numbers_is_no_size():
    from lmoe_cli.bake.plan import parse_size
    from lmoe_cli.errors import UsageError

    for text in ("9" * 400 + "GB", "1e9", "0.5MB", "1.5.5GB", ""):
        with pytest.raises(UsageError):
            parse_size(text)
    assert (parse_size("1.5 GB"), parse_size("5g"), parse_size("1000000")) == (1_500_000_000, 5 * 10**9, 10**6)
