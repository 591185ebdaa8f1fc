"""Aligned tables of the commands."""

from __future__ import annotations

from megadit.tables import aligned


def test_columns_are_aligned_and_cells_stay_as_they_are():
    text = aligned(["name", "share", "lr"], [["a", "1.50%", "0.10"], ["longer", "", "1e-3"]], left=2)
    assert text.splitlines() == [
        "name    share    lr",
        "a       1.50%  0.10",
        "longer         1e-3",
    ]


def test_a_rule_below_the_header():
    assert aligned(["n", "size"], [["abc", "7"]], rule=True).splitlines() == ["n    size", "---  ----", "abc     7"]


def test_a_table_without_rows_is_its_header():
    assert aligned(["name", "lr"], []) == "name  lr"


def test_blanks_are_kept_and_a_line_break_stays_within_its_row():
    text = aligned(["name", "unit"], [["  in", " s"], ["a\nb", "m "]], left=1)
    assert text.splitlines() == ["name  unit", "  in     s", "a       m", "b"]
