"""The quick measurement stops a change that makes the product slow, and no other."""

from __future__ import annotations

import pytest

from benchmarks import quick


def measured(**ratios):
    """Instead of a bench: rows with these ratios to the base."""
    usual = {"bare": 1.3, "blend": 1.0, "folded": 1.3} | ratios
    rows = [{"variant": name, "experts": 4, "ratio_to_base": ratio} for name, ratio in usual.items()]
    return lambda *_: {"rows": [{"variant": "base", "experts": 0, "ratio_to_base": 1.0}, *rows]}


def test_usual_ratios_pass(monkeypatch, capsys):
    monkeypatch.setattr(quick, "lmoe_bench", measured())
    quick.main()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("ratios", "named"), [({"blend": 0.65}, "blend of 4"), ({"folded": 0.7}, "folded of 4")])
def test_a_ratio_far_under_the_usual_fails_by_name(monkeypatch, capsys, ratios, named):
    monkeypatch.setattr(quick, "lmoe_bench", measured(**ratios))
    with pytest.raises(SystemExit) as told:
        quick.main()
    assert told.value.code == 1
    assert f"bfloat16 {named}" in capsys.readouterr().err


def test_a_row_that_is_missing_fails(monkeypatch):
    monkeypatch.setattr(quick, "lmoe_bench", lambda *_: {"rows": []})
    with pytest.raises(SystemExit):
        quick.main()
