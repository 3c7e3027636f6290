"""Every name that PEFT writes has a place, and no other name gets one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pace import within

from lmoe_cli.adapter.names import ROLES, Place, layer_of, natural, place

Q = "model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (f"base_model.model.{Q}.lora_A.weight", Place(Q, "lora_A")),
        (f"base_model.model.{Q}.lora_A.default.weight", Place(Q, "lora_A")),
        (f"base_model.model.{Q}.lora_B.my-adapter_2.weight", Place(Q, "lora_B")),
        (f"{Q}.lora_B.weight", Place(Q, "lora_B")),
        (f"base_model.model.{Q}.lora_B.bias", Place(Q, "lora_B_bias")),
        (f"base_model.model.{Q}.lora_magnitude_vector", Place(Q, "magnitude")),
        (f"base_model.model.{Q}.lora_magnitude_vector.weight", Place(Q, "magnitude")),
        (f"base_model.model.{Q}.lora_magnitude_vector.default.weight", Place(Q, "magnitude")),
        ("base_model.model.model.embed_tokens.lora_embedding_A", Place("model.embed_tokens", "lora_embedding_A")),
        ("base_model.model.x.experts.base_layer.lora_A.weight", Place("x.experts", "lora_A", 1)),
        ("base_model.model.x.experts.base_layer.base_layer.lora_A.weight", Place("x.experts", "lora_A", 2)),
        ("base_model.model.lm_head.weight", Place("lm_head", "saved_weight")),
        ("base_model.model.lm_head.modules_to_save.default.weight", Place("lm_head", "saved_weight")),
        ("base_model.model.lm_head.base_layer.weight", Place("lm_head", "saved_weight", 1)),
        (f"base_model.model.{Q}.bias", Place(Q, "saved_bias")),
        (f"base_model.model.{Q}.ia3_l", Place(Q, "ia3")),
        (f"base_model.model.{Q}.hada_w1_a", Place(Q, "hada_w1_a")),
        (f"base_model.model.{Q}.lokr_w2_b.default", Place(Q, "lokr_w2_b")),
        ("base_model.vera_A", Place("", "vera_A")),
    ],
)
def test_names_as_savers_write_them(name, expected):
    assert place(name) == expected
    assert expected.role in ROLES or expected.role.startswith("vera_")


@pytest.mark.parametrize(
    "name",
    [
        "", "weight", ".weight", "base_model.model.", f"{Q}.lora_E", f"{Q}.lora_A", f"{Q}.lora_C.weight", f"{Q}.oft_R",
        f"{Q}.lora_A.weight.lora_A.weight", f"{Q}.hada_t1", f"{Q}.lora_A.default.bias", f"{Q}.trainable_tokens_delta",
        f"{Q}\x1b[31m.lora_A.weight", f"{Q}.lora_A.weight\n", f"{Q}.prompt_embeddings", f"{Q}.weight.absmax",
    ],
)  # fmt: skip
def test_other_names_have_no_place(name):
    assert place(name) is None


@settings(max_examples=300, deadline=None)
@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from([*"0.", Q, "lora_A", "weight", "²", "9" * 5000]), max_size=8).map(".".join)
)
def test_any_name_is_placed_sorted_and_counted_without_complaint(name):
    found = place(name)
    if found:
        natural(found.module)
        layer_of(found.module)
    natural(name)


def test_layers_are_counted_as_people_count():
    assert [layer_of(name) for name in (Q, "lm_head", "h.11.mlp.0.x", "x.².y")] == [3, None, 11, None]
    assert sorted(["h.10.a", "h.2.b", "h.2.a", "e"], key=natural) == ["e", "h.2.a", "h.2.b", "h.10.a"]


def test_a_name_of_megabytes_takes_little_time():
    with within(150):
        for name in (
            ".lora_A" * 100_000,
            "x." * 300_000 + "weight",
            "a" * 1_000_000,
            f"{Q}.lora_A." + "a" * 1_000_000,
        ):
            place(name)
