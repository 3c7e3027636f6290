"""Any config is read as PEFT means it, or refused by the key that is wrong."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pace import within

from lmoe_cli.adapter.config import SUPPORTED, AdapterConfig, ForeignAdapterError, parse_config
from lmoe_cli.errors import InvalidFileError, LmoeError
from tests.adapter import made


def parse(**changes: object) -> AdapterConfig:
    return parse_config(json.dumps(made.config(**changes)).encode(), "adapter_config.json")


def test_keys_that_change_the_maths_are_read():
    found = parse(
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"q_proj": 0.5},
        modules_to_save=["lm_head"],
        target_parameters=["experts.down_proj"],
        r=8.0,
        base_model_name_or_path="C:\\models\\llama",
    )
    assert (found.r, found.default_alpha, found.use_rslora, found.base) == (8, 8.0, True, "C:\\models\\llama")
    assert (found.rank_pattern, found.alpha_pattern) == ({"q_proj": 2}, {"q_proj": 0.5})
    assert (found.modules_to_save, found.target_parameters) == (["lm_head"], ["experts.down_proj"])


def test_keys_that_do_not_are_ignored_whatever_they_hold():
    strange = {
        "base": 5,
        "assumed_lora": 7,
        "unsupported": "x",
        "alpha": "x",
        "auto_map": {"a": "b"},
        "_x": 1,
        "lora": [],
    }
    assert parse(**strange) == parse()


def test_null_is_as_good_as_absent():
    keys = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "modules_to_save", "task_type")
    assert parse(**dict.fromkeys(keys)).default_alpha == 8.0
    assert parse(peft_type=None, base_model_name_or_path="").base is None


def test_alpha_goes_by_the_name_of_its_type():
    assert parse(peft_type="LOHA", alpha=3, lora_alpha=5).default_alpha == 3
    assert parse(peft_type="lokr", lora_alpha=5).default_alpha == 8
    assert parse(peft_type="LORA", alpha=3, lora_alpha=5).default_alpha == 5


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("r", 0), ("r", -1), ("r", 2_000_000), ("r", 1 << 70), ("r", "8"), ("r", 8.5), ("r", True), ("r", [8]),
        ("lora_alpha", "8"), ("lora_alpha", 1e30), ("lora_alpha", 10**400), ("lora_alpha", [8]), ("lora_alpha", True),
        ("rank_pattern", {"q": 0}), ("rank_pattern", {"q": 1 << 40}), ("rank_pattern", {"q": "8"}),
        ("rank_pattern", [8]),
        ("alpha_pattern", {"q": 1e30}), ("alpha_pattern", {"q": None}), ("alpha_pattern", "q"),
        ("alpha_pattern", {"q" * 2000: 1}), ("alpha_pattern", {"q\n": 1}),
        ("use_rslora", "yes"), ("use_rslora", 1), ("use_dora", {}), ("fan_in_fan_out", "False"),
        ("peft_type", 5), ("peft_type", []), ("peft_type", {}), ("peft_type", "\x1b[31mLORA"),
        ("base_model_name_or_path", 5), ("base_model_name_or_path", "\x1b]0;owned\x07"),
        ("base_model_name_or_path", "x" * 100_000), ("task_type", ["CAUSAL_LM"]),
        ("target_modules", 5), ("target_modules", [5]), ("target_modules", {"q": 1}), ("modules_to_save", "lm_head"),
        ("target_parameters", [["a"]]), ("init_lora_weights", 5), ("bias", False),
    ],
)  # fmt: skip
def test_an_impossible_value_is_refused_by_its_key(key, value):
    with pytest.raises(InvalidFileError) as error:
        parse(**{key: value})
    assert error.value.code == "config-invalid"
    assert key in error.value.message
    assert error.value.message.isprintable()
    assert len(error.value.message) < 300


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 8}}, "MLX"),
        ({"lora_layers": 16}, "MLX"),
        ({"hidden_size": 8, "model_class": "x", "config": {}}, "AdapterHub"),
        ({"architectures": ["LlamaForCausalLM"]}, "without peft_type"),
        ({}, "without peft_type"),
        ({"r": 8}, "without peft_type"),
    ],
)
def test_configs_of_others_are_named(raw, word):
    with pytest.raises(ForeignAdapterError, match=word):
        parse_config(json.dumps(raw).encode(), "adapter_config.json")


def test_an_old_config_without_a_type_is_taken_for_a_lora():
    found = parse_config(b'{"r": 8, "lora_alpha": 16}', "adapter_config.json")
    assert (found.peft_type, found.assumed_lora) == ("LORA", True)


def test_settings_that_are_more_than_a_delta_are_named():
    assert parse(layer_replication=[[0, 4]], use_qalora=False, arrow_config=None).unsupported == ("layer_replication",)
    assert parse(kasa_config={"beta": 1}).base_changing_init == "kasa"
    assert parse(init_lora_weights="pissa_niter_16").base_changing_init == "pissa_niter_16"
    assert {parse(init_lora_weights=init).base_changing_init for init in ("gaussian", "eva", True)} == {None}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
KEYS = [*AdapterConfig.model_fields, "base_model_name_or_path", "layer_replication", "kasa_config", "fine_tune_type"]


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from(KEYS), values, max_size=5), st.sampled_from([*SUPPORTED, "ADALORA", "x"]))
def test_any_config_is_read_or_refused(raw, kind):
    data = json.dumps({"peft_type": kind} | raw).encode()
    try:
        found = parse_config(data, "adapter_config.json")
    except LmoeError as error:
        assert error.message.isprintable()
    else:
        assert found.peft_type not in SUPPORTED or found.default_alpha is None or abs(found.default_alpha) <= 1e9


def test_a_config_of_the_largest_size_takes_little_time():
    data = json.dumps(made.config(rank_pattern={f"layers.{number}.q_proj": 8 for number in range(30_000)})).encode()
    with within(200):
        assert len(parse_config(data, "adapter_config.json").rank_pattern) == 30_000
