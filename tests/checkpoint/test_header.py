"""A safetensors header is believed only where it describes the file it stands in."""

from __future__ import annotations

import json
import os

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pace import within

from lmoe_cli.checkpoint.header import ITEM_BITS, Header, parse_header, read_header
from lmoe_cli.checkpoint.writer import Shape, header_bytes
from lmoe_cli.errors import InvalidFileError, LmoeError, NotFoundError
from tests.adapter import made

TENSORS = {"a": (2, 3), "b.weight": (4,), "empty": (0, 5), "scalar": ()}
WHOLE = made.safetensors(TENSORS)


def parsed(data: bytes) -> Header:
    return parse_header(lambda start, length: data[start : start + length], len(data), "a.safetensors")


def framed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def code_of(data: bytes) -> str:
    with pytest.raises(InvalidFileError) as error:
        parsed(data)
    assert "a.safetensors" in error.value.message
    assert len(error.value.message) < 400
    return error.value.code


def test_every_dtype_that_torch_saves_is_read_as_torch_saved_it(tmp_path):
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    eights = ("float8_e4m3fn", "float8_e5m2")
    tensors = {name: torch.zeros(3, 2, dtype=getattr(torch, name)) for name in names + eights}
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    assert header.metadata == {"format": "pt"}
    assert {name: info.shape for name, info in header.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }
    with (tmp_path / "a.safetensors").open("rb") as file:
        for name, tensor in tensors.items():
            info = header.tensors[name]
            file.seek(info.start)
            assert file.read(info.size) == bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def test_two_reads_are_enough():
    reads = []

    def read(start: int, length: int) -> bytes:
        reads.append((start, length))
        return WHOLE[start : start + length]

    parse_header(read, len(WHOLE), "a.safetensors")
    assert reads == [(0, 8), (8, len(WHOLE) - 8 - 44)]


def test_a_file_cut_at_any_byte_is_refused():
    for end in range(len(WHOLE)):
        assert code_of(WHOLE[:end]) in ("header-truncated", "json-invalid")


@pytest.mark.parametrize("mask", [0x01, 0x80, 0xFF])
def test_a_file_with_any_byte_flipped_is_refused_or_read_as_safetensors_reads_it(tmp_path, mask):
    for place in range(len(WHOLE) - 44):
        data = WHOLE[:place] + bytes([WHOLE[place] ^ mask]) + WHOLE[place + 1 :]
        try:
            header = parsed(data)
        except LmoeError:
            continue
        theirs = safetensors.deserialize(data)
        assert {name: list(info.shape) for name, info in header.tensors.items()} == {
            name: told["shape"] for name, told in theirs
        }


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "header-truncated"),
        (b"\0" * 8, "json-invalid"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "header-too-large"),
        ((1 << 64 - 1).to_bytes(8, "little") + b"{}", "header-too-large"),
        (b"PK\3\4" + bytes(100), "header-too-large"),
        (b"\x80\x02}q\x00." + bytes(100), "header-too-large"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:x\nsize 5\n", "lfs-pointer"),
        (b"GGUF" + bytes(100), "header-too-large"),
        ((100).to_bytes(8, "little") + b"{}", "header-truncated"),
        (framed(b"[]"), "json-invalid"),
        (framed(b"{"), "json-invalid"),
        (framed(b"\xff\xfe"), "json-invalid"),
        (framed(b'{"a":' * 100 + b"1" + b"}" * 100), "json-invalid"),
        (framed(b'{"a":' * 200_000), "json-invalid"),
        (framed(b'{"a":1,"a":2}'), "json-invalid"),
        (framed(b'{"__metadata__": NaN}'), "json-invalid"),
        (framed({"__metadata__": 5}), "header-invalid"),
        (framed({"__metadata__": {"a": 5}}), "header-invalid"),
        (framed({"a": 5}), "header-invalid"),
        (framed({"a": {}}), "header-invalid"),
        (framed({"a": entry(dtype="F99")}, bytes(8)), "header-invalid"),
        (framed({"a": entry(dtype=5)}, bytes(8)), "header-invalid"),
        (framed({"a": entry(shape=[3])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(shape=[-2])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(shape=[-1, -2])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(shape=[2.0])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(shape=[True, 2])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(shape=[1] * 9 + [2])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(shape=[1 << 62, 1 << 62, 0], offsets=[0, 0])}), "header-invalid"),
        (framed({"a": entry(shape=[1 << 40, 1 << 40])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(shape="2")}, bytes(8)), "header-invalid"),
        (framed({"a": entry(offsets=[0, 8, 9])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(offsets=[8, 0])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(offsets=[-8, 0])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(offsets=[False, 8])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(offsets=[0.0, 8.0])}, bytes(8)), "header-invalid"),
        (framed({"a": entry(offsets=[4, 12])}, bytes(12)), "header-invalid"),
        (framed({"a": entry(offsets=[1 << 70, (1 << 70) + 8])}, bytes(8)), "header-invalid"),
        (framed({"a": entry()}, bytes(7)), "header-truncated"),
        (framed({"a": entry()}, bytes(9)), "header-invalid"),
        (framed({"a": entry(), "b": entry()}, bytes(16)), "header-invalid"),
        (framed({"a": entry(), "b": entry(offsets=[4, 12])}, bytes(12)), "header-invalid"),
        (framed({"a": entry(), "b": entry(offsets=[16, 24])}, bytes(24)), "header-invalid"),
        (framed({"a": entry(dtype="F4", shape=[3], offsets=[0, 1])}, bytes(1)), "header-invalid"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value[8:60]),
)
def test_a_header_that_lies_is_refused(data, code):
    assert code_of(data) == code


def test_a_header_of_the_largest_size_is_read_in_little_time():
    names = {f"model.layers.{number}.self_attn.q_proj.lora_A.weight": (1, 1) for number in range(30_000)}
    with within(300):
        assert len(parsed(made.safetensors(names)).tensors) == 30_000


def test_what_is_no_file_is_said_to_be_none(tmp_path):
    with pytest.raises(NotFoundError):
        read_header(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors"):
        with pytest.raises(InvalidFileError) as error:
            read_header(path)
        assert error.value.code == "not-a-file"


sides = st.one_of(st.integers(0, 4), st.sampled_from([-1, 1 << 48, 1 << 63, True, None, 1.0, "1"]))
offsets = st.one_of(st.integers(-2, 64), st.sampled_from([1 << 60, True, None, "0"]))
entries = st.one_of(
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from([*ITEM_BITS, "F31", 3, None]),
            "shape": st.lists(sides, max_size=3),
            "data_offsets": st.lists(offsets, max_size=3),
        }
    ),
    st.none(),
    st.lists(st.integers()),
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.text(max_size=4), entries, max_size=4), st.integers(0, 64))
def test_any_header_is_refused_in_order_or_agrees_with_safetensors(header, size):
    data = framed(header, bytes(size))
    try:
        ours = parsed(data)
    except LmoeError:
        return
    theirs = dict(safetensors.deserialize(data))
    assert {name: list(info.shape) for name, info in ours.tensors.items()} == {
        name: told["shape"] for name, told in theirs.items()
    }


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_refused_in_order(data):
    for whole in (data, framed(data)):
        try:
            parsed(whole)
        except LmoeError as error:
            assert error.exit_code == 2


shapes = st.dictionaries(
    st.text(min_size=1, max_size=8).filter(lambda name: name != "__metadata__"),
    st.builds(Shape, st.sampled_from(["F32", "BF16", "I64", "U8"]), st.lists(st.integers(0, 3), max_size=3).map(tuple)),
    max_size=5,
)


@settings(max_examples=200, deadline=None)
@given(shapes)
def test_what_is_written_is_read_again(shapes):
    data = header_bytes(shapes, {"format": "pt"}) + bytes(sum(shape.size for shape in shapes.values()))
    assert {name: (info.dtype, info.shape) for name, info in parsed(data).tensors.items()} == {
        name: (shape.dtype, shape.sides) for name, shape in shapes.items()
    }


def test_a_damaged_header_is_not_called_a_text_to_mend():
    with pytest.raises(InvalidFileError) as told:
        parsed(framed(b"\xff\xfe"))
    assert str(told.value) == "a.safetensors: the header is not valid JSON: byte 0 is not UTF-8"
    assert "download it again" in told.value.hint
    assert "by hand" not in told.value.hint
