"""Packed matrices are read as what bitsandbytes makes of them, whichever rows are asked for, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lmoe_cli.checkpoint.header import read_header
from lmoe_cli.checkpoint.index import gather
from lmoe_cli.checkpoint.packed import Packed, unpacked
from lmoe_cli.checkpoint.reader import TensorReader
from lmoe_cli.errors import InvalidFileError

WEIGHT = "model.q_proj.weight"


def save_four_bit(folder, dense, kind="nf4", block=64, nested=False):
    """A file with one packed matrix, and what bitsandbytes gives back for it."""
    packed, state = bnb.quantize_4bit(dense, blocksize=block, compress_statistics=nested, quant_type=kind)
    side = {f"{WEIGHT}.{name}": tensor.clone() for name, tensor in state.as_dict(packed=True).items()}
    save_file({WEIGHT: packed, **side}, folder / "model.safetensors")
    return theirs(packed, state)


def theirs(packed, state):
    """What bitsandbytes gives, one block a row: on CPUs with AVX-512 it is wrong where blocks do not divide rows."""
    shape, count = state.shape, state.shape.numel()
    state.shape = torch.Size((-(-count // state.blocksize), state.blocksize))
    whole = F.pad(packed.flatten(), (0, state.shape.numel() // 2 - packed.numel()))
    return bnb.dequantize_4bit(whole[:, None], state).flatten()[:count].view(shape)


def save_eight_bit(folder, dense):
    packed, scale, _ = bnb.int8_vectorwise_quant(dense.half())
    side = {"model.q_proj.SCB": scale, "model.q_proj.weight_format": torch.tensor(0, dtype=torch.uint8)}
    save_file({WEIGHT: packed, **side}, folder / "model.safetensors")
    return bnb.int8_vectorwise_dequant(packed, scale)


def stored_in(folder):
    path = folder / "model.safetensors"
    stored = gather({path.name: read_header(path)}, None, "a test")

    def read(tensor, limit):
        return path.read_bytes()[tensor.info.start :][: min(limit, tensor.info.size)]

    return unpacked(stored, read, lambda module: False, "a test")


def reader_of(folder):
    return TensorReader(stored_in(folder), lambda name: folder / name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("kind", "block"), [("nf4", 64), ("fp4", 64), ("nf4", 32), ("nf4", 256)])
def test_4_bit_matrices_are_what_bitsandbytes_gives_to_the_last_bit(tmp_path, kind, block, nested, dtype):
    dense = torch.randn(96, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = save_four_bit(tmp_path, dense, kind, block, nested)
    with reader_of(tmp_path) as reader:
        ours = reader.tensor(WEIGHT)
    assert ours.dtype == expected.dtype == dtype
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, dense), "nothing was packed"


def test_8_bit_matrices_are_what_bitsandbytes_gives_to_the_last_bit(tmp_path):
    expected = save_eight_bit(tmp_path, torch.randn(96, 128, generator=torch.Generator().manual_seed(1)))
    with reader_of(tmp_path) as reader:
        assert torch.equal(reader.tensor(WEIGHT), expected)


@pytest.fixture(scope="module", params=[(24, 72, 64), (7, 40, 128), (5, 6, 64), (3, 5, 64), (3, 4096, 64)], ids=str)
def odd(request, tmp_path_factory):
    """A matrix whose rows begin and end inside blocks, the last of which may be shorter."""
    rows, columns, block = request.param
    folder = tmp_path_factory.mktemp("odd")
    dense = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    whole = save_four_bit(folder, dense, block=block, nested=True)
    with reader_of(folder) as reader:
        yield reader.rows(WEIGHT), whole


@given(data=st.data())
def test_rows_are_the_same_whichever_are_asked_for_together(odd, data):
    matrix, whole = odd
    start = data.draw(st.integers(0, whole.shape[0]))
    stop = data.draw(st.integers(0, whole.shape[0]))
    assert torch.equal(matrix[start:stop], whole[start:stop])


def test_parts_of_packed_matrices_are_no_tensors_of_their_own(tmp_path):
    save_four_bit(tmp_path, torch.randn(64, 64, dtype=torch.bfloat16), nested=True)
    (name,) = stored = stored_in(tmp_path)
    assert name == WEIGHT
    assert isinstance(stored[name], Packed)
    assert (stored[name].info.dtype, stored[name].info.shape, stored[name].info.size) == ("BF16", (64, 64), 8192)


def test_only_weights_of_other_models_lie_next_to_other_codes(tmp_path):
    dense = torch.randn(128, 128, generator=torch.Generator().manual_seed(3))
    for save in (save_four_bit, save_eight_bit):
        save(tmp_path, dense)
        with reader_of(tmp_path) as reader:
            matrix = reader.rows(WEIGHT)
            assert matrix.misplaced(slice(0, 128), dense) < 0.01 * dense.numel()
            assert matrix.misplaced(slice(32, 64), dense[32:64]) < 0.01 * 32 * 128
            near = dense + 0.02 * torch.randn(128, 128, generator=torch.Generator().manual_seed(4))
            assert matrix.misplaced(slice(0, 128), near) > 0.04 * dense.numel()


def edited(folder: Path, **state):
    """The file again, with other numbers in its state."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "quant_state" in name)
    told = json.loads(bytes(tensors[name].tolist()))
    tensors[name] = torch.tensor(list(json.dumps({**told, **state}).encode()), dtype=torch.uint8)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "state",
    [
        {"shape": [64, 65]},
        {"shape": [-64, -128]},
        {"shape": [8192]},
        {"shape": "64"},
        {"blocksize": 63},
        {"blocksize": 128},
        {"dtype": "complex64"},
        {"quant_type": "fp4"},
        {"nested_blocksize": 0},
        {"nested_blocksize": 1},
        {"nested_offset": "much"},
        {"nested_dtype": "int8"},
    ],
    ids=str,
)
def test_4_bit_parts_that_contradict_each_other_are_refused(tmp_path, state):
    save_four_bit(tmp_path, torch.randn(64, 128), nested=True)
    edited(tmp_path, **state)
    with pytest.raises(InvalidFileError) as told:
        stored_in(tmp_path)
    assert told.value.code == "packing-invalid"
    assert "a test" in told.value.message


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__nf4"])
@pytest.mark.parametrize("fault", ["missing", "short"])
def test_4_bit_parts_that_are_missing_or_short_are_refused(tmp_path, part, fault):
    save_four_bit(tmp_path, torch.randn(64, 128), nested=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"{WEIGHT}.{part}"
    cut = tensors.pop(name)[:-1].clone()
    if fault == "short":
        tensors[name] = cut
    save_file(tensors, tmp_path / "model.safetensors")
    if (part, fault) == ("absmax", "missing"):  # then it is a tensor of bytes, which no expert can change
        assert not any(isinstance(tensor, Packed) for tensor in stored_in(tmp_path).values())
        return
    with pytest.raises(InvalidFileError):
        stored_in(tmp_path)


@pytest.mark.parametrize("fault", ["missing", "short", "laid out for a GPU"])
def test_8_bit_parts_that_do_not_belong_together_are_refused(tmp_path, fault):
    save_eight_bit(tmp_path, torch.randn(64, 128))
    tensors = load_file(tmp_path / "model.safetensors")
    scale = tensors.pop("model.q_proj.SCB")
    if fault == "short":
        tensors["model.q_proj.SCB"] = scale[:-1].clone()
    elif fault != "missing":
        tensors |= {"model.q_proj.SCB": scale, "model.q_proj.weight_format": torch.tensor(2, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InvalidFileError) as told:
        stored_in(tmp_path)
    assert told.value.code == "packing-invalid"
