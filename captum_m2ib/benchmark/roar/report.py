"""What remove and retrain on scenes found, as Markdown, as a table in a file, and as curves."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from captum_m2ib.benchmark.store import write_atomically
from captum_m2ib.metrics import RetrainRow, RetrainTable
from captum_m2ib.metrics.retrain_table import INTACT, RANDOM

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Results: TypeAlias = Mapping[tuple[str, str], RetrainTable]
"""(modality, protocol) to what was measured."""

BETTER = {"roar_plus": 1, "roar": -1}
"""1 where a map is the better the higher the value, -1 where it is the better the lower."""

_TITLES = {
    "roar_plus": "ROAR+, relative increase of the loss on intact held-out pairs (higher is better)",
    "roar": "ROAR, top-1 retrieval on held-out pairs replaced as well (lower is better)",
}
_LABELS = {"roar_plus": "ROAR+: increase of the loss", "roar": "ROAR: top-1 retrieval"}
_UNITS = {"image": "patches", "text": "words"}
_MARK = "*"
_COLOURS = ("#d1495b", "#edae49", "#00798c", "#7b5ea7", "#3a7d44", "#8c564b", "#30638e", "#c06c84")
_STYLES = {RANDOM: {"color": "#8a8a94", "linestyle": "--"}, "truth": {"color": "#1b1b1f", "linestyle": ":"}}


def is_beyond_random(difference: RetrainRow, protocol: str) -> bool:
    """Whether the interval of the difference from the random ranking lies wholly on the better side of zero."""
    return difference.low > 0 if BETTER[protocol] > 0 else difference.high < 0


def render(results: Results) -> str:
    """Markdown: per modality and protocol a table of values, and one of differences from the random ranking."""
    parts = []
    for (modality, protocol), table in results.items():
        rows, differences = table.summary(), table.against()
        intact = next(row for row in rows if row.method == INTACT)
        title = f"{modality}: {_TITLES[protocol]}"
        # The increase from itself is no measurement.
        parts.append(title if protocol == "roar_plus" else f"{title}; intact {_cell(intact)}")
        parts.append(_markdown(modality, {_place(row): _cell(row) for row in rows if row.method != INTACT}))
        parts.append(f"minus random, same seeds; {_MARK} the interval lies wholly on the better side of zero")
        marked = {
            _place(row): f"{_cell(row, '+')}{' ' + _MARK if is_beyond_random(row, protocol) else ''}"
            for row in differences
        }
        parts.append(_markdown(modality, marked))
    return "\n\n".join(parts)


def write_table(path: str | os.PathLike[str], results: Results) -> None:
    """One row per modality, protocol, method and share: the value and the difference from random, with intervals."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    value, difference = ("mean", "low", "high"), ("minus_random", "minus_random_low", "minus_random_high")
    writer.writerow(["modality", "protocol", "method", "fraction", "seeds", *value, *difference, "beyond_random"])
    for (modality, protocol), table in results.items():
        against = {_place(row): row for row in table.against()}
        for row in table.summary():
            other = against.get(_place(row))
            numbers = [row.mean, row.low, row.high, *((other.mean, other.low, other.high) if other else ())]
            cells = [f"{number:.6f}" for number in numbers] + [""] * (6 - len(numbers))
            verdict = str(is_beyond_random(other, protocol)).lower() if other else ""
            writer.writerow([modality, protocol, row.method, row.fraction, row.seeds, *cells, verdict])
    write_atomically(Path(path), text.getvalue())


def draw(results: Results) -> Figure:
    r"""Curves against the share replaced, with 95 % intervals, a row per modality and a column per protocol.

    Args:

        results (mapping): What :func:`captum_m2ib.benchmark.roar.run.run` returned.

    Returns:
        matplotlib.figure.Figure: outside pyplot; save it with ``figure.savefig(path)``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    modalities = list(dict.fromkeys(modality for modality, _ in results))
    figure = Figure(figsize=(10, 3.6 * len(modalities) + 0.5), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(len(modalities), len(BETTER), squeeze=False)
    for (modality, protocol), table in results.items():
        axes = grid[modalities.index(modality)][list(BETTER).index(protocol)]
        _curves(axes, table)
        axes.set_title(f"{modality}: {_LABELS[protocol]}", fontsize=11, loc="left")
        hint = "higher is better" if BETTER[protocol] > 0 else "lower is better"
        axes.set(xlabel=f"share of {_UNITS.get(modality, 'units')} replaced", ylabel=hint)
    handles, names = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9)
    return figure


def _curves(axes: Any, table: RetrainTable) -> None:
    rows = table.summary()
    methods = list(dict.fromkeys(row.method for row in rows if row.method != INTACT))
    shares = sorted({row.fraction for row in rows if row.method != INTACT})
    colours = iter(_COLOURS * len(methods))
    for place, method in enumerate(methods):
        curve = sorted((row for row in rows if row.method == method), key=lambda row: row.fraction)
        style = _STYLES.get(method) or {"color": next(colours), "linestyle": "-"}
        # Beside each other, so that no interval hides behind another.
        shift = (place - (len(methods) - 1) / 2) * 0.03 * (max(shares) - min(shares) or 1) / 2
        means = [row.mean for row in curve]
        reach = [row.high - row.mean for row in curve]
        x = [row.fraction + shift for row in curve]
        axes.errorbar(x, means, reach, label=method, marker="o", markersize=4, capsize=2.5, linewidth=1.4, **style)
    intact = next(row.mean for row in rows if row.method == INTACT)
    axes.axhline(intact, color="#b8b8c2", linewidth=0.8, zorder=0)
    axes.annotate("intact", (1.01, intact), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.set_xticks(shares, [f"{share:.0%}" for share in shares])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _place(row: RetrainRow) -> tuple[str, float]:
    return row.method, row.fraction


def _cell(row: RetrainRow, sign: str = "") -> str:
    return f"{row.mean:{sign}.3f} [{row.low:{sign}.3f}, {row.high:{sign}.3f}]"


def _markdown(modality: str, cells: Mapping[tuple[str, float], str]) -> str:
    methods, shares = (list(dict.fromkeys(place[axis] for place in cells)) for axis in (0, 1))
    lines = [
        ["method", *(f"{share:.0%} of {_UNITS.get(modality, 'units')}" for share in shares)],
        ["---"] * (1 + len(shares)),
        *([str(method), *(cells[method, share] for share in shares)] for method in methods),  # type: ignore[index]
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
