"""A bench of a recipe whose router decides measures the router, and folds nothing that cannot be folded."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from lmoe_cli.cli.root import lmoe

RECIPE = """
base: demo:adventurer
experts:
  warrior: {{adapter: demo:warrior, examples: [a fight]}}
  mage: {{adapter: demo:mage, examples: [a spell]}}
router: {{type: {}}}
"""


@pytest.mark.parametrize(
    ("router", "expected"),
    [
        ("arrow", [("base", 0), ("bare", 0), ("blend", 1), ("blend", 2), ("routed", 2)]),
        ("encoder", [("base", 0), ("bare", 0), ("blend", 1), ("blend", 2)]),
        ("weighted", [("base", 0), ("bare", 0), ("blend", 1), ("blend", 2), ("folded", 2)]),
    ],
)
def test_the_rows_of_a_router(tmp_path, router, expected):
    path = tmp_path / "mix.yaml"
    path.write_text(RECIPE.format(router))
    words = ["bench", str(path), "--rounds", "2", "--steps", "1", "--context", "4", "--dtype", "float32", "--json"]
    done = CliRunner().invoke(lmoe, words, catch_exceptions=False)
    rows = json.loads(done.stdout)["data"]["rows"]
    assert [(row["variant"], row["experts"]) for row in rows] == expected
    assert all(row["tokens_per_s"] > 0 for row in rows)
