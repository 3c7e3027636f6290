"""JSON from strangers parses to one thing or is an error."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pace import within

from lmoe_cli.errors import InvalidFileError
from lmoe_cli.strict_json import MAX_DEPTH, parse_object


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "line 1 column 1"),
        (b"{", "line 1 column 2"),
        (b'{"a": 1,}', "line 1 column"),
        (b'{"a": 1} x', "Extra data"),
        (b"[]", "a list where an object"),
        (b'"a"', "text where an object"),
        (b"null", "null where an object"),
        (b"true", "true or false where"),
        (b"3", "a number where"),
        (b"\xff{}", "byte 0 is not UTF-8"),
        (b"{\0}", "line 1 column 2"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands twice"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": -Infinity}', "-Infinity is not a number"),
        (b'{"a": 1e999}', "too large a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "digits"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\uDC00": 1}', "half a character"),
        (b'{"a": [1, "x\\ud83d"]}', "half a character"),
        (b'{"a": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "deeper than"),
        (b'{"a": ' + b"[" * 100_000, "deeper than"),
        (b'{"a": ' * 50_000, "deeper than"),
        (b'{"a\tb": 1}', "line 1"),
    ],
)
def test_what_is_not_plain_json_is_refused_with_the_reason(data, word):
    with pytest.raises(InvalidFileError) as error:
        parse_object(data, "a.json")
    assert error.value.code == "json-invalid"
    assert error.value.message.startswith("a.json: ")
    assert word in error.value.message
    assert len(error.value.message) < 400


def test_what_model_configs_may_hold_is_read_where_it_is_asked_for():
    found = parse_object(b'\xef\xbb\xbf{"a": Infinity, "b": [1e999], "c": "\\ud83d\\ude00"}', "a.json", nonfinite=True)
    assert found == {"a": float("inf"), "b": [float("inf")], "c": "\N{GRINNING FACE}"}
    assert parse_object(b'{"a": ' + b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1) + b"}", "a.json")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(), values, max_size=4))
def test_sound_json_is_read_as_it_is(value):
    assert parse_object(json.dumps(value).encode(), "a.json") == value


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=100) | st.text(alphabet='{}[]":,0123eE-.+\\u dD8"nulltrefasNI', max_size=60).map(str.encode))
def test_any_bytes_are_an_object_or_an_error(data):
    try:
        assert isinstance(parse_object(data, "a.json"), dict)
    except InvalidFileError as error:
        assert error.code == "json-invalid"


def test_a_large_index_takes_little_time():
    data = json.dumps({"weight_map": {f"model.layers.{number}.weight": "a.safetensors" for number in range(200_000)}})
    with within(300):
        assert len(parse_object(data.encode(), "index")["weight_map"]) == 200_000
