"""What a benchmark found, for a terminal, for a page and for another program.

Values come as ``values[method][figure]``, one row per model and one value per probe, NaN where there is none. A table
of one group has a row per method and a column per figure; ``+`` and ``-`` mark methods that are clearly better or
worse than ours: the 95 % interval of the paired difference leaves out zero.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from captum_m2ib.benchmark.compare import Difference, Versus, best_rival, estimate, paired
from captum_m2ib.metrics import Summary

Values = Mapping[str, Mapping[str, Sequence[Sequence[float]]]]

WIDTH = 120
_EMPTY = "."


@dataclass(frozen=True)
class Figure:
    r"""One thing that is measured.

    Attributes:

        name (str): What it is called everywhere, e.g. ``"image pointing"``.
        group (str): The table that it stands in.
        better (int): 1 if higher is better, -1 if lower is, 0 if neither is.
        short (str): Head of its column.
        digits (int): Decimals shown.
    """

    name: str
    group: str
    better: int
    short: str
    digits: int = 3


@dataclass(frozen=True)
class Cell:
    """One figure of one method: its mean, and how it differs from ours (None for ours, or where neither is better)."""

    method: str
    figure: Figure
    estimate: Summary
    difference: Difference | None

    @property
    def mark(self) -> str:
        """``+`` if the method is clearly better than ours, ``-`` if clearly worse, else empty."""
        if self.difference is None or not self.difference.is_clear or not self.figure.better:
            return ""
        # The difference is ours minus the method's.
        return "-" if self.difference.mean * self.figure.better > 0 else "+"


@dataclass(frozen=True)
class Comparison:
    r"""Every figure of every method, and ours beside its best rival.

    Attributes:

        ours (str): The method that the others are compared with.
        figures (tuple[Figure, ...]): The figures, in order.
        methods (tuple[str, ...]): The methods, in order.
        cells (dict): ``(method, figure name)`` to :class:`Cell`; without an entry where there is no value.
        versus (tuple[Versus, ...]): Per figure with a direction, ours beside its best rival.
    """

    ours: str
    figures: tuple[Figure, ...]
    methods: tuple[str, ...]
    cells: Mapping[tuple[str, str], Cell]
    versus: tuple[Versus, ...]


def compare(values: Values, figures: Sequence[Figure], ours: str, rivals: Sequence[str]) -> Comparison:
    r"""Means, intervals and paired differences of all that was measured.

    Args:

        values (mapping): ``values[method][figure name]``, (models, probes), the same probe in the same place.
        figures (sequence of Figure): Which figures, in the order of the tables.
        ours (str): The method that the others are compared with; need not be there.
        rivals (sequence of str): Those among which the best rival is sought.

    Returns:
        Comparison: differences are ours minus the method's.
    """
    cells = {}
    for method, by_figure in values.items():
        for figure in figures:
            if figure.name not in by_figure:
                continue
            found = estimate(by_figure[figure.name])
            compared = method != ours and figure.better and figure.name in values.get(ours, {})
            difference = paired(values[ours][figure.name], by_figure[figure.name]) if compared else None
            cells[method, figure.name] = Cell(method, figure, found, difference)
    versus = []
    for figure in figures:
        by_method = {method: found[figure.name] for method, found in values.items() if figure.name in found}
        best = best_rival(by_method, ours, rivals, figure.better, figure.name) if figure.better else None
        versus += [] if best is None else [best]
    seen = tuple(figure for figure in figures if any(name == figure.name for _, name in cells))
    return Comparison(ours, seen, tuple(values), cells, tuple(versus))


def terminal(comparison: Comparison) -> str:
    r"""The tables as text, at most :data:`WIDTH` characters wide.

    Args:

        comparison (Comparison): From :func:`compare`.

    Returns:
        str: a table per group, then ours beside its best rival.
    """
    blocks = [_group_text(comparison, group) for group in _groups(comparison.figures)]
    if comparison.versus:
        blocks.append(_versus_text(comparison))
    if any(cell.mark for cell in comparison.cells.values()):
        blocks.append(
            f"+ / -  clearly better / worse than {comparison.ours}: the 95 % bootstrap interval of the paired "
            "difference leaves out 0"
        )
    return "\n\n".join(blocks)


def markdown(comparison: Comparison) -> str:
    r"""The tables as Markdown, with 95 % intervals; the best mean of a column is bold.

    Args:

        comparison (Comparison): From :func:`compare`.

    Returns:
        str: a heading and a table per group, then ours beside its best rival.
    """
    lines = []
    for group in _groups(comparison.figures):
        figures = [figure for figure in comparison.figures if figure.group == group]
        lines += [f"### {group}", "", _markdown_row(["method", *(_headed(figure) for figure in figures)])]
        lines.append(_markdown_row(["---"] * (len(figures) + 1)))
        best = {figure.name: _best(comparison, figure) for figure in figures}
        for method in _methods_of(comparison, figures):
            cells = [comparison.cells.get((method, figure.name)) for figure in figures]
            shown = [_markdown_cell(cell, method in best[f.name]) for cell, f in zip(cells, figures, strict=True)]
            lines.append(_markdown_row([f"`{method}`", *shown]))
        lines.append("")
    if comparison.versus:
        lines += [f"### {comparison.ours} beside its best rival", ""]
        lines.append(_markdown_row(["figure", comparison.ours, "best rival", "its mean", "difference", "verdict"]))
        lines.append(_markdown_row(["---"] * 6))
        digits = {figure.name: figure.digits for figure in comparison.figures}
        for one in comparison.versus:
            lines.append(_markdown_row(_versus_row(one, digits[one.figure])))
        lines.append("")
    return "\n".join(lines)


def figures_csv(values: Values, models: Sequence[str], figures: Sequence[Figure]) -> str:
    r"""Every value, one line each.

    Args:

        values (mapping): As for :func:`compare`.
        models (sequence of str): The models' names, in the order of the rows.
        figures (sequence of Figure): Which figures.

    Returns:
        str: CSV with the columns model, method, figure, probe and value; without a line where there is no value.
    """
    lines = []
    for method, by_figure in values.items():
        for figure in figures:
            for model, row in zip(models, by_figure.get(figure.name, ()), strict=False):
                for probe, value in enumerate(row):
                    if math.isfinite(value):
                        lines.append((model, method, figure.name, probe, repr(float(value))))
    return csv_text(("model", "method", "figure", "probe", "value"), lines)


def summary_csv(comparison: Comparison) -> str:
    r"""Every mean with its interval, one line each, beside ours.

    Args:

        comparison (Comparison): From :func:`compare`.

    Returns:
        str: CSV; ``difference`` is ours minus the method's, ``clear`` says which of them is better where its interval
        leaves out zero, ``models_agreeing`` in how many models the difference has that sign.
    """
    best = {one.figure: one.rival for one in comparison.versus}
    lines = []
    for (method, name), cell in comparison.cells.items():
        one, other = cell.estimate, cell.difference
        lines.append(
            (method, name, cell.figure.better, one.mean, one.low, one.high, one.count, one.omitted)
            + (("",) * 5 if other is None else (other.mean, other.low, other.high, _clear(cell), other.agreeing))
            + (int(best.get(name) == method),)
        )
    heads = "method figure better mean low high count without_value difference difference_low difference_high clear"
    return csv_text((*heads.split(), "models_agreeing", "best_rival"), lines)


def csv_text(heads: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """Rows as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(lines)
    return text.getvalue()


def _clear(cell: Cell) -> str:
    return {"-": "ours", "+": "theirs", "": ""}[cell.mark]


def _groups(figures: Sequence[Figure]) -> list[str]:
    return list(dict.fromkeys(figure.group for figure in figures))


def _methods_of(comparison: Comparison, figures: Sequence[Figure]) -> list[str]:
    return [m for m in comparison.methods if any((m, figure.name) in comparison.cells for figure in figures)]


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else _EMPTY


def _headed(figure: Figure) -> str:
    return figure.short + {1: " ↑", -1: " ↓", 0: ""}[figure.better]


def _group_text(comparison: Comparison, group: str) -> str:
    figures = [figure for figure in comparison.figures if figure.group == group]
    methods = _methods_of(comparison, figures)
    first = max(len(name) for name in (*methods, group))
    rows = [[_text_cell(comparison.cells.get((method, figure.name))) for figure in figures] for method in methods]
    widths = [
        max(len(_headed(figure)), *(len(row[column].rstrip()) for row in rows)) for column, figure in enumerate(figures)
    ]
    # Columns that do not fit go into a table below with the same rows.
    parts: list[list[int]] = [[]]
    for column, width in enumerate(widths):
        if first + sum(widths[c] + 2 for c in parts[-1]) + width + 2 > WIDTH and parts[-1]:
            parts.append([])
        parts[-1].append(column)
    blocks = []
    for part in parts:
        heads = "".join(f"  {_headed(figures[c]):>{widths[c]}}" for c in part)
        lines = [f"{group:{first}}{heads}"]
        for method, row in zip(methods, rows, strict=True):
            shown = "".join(f"  {row[c]:>{widths[c]}}" for c in part)
            lines.append(f"{method:{first}}{shown}".rstrip())
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _text_cell(cell: Cell | None) -> str:
    # One place for the mark, so that decimals stand below each other.
    return f"{_EMPTY} " if cell is None else f"{_number(cell.estimate.mean, cell.figure.digits)}{cell.mark or ' '}"


def _best(comparison: Comparison, figure: Figure) -> list[str]:
    means = {
        method: comparison.cells[method, figure.name].estimate.mean
        for method in comparison.methods
        if (method, figure.name) in comparison.cells
    }
    means = {method: mean for method, mean in means.items() if math.isfinite(mean)}
    if not means or not figure.better:
        return []
    top = max(figure.better * mean for mean in means.values())
    return [method for method, mean in means.items() if figure.better * mean == top]


def _markdown_cell(cell: Cell | None, is_best: bool) -> str:
    if cell is None or not math.isfinite(cell.estimate.mean):
        return "–"
    one, digits = cell.estimate, cell.figure.digits
    mean = _number(one.mean, digits)
    interval = f" [{_number(one.low, digits)}, {_number(one.high, digits)}]" if one.count > 1 else ""
    return f"{f'**{mean}**' if is_best else mean}{interval}{' ' + cell.mark if cell.mark else ''}"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _versus_row(one: Versus, digits: int) -> list[str]:
    difference = one.difference
    verdict = "level" if not difference.is_clear else "ahead" if one.ahead else "behind"
    if difference.models > 1:
        verdict += f" ({difference.agreeing} of {difference.models} models)"
    ends = f"[{difference.low:+.{digits}f}, {difference.high:+.{digits}f}]"
    return [
        one.figure,
        _number(one.ours.mean, digits),
        one.rival,
        _number(one.theirs.mean, digits),
        f"{difference.mean:+.{digits}f} {ends}",
        verdict,
    ]


def _versus_text(comparison: Comparison) -> str:
    digits = {figure.name: figure.digits for figure in comparison.figures}
    rows = [_versus_row(one, digits[one.figure]) for one in comparison.versus]
    heads = ["beside the best rival", comparison.ours, "rival", "mean", "difference, 95 % interval", "verdict"]
    widths = [max(len(row[column]) for row in [heads, *rows]) for column in range(len(heads))]
    is_number = (False, True, False, True, True, False)
    lines = []
    for row in [heads, *rows]:
        cells = [
            f"{cell:>{width}}" if right else f"{cell:{width}}"
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
