"""What is learned from and what is judged by never meet."""

from __future__ import annotations

import random

import pytest

from data.made import said, written
from lmoe_cli.data.records import read_records
from lmoe_cli.data.splits import Split, of_split, require_some, split_of
from lmoe_cli.errors import InvalidFileError


def texts(records):
    return [record.text for record in records]


def numbered(path, count, **more):
    return written(path, *({"text": f"text {number}", **more} for number in range(count)))


def test_lines_that_say_a_split_are_taken_at_their_word(tmp_path):
    path = written(
        tmp_path / "a.jsonl",
        {"text": "a", "split": "train"}, {"text": "b", "split": "validation"}, {"text": "c"},
        {"text": "d", "split": "test"}, {"text": "e", "split": "Valid"},
    )  # fmt: skip
    split = Split(path)
    assert texts(split.train()) == ["a", "c"]
    assert texts(split.held_out()) == ["b", "e"]
    assert texts(of_split(read_records(path), "test")) == ["d"]
    # A fraction draws only from lines that say nothing.
    assert texts(Split(path, fraction=1.0).train()) == ["a"]
    assert texts(Split(path, fraction=1.0).held_out()) == ["b", "c", "e"]


def test_another_file_is_judged_by_as_a_whole_and_nothing_is_drawn_from_the_first(tmp_path):
    split = Split(numbered(tmp_path / "a.jsonl", 50), written(tmp_path / "b.jsonl", {"text": "z"}), fraction=0.5)
    assert texts(split.train()) == [f"text {number}" for number in range(50)]
    assert texts(split.held_out()) == ["z"]


def test_a_fraction_parts_a_file_without_rest_or_overlap_and_is_about_that_fraction(tmp_path):
    split = Split(numbered(tmp_path / "a.jsonl", 2000), fraction=0.1, seed=3)
    train, valid = texts(split.train()), texts(split.held_out())
    assert sorted(train + valid) == sorted(f"text {number}" for number in range(2000))
    assert 150 < len(valid) < 250  # 200 ± 3.7 standard deviations of a binomial


def test_what_is_drawn_depends_on_what_a_line_says_and_the_seed_alone(tmp_path):
    lines = [said(f"question {number}", "answer") for number in range(200)]
    here = written(tmp_path / "a.jsonl", *lines)
    random.Random(0).shuffle(lines)
    there = written(tmp_path / "b.jsonl", *({**line, "source": "x"} for line in lines))

    def drawn(path, seed):
        return {record.messages[0]["content"] for record in Split(path, fraction=0.3, seed=seed).held_out()}

    assert drawn(here, 1) == drawn(there, 1)
    assert drawn(here, 1) != drawn(here, 2)


def test_a_larger_fraction_keeps_what_a_smaller_one_drew(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 300)
    small = set(texts(Split(path, fraction=0.1).held_out()))
    assert small < set(texts(Split(path, fraction=0.4).held_out()))


def test_a_text_and_a_conversation_that_say_the_same_are_told_apart(tmp_path):
    text, talk = read_records(written(tmp_path / "a.jsonl", {"text": "a"}, said("a", "b")))
    assert text.digest != talk.digest
    assert split_of(text) == split_of(talk) == "train"


def test_a_split_without_records_is_refused(tmp_path):
    path = numbered(tmp_path / "a.jsonl", 3)
    with pytest.raises(InvalidFileError) as caught:
        list(require_some(Split(path).held_out(), path, "valid"))
    assert caught.value.code == "data-empty"
    assert len(list(require_some(Split(path).train(), path, "train"))) == 3
