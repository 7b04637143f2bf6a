"""A sound and its map over the seconds: a spectrogram under heat, or a wave above its information."""

from __future__ import annotations

from typing import Any

import numpy as np

from captum_m2ib.encoders.timelines import SoundTimeline
from captum_m2ib.explanations.lettering import EDGE, INK, QUIET, write
from captum_m2ib.explanations.sheet import MARGIN, ROOM, Page
from captum_m2ib.explanations.shown import Shown
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import heat_bar, heat_colors, overlay

# All lengths in inches.
_LABELS, _GAP, _BAR, _BAR_ROOM = 0.75, 0.3, 0.16, 0.85
_WIDTH = ROOM - _LABELS - _GAP - _BAR - _BAR_ROOM
_HEIGHT, _BETWEEN, _BELOW = 1.6, 0.45, 0.45
_TICKS = (20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000)


class SoundPanels:
    r"""The panels of a sound.

    Args:

        shown (Shown): An explanation of a sound.
        timeline (SoundTimeline): What its columns and rows are.
        style (str): As for :meth:`captum_m2ib.Explanation.plot`.
    """

    height = 2 * _HEIGHT + _BETWEEN + _BELOW

    def __init__(self, shown: Shown, timeline: SoundTimeline, style: str) -> None:
        self.shown, self.timeline, self.style = shown, timeline, style
        self.wording = WORDINGS[shown.unit]
        values = shown.image_bits.astype(np.float64)
        # Of what sums mean something, a density: it does not depend on how finely time is cut.
        is_density = self.wording.has_totals
        self.heat = values * (values.shape[1] / timeline.seconds) if is_density else values
        self.scale = f"{self.wording.name} per second" if is_density else self.wording.name
        self.is_wave = len(values) == 1

    def draw(self, page: Page, top: float) -> None:
        """Draw them on a page, from this height on."""
        left, second = MARGIN + _LABELS, top + _HEIGHT + _BETWEEN
        titles = ("sound, as the model hears it", self.wording.title(self.heat))
        for y, title in zip((top, second), titles, strict=True):
            write(page.page, left, y - 0.16, title, size=10, color=QUIET)
        above, below = (page.axes_at(left, y, _WIDTH, _HEIGHT) for y in (top, second))
        is_signed = self.wording.is_signed(self.heat)
        rows, end = len(self.heat), self.timeline.seconds
        above.imshow(self.shown.image, aspect="auto", extent=(0, end, rows, 0))
        if self.is_wave:
            self._draw_steps(below)
        else:
            heated = overlay(self.shown.image, self.heat, signed=is_signed, palette=self.style)
            below.imshow(heated, aspect="auto", extent=(0, end, rows, 0))
            bar = page.axes_at(left + _WIDTH + _GAP, second, _BAR, _HEIGHT)
            heat_bar(bar, self.heat, self._of_bins(), is_signed, self.style)
        self._finish(above, below)

    def _of_bins(self) -> str:
        return f"{self.scale}\nand mel bin" if self.wording.has_totals else self.scale

    def _draw_steps(self, axes: Any) -> None:
        values = self.heat[0]
        colors = (heat_colors(256, palette=self.style)[190], heat_colors(256, signed=True, palette=self.style)[60])
        for part, color in zip((values.clip(min=0), values.clip(max=0)), colors, strict=True):
            axes.stairs(part, np.linspace(0, self.timeline.seconds, len(values) + 1), fill=True, color=color)
        reach = float(np.abs(values).max()) or 1.0
        axes.set_ylim(-1.08 * reach if (values < 0).any() else 0, 1.08 * reach)
        axes.set_ylabel(self.scale, fontsize=9.5, color=INK)

    def _finish(self, above: Any, below: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        end = self.timeline.seconds
        for axes in (above, below):
            axes.set_xlim(0, end)
            axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
            axes.tick_params(labelsize=9, colors=INK, width=0.6, length=3)
            axes.spines[:].set(color=EDGE, linewidth=0.6)
            if not self.is_wave:
                self._mark_pitches(axes)
            if self.timeline.period is not None:
                for place in np.arange(self.timeline.period, 0.99 * end, self.timeline.period):
                    axes.axvline(place, color="white", linestyle=(0, (4, 4)), linewidth=1.0)
        above.tick_params(labelbottom=False)
        if self.is_wave:
            above.set_yticks([])
        below.set_xlabel("seconds", fontsize=9.5, color=INK)

    def _mark_pitches(self, axes: Any) -> None:
        hertz = np.asarray(self.timeline.hertz[::-1])
        if len(hertz) != len(self.heat):
            axes.set_yticks([])
            axes.set_ylabel("mel bin, low to high", fontsize=9, color=INK)
            return
        middles = len(hertz) - 0.5 - np.arange(len(hertz))
        ticks = [tick for tick in _TICKS if hertz[0] <= tick <= hertz[-1]]
        places: list[float] = []
        names: list[str] = []
        for tick in ticks:
            place = float(np.interp(tick, hertz, middles))
            # Low pitches of a mel scale lie close together.
            if not places or abs(place - places[-1]) > 0.11 * len(hertz):
                places.append(place)
                names.append(f"{tick} Hz" if tick < 1_000 else f"{tick // 1_000} kHz")
        axes.set_yticks(places, names)
