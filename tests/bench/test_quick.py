"""The quick measurement stops a change that makes the product slow, and no other."""

from __future__ import annotations

import pytest

from benchmarks import quick


def measured(**ratios):
    """Instead of a bench: rows with these ratios to the base."""
    usual = {"blend": 0.75, "folded": 1.0} | ratios
    rows = [{"variant": name, "experts": 4, "ratio_to_base": ratio} for name, ratio in usual.items()]
    return lambda *_: {"rows": [{"variant": "base", "experts": 0, "ratio_to_base": 1.0}, *rows]}


def test_usual_ratios_pass(monkeypatch, capsys):
    monkeypatch.setattr(quick, "bench", measured())
    quick.main()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("ratios", "named"), [({"blend": 0.45}, "blend of 4"), ({"folded": 0.8}, "folded of 4")])
def test_a_ratio_far_under_the_usual_fails_by_name(monkeypatch, capsys, ratios, named):
    monkeypatch.setattr(quick, "bench", measured(**ratios))
    with pytest.raises(SystemExit) as told:
        quick.main()
    assert told.value.code == 1
    assert f"bfloat16 {named}" in capsys.readouterr().err


def test_a_row_that_is_missing_fails(monkeypatch):
    monkeypatch.setattr(quick, "bench", lambda *_: {"rows": []})
    with pytest.raises(SystemExit):
        quick.main()
