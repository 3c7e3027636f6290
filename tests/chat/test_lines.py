from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from lmoe_cli.chat.bar import weights_bar
from lmoe_cli.chat.lines import Lines, printable


def shown(text, width):
    lines = Lines(lambda: width)
    found = [line for piece in text for line in lines.add(piece)]
    return [*found, *lines.end()]


def test_lines_break_between_words():
    assert shown("the goblin blocks the bridge", 12) == ["the goblin", "blocks the", "bridge"]


def test_a_word_that_is_too_long_is_cut():
    assert shown("abcdefgh", 3) == ["abc", "def", "gh"]


def test_blank_lines_and_indents_stay():
    assert shown("one\n\n  two", 40) == ["one", "", "  two"]


def test_wide_characters_take_two_columns():
    assert shown("漢字漢字", 5) == ["漢字", "漢字"]


def test_nothing_a_model_says_steers_the_terminal():
    assert printable("a\x1b[31mb\r\x07\x9b\tc\n") == "a[31mb    c\n"


@given(st.text(alphabet="ab 漢\n", max_size=80), st.integers(2, 20))
def test_no_line_is_too_wide_and_no_word_is_lost(text, width):
    lines = shown(text, width)
    assert all(cell_len(line) <= width for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


@given(
    st.dictionaries(st.text(alphabet="abcdefgh", min_size=1, max_size=12), st.floats(-3, 3), max_size=12),
    st.integers(-1, 11),
    st.integers(24, 140),
    st.booleans(),
)
def test_the_bar_fits_and_shows_the_selected_expert(weights, selected, width, ascii_only):
    selected = min(selected, len(weights) - 1)
    parts = weights_bar(weights, selected, width, "123.4 tok/s", ascii_only=ascii_only)
    text = "".join(part for _, part in parts)
    assert cell_len(text) <= width
    if selected >= 0:
        assert f" {list(weights)[selected]} " in text
    if ascii_only:
        assert text.isascii()


def bar(weights, width=80):
    return "".join(part for _, part in weights_bar(weights, 0, width, "40.0 tok/s", ascii_only=False))


def test_a_gauge_is_full_at_weight_one():
    assert bar({"mage": 1.0}) == "  mage ██████████ 1.00" + " " * 48 + "40.0 tok/s"
    assert "░░░░░░░░░░ 0.00" in bar({"mage": 0.0})
    assert "█████░░░░░ 0.50" in bar({"mage": 0.5})


def test_a_bar_without_room_for_all_shows_that_there_are_more():
    text = bar({f"expert{number}": 0.5 for number in range(9)}, width=40)
    assert text.startswith("  expert0  0.50  expert1  0.50 ")
    assert text.rstrip().endswith("›")


def test_a_negative_weight_stands_apart_from_its_gauge():
    bar = weights_bar({"mage": -0.4, "healer ×": 1.0}, 0, 80, "", ascii_only=True)
    text = "".join(part for _, part in bar)
    assert " mage ####------ -0.40 " in text
    assert "healer x ##########" in text
