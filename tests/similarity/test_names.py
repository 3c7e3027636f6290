"""Modules are matched by what they are, whatever adapters call them; adapters of different bases are told apart."""

from __future__ import annotations

import pytest

from lmoe_cli.findings import RefusedError
from tests.similarity.adapters import compared, module, pair, plan, random, write

QUERY = "layers.0.self_attn.q_proj"


@pytest.mark.parametrize("root", ["", "base_model.", "base_model.model.language_model."])
def test_wrappers_in_front_of_a_name_do_not_matter(tmp_path, root):
    one = write(tmp_path / "one", {module(): random()})
    two = write(tmp_path / "two", {module(): random()}, root=root)
    found = compared(one, two)
    assert [group["module"] for group in found["matrices"]] == [QUERY]
    assert found["overall"]["pairs"][0]["cosine"] == pytest.approx(1.0)


def test_two_modules_that_differ_only_in_wrappers_stay_two(tmp_path):
    names = {f"model.{QUERY}": random(seed=1), f"language_model.{QUERY}": random(seed=2)}
    found = pair(write(tmp_path / "one", names), write(tmp_path / "two", names))
    assert found["shared"] == 2
    assert found["cosine"] == pytest.approx(1.0)


def test_shapes_that_differ_are_an_error_that_names_both_bases(tmp_path):
    one = write(tmp_path / "one", {module(): random()})
    two = write(tmp_path / "two", {module(): random(d_in=9)}, base_model_name_or_path="acme/wider")
    with pytest.raises(RefusedError) as refused:
        plan(one, two)
    (item,) = refused.value.findings
    assert (item.code, item.where, refused.value.exit_code) == ("shapes-differ", "one, two", 1)
    assert f"1 of 1 shapes differ, {QUERY} is (10, 8) and (10, 9)" in item.message
    assert "acme/base" in item.hint
    assert "acme/wider" in item.hint


def test_other_bases_of_the_same_shapes_are_a_warning_and_mirrors_are_none(tmp_path):
    one = write(tmp_path / "one", {module(): random()})
    other = write(tmp_path / "other", {module(): random()}, base_model_name_or_path="acme/else")
    mirror = write(tmp_path / "mirror", {module(): random()}, base_model_name_or_path="unsloth/base-bnb-4bit")
    found = plan(one, other, mirror).findings
    assert [(item.code, item.where, item.severity) for item in found] == [("bases-differ", "other", "warning")]


def test_adapters_without_a_module_in_common_have_cosine_zero_and_that_is_said(tmp_path):
    one, two = write(tmp_path / "one", {module(0): random()}), write(tmp_path / "two", {module(1): random()})
    (item,) = plan(one, two).findings
    assert (item.code, item.where) == ("modules-disjoint", "one, two")
    found = pair(one, two)
    assert (found["shared"], found["cosine"], found["cosine_shared"]) == (0, 0.0, None)
    assert found["overlap_input"] is None


def test_an_adapter_whose_initialiser_changed_the_base_is_refused(tmp_path):
    one = write(tmp_path / "one", {module(): random()})
    pissa = write(tmp_path / "pissa", {module(): random()}, init_lora_weights="pissa")
    with pytest.raises(RefusedError) as refused:
        plan(one, pissa)
    assert [item.code for item in refused.value.findings] == ["init-changes-base"]


def test_an_adapter_of_a_classifier_can_be_compared(tmp_path):
    folders = [write(tmp_path / name, {module(): random()}, task_type="SEQ_CLS") for name in ("one", "two")]
    assert plan(*folders).findings == ()
