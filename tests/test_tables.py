"""Tables as text: whole, wrapped to a width, and as Markdown."""

import pytest

from kd_dist import tables

ROWS = [
    ("run", "what it is for"),
    ("a", "x"),
    ("runs/study/shuffled-within/seed-0", "rows of another image of the class"),
]


def test_without_a_width_each_row_is_a_line():
    lines = tables.plain(ROWS).splitlines()
    assert len(lines) == 3 and lines[2] == "  ".join(ROWS[2])
    assert lines[0].index("what") == lines[1].index("x") == len(ROWS[2][0]) + 2


@pytest.mark.parametrize("width", [20, 30, 47, 80])
def test_long_cells_are_wrapped_and_lose_nothing(width):
    lines = tables.plain(ROWS, width).splitlines()
    assert max(map(len, lines)) <= width
    assert sorted("".join(lines).replace(" ", "")) == sorted("".join(map("".join, ROWS)).replace(" ", ""))


def test_columns_that_fit_stay_as_they_are():
    assert tables.plain(ROWS, 200) == tables.plain(ROWS)
    narrow = tables.plain([("name", "1"), ("x" * 30, "2")], 24).splitlines()
    assert [line.split() for line in narrow] == [["name", "1"], ["x" * 21, "2"], ["x" * 9]]


def test_no_column_is_narrower_than_a_word():
    assert max(map(len, tables.plain(ROWS, 5).splitlines())) == 6 + 2 + 6


def test_markdown_escapes_the_bars_of_cells():
    assert tables.markdown([("a", "b"), ("x|y", "")]) == "| a | b |\n|---|---|\n| x\\|y |  |"
