"""The page of benchmarks says what was measured, and which rows miss what was asked."""

from __future__ import annotations

import sys
import threading

import pytest

from benchmarks import page, process, results, speed, table
from benchmarks.experiment import telling


def test_the_committed_page_is_what_the_committed_numbers_make():
    assert page.PATH.read_text() == page.page(results.load())


def test_the_experiment_tells_an_interval_per_domain_and_overall_of_all_that_was_compared():
    found = results.load()["experiment"]["found"]
    lines = telling.text(found).splitlines()
    for name, own in found["variants"].items():
        said = telling.NAMES.get(name, name)
        for other in own["eval"]["variants"]:
            if other["name"] not in telling.OTHERS or (name == telling.ALONE and other["name"] != "random"):
                continue
            start = f"| {said} | {telling.OTHERS[other['name']]} less it |"
            (line,) = [line for line in lines if line.startswith(start)]
            for values in (*other["domains"].values(), other["mean"]):
                less = values["difference"]["nats_per_token"]
                assert f"{less['value']:+.3f} [{less['low']:+.3f}, {less['high']:+.3f}]" in line


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"experts": 4, "ratio_to_base": 0.849, "byte_limit": 0.85}, "≥ 0.85"),
        ({"experts": 4, "ratio_to_base": 0.84, "byte_limit": 0.85}, "≥ 0.85, **missed**"),
        ({"experts": 8, "ratio_to_base": 0.69, "byte_limit": 0.73}, "≥ 0.69"),
        ({"experts": 8, "ratio_to_base": 0.67, "byte_limit": 0.73}, "≥ 0.69, **missed**"),
    ],
)
def test_a_row_that_misses_its_target_is_marked(row, asked):
    rest = {"variant": "blend", "tokens_per_s": 30.0, "ms_per_token": 33.0, "spread": 0.02}
    base = {**rest, "variant": "base", "experts": 0, "ratio_to_base": 1.0, "byte_limit": 1.0}
    text = speed.GROUPS["decode"]["decode-float32-8x32"].text({"rows": [base, {**rest, **row}]})
    assert text.splitlines()[-2].endswith(f"| {asked} |")


def test_growth_is_against_the_fewest_experts():
    times = {0: 20.0, 1: 21.0, 4: 25.0, 16: 27.5, 64: 28.0}
    rows = [
        {"variant": "blend" if number else "base", "experts": number, "ms_per_token": ms}
        for number, ms in times.items()
    ]
    text = speed.GROUPS["sparse"]["sparse-float32-decode"].text({"rows": rows})
    assert "| 16 | 27.50 | 1.10 | ≤ 1.10 |" in text
    assert "| 64 | 28.00 | 1.12 | ≤ 1.10, **missed** |" in text


def test_what_is_over_a_target_is_missed():
    assert table.at_most(1.504, 1.5) == "≤ 1.50"
    assert table.at_most(1.506, 1.5) == "≤ 1.50, **missed**"


def test_a_program_is_timed_to_its_first_output_and_its_memory_is_seen():
    code = "import time; held = bytearray(200_000_000); time.sleep(0.3); print('x', flush=True); time.sleep(0.7)"
    ran = process.run(sys.executable, "-c", code)
    assert 0.3 <= ran.first_output_seconds < ran.seconds - 0.5
    assert 200e6 < ran.anonymous_bytes < 300e6
    assert ran.anonymous_bytes < ran.resident_bytes


def test_a_program_that_fails_says_why():
    with pytest.raises(RuntimeError, match="no such base"):
        process.run(sys.executable, "-c", "raise SystemExit('no such base')")
    assert threading.active_count() < 20
