"""Pickles are read only where they hold tensors and nothing else."""

from __future__ import annotations

import io
import os
import pickle
import struct
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lmoe_cli.checkpoint.pickled import convert, scan
from lmoe_cli.errors import InvalidFileError, NotFoundError

PROBE = Path("/tmp/lmoe-pickle-was-run")


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {PROBE}",)


class Hidden:
    """Found through a getattr on something harmless."""

    def __reduce__(self):
        return getattr, (OrderedDict, "fromkeys")


def saved(value: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def archive(program: bytes, **options) -> bytes:
    """A torch archive around a pickle that torch would not write."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as made:
        made.writestr("archive/data.pkl", program)
        made.writestr("archive/version", "3\n")
    return buffer.getvalue()


def reason(tmp_path: Path, data: bytes) -> str:
    """Why a pickle is refused; nothing of it may have been run, and nothing written."""
    path = tmp_path / "adapter_model.bin"
    path.write_bytes(data)
    with pytest.raises(InvalidFileError) as error:
        convert(path, tmp_path / "out", "adapter_model.safetensors")
    assert error.value.code in ("pickle-refused", "lfs-pointer")
    assert not (tmp_path / "out").exists()
    assert not PROBE.exists()
    return error.value.message


def test_tensors_of_every_dtype_come_out_as_they_are(tmp_path):
    names = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {name: torch.arange(6).reshape(2, 3).to(getattr(torch, name)) for name in names}
    shared = torch.randn(4, 6)
    tensors |= {"view": shared[1:3, ::2], "transposed": shared.T, "whole": shared, "scalar": torch.tensor(3.0)}
    tensors["parameter"] = torch.nn.Parameter(torch.randn(2))
    (tmp_path / "adapter_model.bin").write_bytes(saved(OrderedDict(tensors)))
    convert(tmp_path / "adapter_model.bin", tmp_path / "deep" / "out", "adapter_model.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "deep" / "out" / "adapter_model.safetensors")
    assert list(loaded) == list(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)


def test_the_state_dict_of_a_module_with_its_metadata_is_tensors_too(tmp_path):
    (tmp_path / "a.bin").write_bytes(saved(torch.nn.Linear(2, 3).state_dict()))
    convert(tmp_path / "a.bin", tmp_path / "out", "b.safetensors")
    assert set(safetensors.torch.load_file(tmp_path / "out" / "b.safetensors")) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (Evil(), "posix.system"),
        ({"a": torch.ones(2), "b": Evil()}, "posix.system"),
        ({"a": Hidden()}, "getattr"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ({"a": torch.ones(2).to_sparse()}, "sparse"),
        ({"a": torch.ones(2), "b": 3}, "'b' is no named tensor"),
        ({3: torch.ones(2)}, "'3' is no named tensor"),
        ([torch.ones(2)], "no mapping of tensors"),
        ({}, "no mapping of tensors"),
        ({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, "larger than what is stored"),
        ({"a": torch.ones(2, device="meta")}, "meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_anything_but_tensors_is_refused_by_name(tmp_path, value, word):
    assert word in reason(tmp_path, saved(value))


def test_tensors_that_would_multiply_are_refused(tmp_path):
    one = torch.ones(1000)
    assert "many times" in reason(tmp_path, saved({str(number): one for number in range(100)}))


@pytest.mark.parametrize(
    "program",
    [
        pickle.dumps(Evil(), 0),
        pickle.dumps(Evil(), 2),
        pickle.dumps(Evil(), 4),
        pickle.dumps(Evil(), 5),
        b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R.",
        b"\x80\x02(X\x01\x00\x00\x001ios\nsystem\n.",  # INST
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)\x81.",  # NEWOBJ
        b"\x80\x02ctorch\nFloatStorage.from_file\n)R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2 \n)R.",
    ],
)
def test_no_way_to_name_something_else_gets_past_the_scan(tmp_path, program):
    path = tmp_path / "a.bin"
    path.write_bytes(archive(program))
    with pytest.raises(InvalidFileError, match=r"it names|it holds the instruction"):
        scan(path)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "zip"),
        (b"\x80\x02}.", "before 1.6"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer"),
        (archive(b""), "cannot be read"),
        (archive(b"\x80\x02"), "cannot be read"),
        (archive(b"\x80\x02}q\x00." + b"N" * (9 << 20)), "instructions are"),
        (archive(b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED), "compressed"),
        (archive(b"\x80\x02X\xff\xff\xff\x7f."), "cannot be read"),
        (archive(b"\x80\x02}q\x00.").replace(b"data.pkl", b"data.txt"), "not one of tensors"),
        (archive(b"\x80\x02NR."), "torch cannot read it"),
    ],
    # An archive holds the time at which it was made, which must not be part of a test's name.
    ids=["empty", "bare", "pointer", "nothing", "cut", "long", "compressed", "promise", "elsewhere", "reduced"],
)
def test_what_torch_did_not_write_is_refused(tmp_path, data, word):
    assert word in reason(tmp_path, data)


def test_the_old_format_and_scripts_are_refused(tmp_path):
    assert "before 1.6" in reason(tmp_path, saved({"a": torch.ones(2)}, _use_new_zipfile_serialization=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    assert "not one of tensors" in reason(tmp_path, (tmp_path / "script.pt").read_bytes())


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    data = bytearray(saved({"a": torch.ones(100)}))
    start = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0"))
    for offset in (20, 24):  # sizes in the central directory
        data[start + offset : start + offset + 4] = struct.pack("<I", 1 << 31)
    assert "more than it is" in reason(tmp_path, bytes(data))


def test_every_cut_and_a_flip_of_every_byte_of_the_program_is_survived(tmp_path):
    data = saved({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16)})
    path = tmp_path / "a.bin"
    for end in range(0, len(data), 29):
        path.write_bytes(data[:end])
        with pytest.raises(InvalidFileError):
            scan(path)
    for place in range(0, len(data), 13):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            convert(path, tmp_path / f"out{place}", "x.safetensors")
        except InvalidFileError:
            assert not (tmp_path / f"out{place}").exists()


def test_what_is_no_file_is_an_error(tmp_path):
    with pytest.raises(NotFoundError):
        scan(tmp_path / "none")
    with pytest.raises(InvalidFileError):
        scan(tmp_path)
