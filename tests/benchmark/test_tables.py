"""Tables say what was measured: every number in its place, marks where differences are clear."""

from __future__ import annotations

import csv
import io

import pytest

from captum_m2ib.benchmark.tables import WIDTH, Figure, compare, figures_csv, markdown, summary_csv, terminal

FIGURES = (
    Figure("pointing", "pictures", 1, "pointing"),
    Figure("drop", "pictures", -1, "drop", 1),
    Figure("seconds", "cost", 0, "s"),
    Figure("absent", "cost", 1, "absent"),
)
NAN = float("nan")
VALUES = {
    "ours": {"pointing": [[0.5, 0.7]], "drop": [[3.0, 3.0]], "seconds": [[0.25]]},
    "worse": {"pointing": [[0.1, 0.3]], "drop": [[8.0, 9.0]], "seconds": [[0.125]]},
    "better": {"pointing": [[0.6, 0.8]], "drop": [[1.0, NAN]]},
    "level": {"pointing": [[0.4, 0.8]], "drop": [[2.0, 5.0]]},
    "floor": {"pointing": [[0.0, 0.0]]},
}
COMPARED = compare(VALUES, FIGURES, "ours", ["worse", "better", "level"])


def test_marks_follow_the_direction_and_the_interval():
    marks = {key: cell.mark for key, cell in COMPARED.cells.items()}
    assert marks["worse", "pointing"] == marks["worse", "drop"] == marks["floor", "pointing"] == "-"
    assert marks["better", "pointing"] == marks["better", "drop"] == "+"
    assert marks["level", "pointing"] == marks["level", "drop"] == marks["ours", "drop"] == ""
    # Neither is better: a cost is never marked.
    assert marks["worse", "seconds"] == ""
    assert [figure.name for figure in COMPARED.figures] == ["pointing", "drop", "seconds"]


def test_terminal():
    lines = terminal(COMPARED).splitlines()
    assert lines[0].split() == ["pictures", "pointing", "↑", "drop", "↓"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:6]}
    assert rows == {
        "ours": ["0.600", "3.0"],
        "worse": ["0.200-", "8.5-"],
        "better": ["0.700+", "1.0+"],
        "level": ["0.600", "3.5"],
        "floor": ["0.000-", "."],
    }
    # Decimals stand below each other.
    assert len({line.index(".") for line in lines[1:6]}) == 1
    assert "cost" in lines[7] and lines[8].split() == ["ours", "0.250"]
    versus = next(line for line in lines if line.startswith("pointing"))
    assert versus.split() == ["pointing", "0.600", "better", "0.700", "-0.100", "[-0.100,", "-0.100]", "behind"]
    assert lines[-1].startswith("+ / -")


def test_a_wide_table_is_broken_not_cut():
    figures = [Figure(f"figure {i}", "many", 1, f"a rather long head {i}") for i in range(12)]
    values = {name: {figure.name: [[0.5, 0.25]] for figure in figures} for name in ("ours", "another-rather-long-name")}
    text = terminal(compare(values, figures, "ours", ["another-rather-long-name"]))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(f"a rather long head {i}" in text for i in range(12))


def test_markdown():
    lines = markdown(COMPARED).splitlines()
    assert lines[0] == "### pictures"
    assert lines[2] == "| method | pointing ↑ | drop ↓ |"
    rows = {line.split(" | ")[0].strip("| `"): line for line in lines[4:9]}
    assert rows["better"] == "| `better` | **0.700** [0.600, 0.800] + | **1.0** + |"
    assert rows["worse"].endswith("| 8.5 [8.0, 9.0] - |") and rows["floor"].endswith("| – |")
    widths = {line.count("|") for line in lines if line.startswith("|") and "drop" not in line}
    assert widths == {3, 4, 7}


def test_several_models_say_how_many_agree():
    values = {"ours": {"pointing": [[0.9, 0.9], [0.1, 0.1]]}, "rival": {"pointing": [[0.2, 0.2], [0.2, 0.2]]}}
    assert "level (1 of 2 models)" in terminal(compare(values, FIGURES, "ours", ["rival"]))


def test_figures_csv_holds_every_value():
    rows = list(csv.DictReader(io.StringIO(figures_csv(VALUES, ["shipped"], FIGURES))))
    found = {(r["model"], r["method"], r["figure"], int(r["probe"])): float(r["value"]) for r in rows}
    expected = {
        ("shipped", method, figure, probe): value
        for method, by_figure in VALUES.items()
        for figure, (row,) in by_figure.items()
        for probe, value in enumerate(row)
        if value == value
    }
    assert found == expected


def test_summary_csv():
    rows = list(csv.DictReader(io.StringIO(summary_csv(COMPARED))))
    found = {(row["method"], row["figure"]): row for row in rows}
    assert set(found) == set(COMPARED.cells)
    better = found["better", "drop"]
    assert (float(better["mean"]), better["count"], better["without_value"]) == (1.0, "1", "1")
    assert (float(better["difference"]), better["clear"], better["best_rival"]) == (2.0, "theirs", "1")
    assert found["worse", "drop"]["clear"] == "ours" and found["worse", "drop"]["best_rival"] == "0"
    assert found["ours", "drop"]["difference"] == "" == found["worse", "seconds"]["difference"]
    assert float(found["level", "pointing"]["difference_low"]) == pytest.approx(-0.1)
