"""What is wrong with an adapter's files is said in one error, or in a finding where it is only not for lmoe."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmoe_cli.adapter.soundness import inspect_adapter
from lmoe_cli.adapter.summary import summary
from lmoe_cli.errors import InvalidFileError, LmoeError, NotFoundError
from lmoe_cli.source import open_source
from tests.adapter import made

CONFIG, WEIGHTS, INDEX = "adapter_config.json", "adapter_model.safetensors", "adapter_model.safetensors.index.json"
Q0 = f"{made.ROOT}.0.self_attn.q_proj"
LOHA = {f"{Q0}.hada_w{number}_{side}": (8, 4) if side == "a" else (4, 8) for number in (1, 2) for side in "ab"}
W1 = {f"{Q0}.lokr_w1": (2, 2)}
VERA = {f"{Q0}.vera_lambda_b": (8,), f"{Q0}.vera_lambda_d": (4,)}


def inspect(folder: Path):
    return inspect_adapter(open_source(str(folder)))


def refused(folder: Path) -> LmoeError:
    with pytest.raises(LmoeError) as error:
        inspect(folder)
    assert error.value.message.isprintable()
    assert error.value.exit_code in (2, 3)
    return error.value


def with_tensors(folder: Path, tensors: dict, dtype: str = "F32", **changes: object) -> Path:
    files = {CONFIG: json.dumps(made.config(**changes)).encode(), WEIGHTS: made.safetensors(tensors, dtype=dtype)}
    return made.write(folder, files)


@pytest.mark.parametrize(
    ("files", "kind", "code"),
    [
        ({}, NotFoundError, "no-adapter"),
        ({"README.md": b""}, NotFoundError, "no-adapter"),
        ({CONFIG: b""}, InvalidFileError, "json-invalid"),
        ({CONFIG: b"x" * (2 << 20)}, InvalidFileError, "file-too-large"),
        ({CONFIG: b"version https://git-lfs.github.com/spec/v1\n"}, InvalidFileError, "lfs-pointer"),
        (made.adapter() | {WEIGHTS: b""}, InvalidFileError, "header-truncated"),
        (made.adapter() | {WEIGHTS: made.safetensors({})}, InvalidFileError, "no-tensors"),
        (made.sharded() | {INDEX: b"{}"}, InvalidFileError, "index-invalid"),
        (made.sharded() | {INDEX: b'{"weight_map": []}'}, InvalidFileError, "index-invalid"),
        (made.sharded() | {INDEX: b'{"weight_map": {"a": 5}}'}, InvalidFileError, "index-invalid"),
        (made.sharded() | {INDEX: b'{"weight_map": {"a": "a.bin"}}'}, InvalidFileError, "index-invalid"),
        (made.sharded() | {INDEX: b'{"weight_map": {"a": "b.safetensors"}}'}, NotFoundError, "shard-missing"),
        (made.sharded() | {INDEX: b'{"weight_map": {"a": "../b.safetensors"}}'}, InvalidFileError, "path-outside"),
        (made.sharded() | {INDEX: b'{"weight_map": {"a": "/b.safetensors"}}'}, InvalidFileError, "path-outside"),
        (made.sharded() | {INDEX: b'{"weight_map": {"a": "c/../../b.safetensors"}}'}, InvalidFileError, "path-outside"),
        (made.sharded() | {INDEX: b'{"weight_map": {"a": "b\\u0000.safetensors"}}'}, InvalidFileError, "path-outside"),
    ],
)
def test_missing_and_damaged_files(tmp_path, files, kind, code):
    error = refused(made.write(tmp_path, files))
    assert (type(error), error.code) == (kind, code)


def test_an_index_that_contradicts_its_shards(tmp_path):
    files = made.sharded()
    index = json.loads(files[INDEX])
    first, second = sorted(set(index["weight_map"].values()))
    swapped = {name: second if file == first else first for name, file in index["weight_map"].items()}
    for lie in (swapped, index["weight_map"] | {"more": first}):
        made.write(tmp_path, files | {INDEX: json.dumps({"weight_map": lie}).encode()})
        assert refused(tmp_path).code == "index-invalid"
    made.write(tmp_path, files | {second: files[first]})
    assert refused(tmp_path).code == "index-invalid"
    made.write(tmp_path, files)
    assert inspect(tmp_path).is_supported


def test_an_adapter_cut_at_any_byte(tmp_path):
    files = made.adapter()
    made.write(tmp_path, files)
    for name, data in files.items():
        for end in range(0, len(data), 11):
            (tmp_path / name).write_bytes(data[:end])
            assert refused(tmp_path).exit_code == 2
        (tmp_path / name).write_bytes(data)


def test_what_is_no_ordinary_file_counts_as_missing(tmp_path):
    made.write(tmp_path / "folder", {CONFIG: made.adapter()[CONFIG], f"{WEIGHTS}/inner": b""})
    made.write(tmp_path / "pipe", {CONFIG: made.adapter()[CONFIG]})
    os.mkfifo(tmp_path / "pipe" / WEIGHTS)
    made.write(tmp_path / "loop", {CONFIG: made.adapter()[CONFIG]})
    (tmp_path / "loop" / WEIGHTS).symlink_to(WEIGHTS)
    made.write(tmp_path / "dangling", {CONFIG: made.adapter()[CONFIG]})
    (tmp_path / "dangling" / WEIGHTS).symlink_to("nowhere")
    for name in ("folder", "pipe", "loop", "dangling"):
        assert [item.code for item in inspect(tmp_path / name).findings] == ["weights-missing"]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    made.write(tmp_path / "secret", made.adapter())
    made.write(tmp_path / "adapter", {CONFIG: made.adapter()[CONFIG]})
    (tmp_path / "adapter" / WEIGHTS).symlink_to(tmp_path / "secret" / WEIGHTS)
    assert refused(tmp_path / "adapter").code == "path-outside"
    made.write(tmp_path / "linked", {f"real/{WEIGHTS}": made.adapter()[WEIGHTS], CONFIG: made.adapter()[CONFIG]})
    (tmp_path / "linked" / WEIGHTS).symlink_to(f"real/{WEIGHTS}")
    assert inspect(tmp_path / "linked").is_supported
    (tmp_path / "shortcut").symlink_to(tmp_path / "secret")
    assert inspect(tmp_path / "shortcut").is_supported


def test_references_that_can_be_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    expected = {
        "file": "not-a-folder", "none": "not-found", "./none": "not-found", "/no/such/folder": "not-found",
        "~nobody-of-that-name/x": "bad-reference", "x" * 5000: "bad-reference", "demo:none": "not-found",
        "hf://a/b/c": "bad-reference", "hf://": "bad-reference", "a/b@../../x": "bad-reference", "a\0b": "not-found",
        "": "bad-reference", " ": "bad-reference", "a/b c": "bad-reference",
    }  # fmt: skip
    found = {}
    for ref in expected:
        with pytest.raises(LmoeError) as error:
            open_source(ref)
        found[ref] = error.value.code
    assert found == expected


@pytest.mark.parametrize(
    ("tensors", "code"),
    [
        ({"foo.bar": (2, 2)}, "tensor-unplaced"),
        ({f"{Q0}.lora_C.weight": (2, 2)}, "tensor-unplaced"),
        ({f"{Q0}\x1b[31m.lora_A.weight": (2, 2)}, "tensor-unplaced"),
        ({f"{Q0}.lora_A.weight": (4, 8)}, "tensor-missing"),
        ({f"{Q0}.lora_A.weight": (4, 8), f"{Q0}.lora_A.default.weight": (4, 8)}, "tensor-unplaced"),
        ({f"{Q0}.lora_A.weight": (4, 8), f"{Q0}.lora_B.weight": (8, 5)}, "shape-contradiction"),
        ({f"{Q0}.lora_A.weight": (0, 8), f"{Q0}.lora_B.weight": (8, 0)}, "shape-contradiction"),
        ({f"{Q0}.lora_A.weight": (8,), f"{Q0}.lora_B.weight": (8,)}, "shape-contradiction"),
        ({f"{Q0}.lora_A.weight": (), f"{Q0}.lora_B.weight": ()}, "shape-contradiction"),
        ({f"{Q0}.lora_A.weight": (4, 8, 3, 3), f"{Q0}.lora_B.weight": (8, 4, 1, 1)}, "shape-contradiction"),
        ({f"{Q0}.lora_A.weight": (8, 8), f"{Q0}.lora_B.weight": (8, 8)}, "shape-contradiction"),
        ({**made.factors(), f"{Q0}.lora_magnitude_vector": (7,)}, "shape-contradiction"),
        ({**made.factors(), f"{Q0}.lora_B.bias": (7,)}, "shape-contradiction"),
        ({**made.factors(), f"{Q0}.ia3_l": (8, 1)}, "tensor-unplaced"),
        ({f"{Q0}.ia3_l": (8, 1)}, "shape-contradiction"),
        ({**made.factors(), f"{Q0}.base_layer.lora_A.weight": (4, 8)}, "tensor-unplaced"),
        ({**made.factors(), "base_model.model.lm_head.bias": (2, 2)}, "shape-contradiction"),
    ],
)
def test_tensors_that_do_not_add_up(tmp_path, tensors, code):
    assert refused(with_tensors(tmp_path, tensors)).code == code


@pytest.mark.parametrize(
    ("kind", "tensors", "code"),
    [
        ("IA3", {f"{Q0}.ia3_l": (2, 4)}, "shape-contradiction"),
        ("IA3", {f"{Q0}.ia3_l": ()}, "shape-contradiction"),
        ("IA3", made.factors(), "shape-contradiction"),
        ("LOHA", LOHA | {f"{Q0}.hada_w2_b": (4, 16)}, "shape-contradiction"),
        ("LOHA", {f"{Q0}.hada_w1_a": (8, 4), f"{Q0}.hada_w1_b": (4, 8)}, "tensor-missing"),
        ("LOKR", W1, "tensor-missing"),
        ("LOKR", W1 | {f"{Q0}.lokr_w2": (4,)}, "shape-contradiction"),
        ("LOKR", W1 | {f"{Q0}.lokr_w2_a": (4, 3), f"{Q0}.lokr_w2_b": (3, 4)}, "shape-contradiction"),
        ("LOKR", W1 | {f"{Q0}.lokr_w1_a": (2, 4), f"{Q0}.lokr_w1_b": (4, 2)}, "shape-contradiction"),
        ("VERA", {f"{Q0}.vera_lambda_b": (8, 1), f"{Q0}.vera_lambda_d": (4,)}, "shape-contradiction"),
        ("VERA", VERA | {"base_model.vera_A": (3, 8)}, "shape-contradiction"),
    ],
)  # fmt: skip
def test_other_kinds_that_do_not_add_up(tmp_path, kind, tensors, code):
    assert refused(with_tensors(tmp_path, tensors, peft_type=kind)).code == code


def test_integers_are_no_weights(tmp_path):
    error = refused(with_tensors(tmp_path, made.factors(), dtype="I32"))
    assert (error.code, "I32" in error.message) == ("shape-contradiction", True)


@pytest.mark.parametrize(
    ("files", "codes"),
    [
        ({WEIGHTS: made.adapter()[WEIGHTS]}, ["config-missing"]),
        ({CONFIG: made.adapter()[CONFIG]}, ["weights-missing"]),
        ({CONFIG: made.adapter()[CONFIG], "adapter_model.bin": b""}, ["pickle-only"]),
        (made.adapter(task_type="SEQ_CLS"), ["task-unsupported"]),
        (made.adapter(peft_type="ADALORA"), ["peft-type-unsupported"]),
        (made.adapter(peft_type="nonsense"), ["peft-type-unsupported"]),
        (made.adapter(init_lora_weights="pissa"), ["init-changes-base"]),
        (made.adapter(layer_replication=[[0, 1]]), ["setting-unsupported"]),
        (made.adapter(fill=0), ["no-op"]),
        (made.adapter(lora_alpha=0), ["no-op"]),
        (made.adapter(alpha_pattern={"q_proj": 0, "v_proj": 0}), ["no-op"]),
        (made.adapter() | {"config.json": b"{}", "model.safetensors": b""}, ["full-model-beside"]),
        ({CONFIG: b'{"lora_layers": 4}', "adapters.safetensors": made.adapter()[WEIGHTS]}, ["foreign-adapter"]),
    ],
)
def test_what_is_not_for_lmoe_is_said_in_findings(tmp_path, files, codes):
    adapter = inspect(made.write(tmp_path, files))
    assert [item.code for item in adapter.findings] == codes
    facts = summary(adapter)
    assert facts["supported"] is (codes[0] in ("no-op", "full-model-beside"))
    json.dumps(facts, allow_nan=False)


def test_tensors_of_a_setting_that_is_refused_by_name_are_not_complained_about(tmp_path):
    old = {f"{Q0}.lora_A.weight": (8, 8), f"{Q0}.lora_B.weight": (16, 4)}  # MergedLinear: two stacked updates
    adapter = inspect(with_tensors(tmp_path, old, enable_lora=[True, False, True]))
    assert [item.code for item in adapter.findings] == ["setting-unsupported"]
    assert summary(adapter)["modules"] == 1


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"lora/adapter_config.json": b"{}"}, "there is one in lora"),
        ({"model.gguf": b""}, "llama.cpp"),
        ({"config.json": b"{}"}, "lmoe inspect base"),
    ],
)
def test_a_folder_without_an_adapter_gets_a_hint(tmp_path, files, word):
    assert word in refused(made.write(tmp_path, files)).hint


def test_shapes_without_a_usable_config_still_tell_the_rank(tmp_path):
    made.write(tmp_path, {WEIGHTS: made.safetensors({**made.factors(3), "odd.lora_A.weight": ()})})
    facts = summary(inspect(tmp_path))
    assert (facts["rank"], facts["modules"]) == ({"min": 3, "max": 3, "default": None}, 5)


MODULES = st.sampled_from(["q_proj", "mlp.experts", "mlp.experts.base_layer", "lm_head", "mlp.gate"])
ENDINGS = st.sampled_from(
    [
        "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
        "lora_magnitude_vector", "ia3_l", "weight", "bias", "vera_lambda_b", "vera_lambda_d", "odd",
        *(f"hada_w{number}_{side}" for number in (1, 2) for side in "ab"),
        *(f"lokr_w{number}{side}" for number in (1, 2) for side in ("", "_a", "_b")),
    ]
)  # fmt: skip
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple) | st.just((4, 8)) | st.just((8, 4))
CONFIGS = st.fixed_dictionaries(
    {"peft_type": st.sampled_from(["LORA", "IA3", "LOHA", "LOKR", "VERA"])},
    optional={
        "r": st.integers(1, 4),
        "target_parameters": st.lists(
            st.sampled_from(["experts.down_proj", "experts.up_proj", "gate.weight", "weight"])
        ),
        "rank_pattern": st.dictionaries(st.sampled_from(["q_proj", ".*", "gate.weight"]), st.integers(1, 4)),
        "use_rslora": st.booleans(),
    },
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.builds("base_model.model.{}.{}".format, MODULES, ENDINGS), SHAPES, max_size=6), CONFIGS)
def test_any_tensors_are_an_adapter_or_an_error(tmp_path_factory, tensors, changes):
    folder = with_tensors(tmp_path_factory.mktemp("any"), tensors, **changes)
    try:
        adapter = inspect(folder)
    except LmoeError as error:
        assert error.exit_code == 2
        return
    json.dumps(summary(adapter), allow_nan=False)
    for part in adapter.parts.values():
        assert part.shape is None or min(part.shape) >= 0
        assert part.rank >= 0
