"""Explanations of sounds and videos as figures: whole, or their panels alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from captum_m2ib.encoders.timelines import SoundTimeline, Timeline, kind_of
from captum_m2ib.explanations.lettering import format_score
from captum_m2ib.explanations.sheet import Page, Sheet, Words
from captum_m2ib.explanations.shown import Shown
from captum_m2ib.explanations.spectrogram import SoundPanels
from captum_m2ib.explanations.strip import VideoPanels
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import token_colors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLES = ("heat", "safe")
"""How maps of sounds and videos are drawn."""


def timed_figure(shown: Shown, timeline: Timeline, score_name: str, style: str = "heat") -> Figure:
    r"""One figure for one pair: the sound or the frames under their heat, and the caption's tokens.

    Args:

        shown (Shown): An explanation.
        timeline (SoundTimeline or VideoTimeline): Where in time its map lies.
        score_name (str): What the score is called in the title.
        style (str, optional): ``"heat"`` or ``"safe"``. Default: "heat"

    Returns:
        matplotlib.figure.Figure: outside pyplot.

    Raises:
        ValueError: for another style.
    """
    panels = _panels(shown, timeline, style)
    values = shown.token_bits.tolist()
    colors = token_colors(shown.token_bits)
    words = Words(shown.tokens, values, shown.special, colors, WORDINGS[shown.unit], shown.caption)
    total = float(shown.image_bits.sum(dtype="float64"))
    title = f"{score_name} {format_score(shown.score)}"
    sheet = Sheet(title, (kind_of(timeline), total), shown.notes, words, panels.height)
    panels.draw(sheet, sheet.top)
    return sheet.figure


def panels_figure(shown: Shown, timeline: Timeline, style: str = "heat") -> Figure:
    """The panels alone, as pages show them beside text of their own."""
    panels = _panels(shown, timeline, style)
    page = Page(panels.height + 0.45)
    panels.draw(page, 0.4)
    return page.figure


def _panels(shown: Shown, timeline: Timeline, style: str) -> SoundPanels | VideoPanels:
    if style not in STYLES:
        raise ValueError(
            f"style: expected {' or '.join(STYLES)} for a {kind_of(timeline)}, got {style!r}; a line round an area is "
            "for pictures."
        )
    if isinstance(timeline, SoundTimeline):
        return SoundPanels(shown, timeline, style)
    return VideoPanels(shown, timeline, style)
