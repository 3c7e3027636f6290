"""A data file is read line by line, and what is wrong in it is told by line."""

from __future__ import annotations

import hashlib
import itertools
import json
import tracemalloc

import pytest

from data.made import said, written
from lmoe_cli.data import records as module
from lmoe_cli.data.records import data_hash, read_records
from lmoe_cli.errors import InvalidFileError, LmoeError, NotFoundError


def test_conversations_and_texts_are_read_in_order_with_their_lines(tmp_path):
    path = written(
        tmp_path / "a.jsonl", said("hi", "hello", split="dev", id=3), {"text": "once", "deep": [float("nan")]}
    )
    path.write_text(path.read_text().replace("\n", "\n\n  \n", 1))
    one, two = read_records(path)
    assert one.messages == ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    assert (one.text, one.split, one.where) == (None, "valid", f"{path}:1")
    assert (two.messages, two.text, two.split, two.where) == ((), "once", None, f"{path}:4")


def test_weights_of_others_than_the_assistant_mean_nothing(tmp_path):
    talk = said("hi", "yes", "who", "me")
    for message, weight in zip(talk["messages"], (0, 1.0, 0.3, 0), strict=True):
        message["weight"] = weight
    (record,) = read_records(written(tmp_path / "a.jsonl", talk))
    assert (record.unlearned, record.learned) == ({3}, [1])


WRONG = [
    ("hello\n", "data-invalid", ":1: not valid JSON"),
    ("[1]\n", "data-invalid", "a list where an object is due"),
    ("{}\n", "data-invalid", "neither of 'messages' and 'text'"),
    ('{"text": "a", "messages": []}\n', "data-invalid", "both of"),
    ('{"text": "a", "text": "b"}\n', "data-invalid", "stands twice"),
    ('{"messages": []}\n', "data-invalid", "not a list of messages"),
    ('{"messages": ["hi"]}\n', "data-invalid", "message 1 is not an object"),
    ('{"text": "a", "split": 3}\n', "data-invalid", "'split' is not a word"),
    ('{"text": 3}\n', "data-content", "'text' is not text"),
    ('{"text": ""}\n', "data-content", "'text' is empty"),
    ('{"messages": [{"role": "human", "content": "a"}]}\n', "data-role", 'message 1 has the role "human"'),
    ('{"messages": [{"content": "a"}]}\n', "data-role", "message 1 has no role"),
    ('{"messages": [{"role": ["user"], "content": "a"}]}\n', "data-role", "message 1 has the role"),
    ('{"messages": [{"role": "user", "content": null}]}\n', "data-content", "content of message 1 is not text"),
    ('{"messages": [{"role": "user", "content": "a"}]}\n', "data-unanswered", "the assistant says nothing"),
    (
        '{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}\n',
        "data-unanswered",
        "the assistant says nothing of weight 1",
    ),
    (
        '{"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}\n',
        "data-invalid",
        "the weight of message 1 is neither 0 nor 1",
    ),
    (
        '{"messages": [{"role": "assistant", "content": "a", "weight": true}]}\n',
        "data-invalid",
        "the weight of message 1 is neither 0 nor 1",
    ),
    ("", "data-empty", "holds no record"),
    ("\n \n\n", "data-empty", "holds no record"),
]


@pytest.mark.parametrize(("text", "code", "reason"), WRONG)
def test_what_is_wrong_is_told_by_line(tmp_path, text, code, reason):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InvalidFileError) as caught:
        list(read_records(path))
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert reason in caught.value.message
    assert caught.value.message.startswith(str(path))
    assert caught.value.hint


def test_a_wrong_line_stops_only_where_it_stands(tmp_path):
    path = written(tmp_path / "a.jsonl", {"text": "a"}, {"text": 1})
    found = read_records(path)
    assert next(found).text == "a"
    with pytest.raises(InvalidFileError, match=":2:"):
        next(found)


def test_a_file_that_is_not_there_and_a_folder_are_refused(tmp_path):
    with pytest.raises(NotFoundError):
        next(read_records(tmp_path / "none.jsonl"))
    with pytest.raises(LmoeError) as caught:
        next(read_records(tmp_path))
    assert caught.value.code == "not-a-file"


def test_a_line_over_the_cap_is_refused_without_being_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 1000)
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # one line of zeros, which takes no room on the disk
    tracemalloc.start()
    with pytest.raises(InvalidFileError, match="longer than"):
        next(read_records(path))
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_the_first_records_of_a_file_are_there_before_the_rest_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps({"text": "x" * 10_000}) + "\n"
    path.write_text(line * 5_000)  # 50 MB
    tracemalloc.start()
    assert len(list(itertools.islice(read_records(path), 100))) == 100
    assert sum(1 for _ in read_records(path)) == 5_000
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def test_the_hash_of_data_is_that_of_its_bytes(tmp_path):
    path = written(tmp_path / "a.jsonl", {"text": "a"})
    assert data_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_real_data_is_read_whole(corpus):
    for path in sorted((corpus / "data").glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")[:-1]
        found = list(read_records(path))
        assert len(found) == len(lines)
        assert [record.split for record in found] == [json.loads(line)["split"] for line in lines]
