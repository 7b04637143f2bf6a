"""The share of a tower that goes round the map, layer by layer, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from captum_m2ib.explanations.lettering import INK
from captum_m2ib.metrics.bypass import THRESHOLD, TowerBypass, check_threshold

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLUE, _RED, _GRID = "#2a6fb0", "#b0402a", "#d8d8de"


def plot_bypass(towers: Sequence[TowerBypass], threshold: float = THRESHOLD) -> Figure:
    r"""Draw the share that goes round the map over the layers, one panel per tower.

    Args:

        towers (sequence of TowerBypass): What :func:`captum_m2ib.metrics.bypass.measure_bypass` returned.
        threshold (float, optional): Where to draw the line. Default: 0.5

    Returns:
        Figure: A :class:`matplotlib.figure.Figure` outside pyplot: the mean over pairs as a line, the middle 80 % of
        the pairs as a band.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    check_threshold(threshold)
    widths = [1.4 + 0.62 * len(tower.layers) for tower in towers]
    figure = Figure(figsize=(sum(widths) + 0.9, 3.9), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(towers), sharey=True, squeeze=False, width_ratios=widths)[0]
    for tower, axes in zip(towers, panels, strict=True):
        places = list(range(len(tower.layers)))
        shares = tower.share.double()
        low, high = shares.nanquantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=1).tolist()
        axes.fill_between(places, low, high, color=_BLUE, alpha=0.16, linewidth=0)
        axes.plot(places, tower.mean_share.tolist(), color=_BLUE, linewidth=2, marker="o", markersize=5)
        axes.axhline(threshold, color=_RED, linewidth=1, linestyle=(0, (4, 3)))
        count = shares.shape[1]
        title = f"{tower.modality} tower: " + ("one pair" if count == 1 else f"mean and middle 80% of {count} pairs")
        axes.set_title(title, fontsize=10.5, color=INK, loc="left")
        axes.set_xticks(places, _short(tower.layers), fontsize=8.5, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.4, len(places) - 0.6)
        axes.tick_params(colors=INK, width=0.6, length=3)
        axes.grid(axis="y", color=_GRID, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set(color=_GRID)
    panels[0].set_ylim(min(-0.05, panels[0].get_ylim()[0]), 1.05)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0))
    panels[0].set_ylabel("share of the embedding that\nsurvives noise on the map's units", fontsize=9.5, color=INK)
    panels[0].annotate(
        "bypassed above",
        (0, threshold),
        xytext=(-6, 3),
        textcoords="offset points",
        fontsize=8.5,
        color=_RED,
        va="bottom",
    )
    return figure


def _short(names: Sequence[str]) -> list[str]:
    """Names without what all of them begin with."""
    parts = [name.split(".") for name in names]
    common = 0
    while len(names) > 1 and all(len(part) > common + 1 for part in parts) and len({p[common] for p in parts}) == 1:
        common += 1
    return [".".join(part[common:]) for part in parts]
