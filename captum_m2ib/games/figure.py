"""The picture with what it adds on its own, then a row per word: the patches that it acts together with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.explanations.lettering import EDGE, INK, QUIET, elide, format_score, visible, write
from captum_m2ib.explanations.shown import ShownPair
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import at_display_size, heat_colors, overlay
from captum_m2ib.games.fit import Fit, Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# All lengths in inches.
_MARGIN, _GAP, _PICTURE, _COLUMNS = 0.35, 0.3, 1.75, 4
_HEAD, _TITLE, _BAR = 1.0, 0.3, 0.6


class Played(ShownPair, Protocol):
    """The parts of :class:`captum_m2ib.games.Interactions` that are drawn."""

    @property
    def score_name(self) -> str: ...
    @property
    def places(self) -> NDArray[np.int64]: ...
    @property
    def fit(self) -> Fit: ...
    @property
    def explained(self) -> float: ...
    @property
    def explained_alone(self) -> float: ...
    @property
    def passes(self) -> tuple[int, int]: ...
    @property
    def picture_map(self) -> Floats: ...
    def map_of(self, words: str | int | Sequence[int]) -> Floats: ...


def told(shown: Played) -> str:
    """How much of the score a fit explains, in a line."""
    return (
        f"values and interactions explain {shown.explained:.0%} of the score's variance over coalitions, values alone "
        f"{shown.explained_alone:.0%}; {shown.passes[0]} masked pictures, {shown.passes[1]} masked captions"
    )


def signed_overlay(shown: Played, values: Floats, top: float) -> NDArray[np.uint8]:
    """The picture under a map whose places keep their edges, up to a common maximum."""
    picture = at_display_size(shown.image)
    rows, columns = (
        np.arange(side) * count // side for side, count in zip(picture.shape[:2], values.shape, strict=True)
    )
    return overlay(picture, values[np.ix_(rows, columns)], maximum=top, signed=True)


def interactions_figure(shown: Played, tokens: Sequence[int]) -> Figure:
    r"""Draw interactions.

    Args:

        shown (Interactions): What there is to draw.
        tokens (sequence of int): For which tokens, by their indices.

    Returns:
        matplotlib.figure.Figure: outside pyplot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    high = _PICTURE * min(1.4, shown.image.shape[0] / shown.image.shape[1])
    wide = high * shown.image.shape[1] / shown.image.shape[0]
    lines = -(-len(tokens) // (_COLUMNS - 1))
    width = 2 * _MARGIN + _COLUMNS * (wide + _GAP) - _GAP + 0.3
    width = max(width, 7.6)
    pitch = _TITLE + high + 0.15
    height = _HEAD + max(lines, 2) * pitch + _BAR
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    room = width - 2 * _MARGIN
    # Bold letters are wider than those that are measured.
    head = elide(f"{shown.score_name} {format_score(shown.score)}  “{visible(shown.caption)}”", 0.88 * room, 11)
    write(page, _MARGIN, _MARGIN, head, size=11, weight="bold")
    write(page, _MARGIN, _MARGIN + 0.27, elide(told(shown), room, 8), size=8, color=QUIET)
    top = float(np.abs(shown.fit.across[list(tokens)]).max())

    def place(x: float, y: float, title: str, panel: NDArray[np.uint8], color: str) -> None:
        write(page, x, y + _TITLE - 0.14, elide(title, wide, 9), size=9, color=color)
        axes = figure.add_axes((x / width, 1 - (y + _TITLE + high) / height, wide / width, high / height))
        axes.imshow(panel, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=EDGE, linewidth=0.6)

    alone = float(np.abs(shown.fit.picture).max())
    place(_MARGIN, _HEAD, "picture", at_display_size(shown.image), QUIET)
    place(_MARGIN, _HEAD + pitch, "what it adds on average", signed_overlay(shown, shown.picture_map, alone), QUIET)
    for index, token in enumerate(tokens):
        line, column = divmod(index, _COLUMNS - 1)
        x = _MARGIN + 0.3 + (column + 1) * (wide + _GAP)
        value = WORDINGS["score"].number(float(shown.fit.caption[token]))
        title = f"{visible(shown.tokens[token])}  {value}"
        place(x, _HEAD + line * pitch, title, signed_overlay(shown, shown.map_of(token), top), INK)
    _draw_scale(figure, page, (width, height), top)
    return figure


def _draw_scale(figure: Any, page: Any, size: tuple[float, float], top: float) -> None:
    """The colours from minus the largest interaction to it."""
    width, height = size
    y, bar = height - 0.42, 2.2
    axes = figure.add_axes((_MARGIN / width, 1 - (y + 0.13) / height, bar / width, 0.13 / height))
    axes.imshow(heat_colors(256, signed=True)[None], aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=EDGE, linewidth=0.6)
    number = WORDINGS["score"].number
    for x, text, side in ((0.0, number(-top), "left"), (bar / 2, "0", "center"), (bar, number(top), "right")):
        write(page, _MARGIN + x, y + 0.24, text, size=8, color=QUIET, ha=side)
    note = "a word with a patch, in units of the score; beside a word what it adds on average"
    write(page, _MARGIN + bar + 0.2, y + 0.07, elide(note, width - 2 * _MARGIN - bar - 0.2, 8), size=8, color=QUIET)
