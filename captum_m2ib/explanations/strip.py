"""The frames of a video as a strip, each above the same under its heat, with when it is and how much it holds."""

from __future__ import annotations

import numpy as np

from captum_m2ib.encoders.timelines import VideoTimeline
from captum_m2ib.explanations.lettering import EDGE, INK, QUIET, elide, write
from captum_m2ib.explanations.sheet import MARGIN, ROOM, Page
from captum_m2ib.explanations.shown import Shown
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import heat_bar, overlay

# All lengths in inches.
_GAP, _BAR, _BAR_ROOM = 0.3, 0.16, 0.85
_WIDTH = ROOM - _GAP - _BAR - _BAR_ROOM
_WIDEST, _BETWEEN, _LINES, _AFTER = 1.7, 0.06, 0.36, 0.12
_IN_A_ROW = 8


class VideoPanels:
    r"""The frames of a video.

    Args:

        shown (Shown): An explanation of a video.
        timeline (VideoTimeline): Which frames these are.
        style (str): As for :meth:`captum_m2ib.Explanation.plot`.
    """

    def __init__(self, shown: Shown, timeline: VideoTimeline, style: str) -> None:
        self.shown, self.timeline, self.style = shown, timeline, style
        self.wording = WORDINGS[shown.unit]
        count, high, wide = shown.image.shape[:3]
        self.columns = min(count, _IN_A_ROW)
        self.cell_width = min((_WIDTH - _BETWEEN * (self.columns - 1)) / self.columns, _WIDEST)
        self.cell_height = self.cell_width * high / wide
        self.pitch = 2 * self.cell_height + _BETWEEN + _LINES + _AFTER
        self.height = max(self.pitch * -(-count // self.columns), 1.5)

    def draw(self, page: Page, top: float) -> None:
        """Draw them on a page, from this height on."""
        values = self.shown.image_bits.astype(np.float64)
        heat, scale = self.wording.per_pixels(values)
        is_signed = self.wording.is_signed(heat)
        greatest = float(np.abs(heat).max() if is_signed else heat.max())
        title = f"frames, as the model sees them; below each {self.wording.title(heat)}"
        write(page.page, MARGIN, top - 0.16, title, size=10, color=QUIET)
        for index, (frame, found) in enumerate(zip(self.shown.image, heat, strict=True)):
            row, column = divmod(index, self.columns)
            x, y = MARGIN + column * (self.cell_width + _BETWEEN), top + row * self.pitch
            heated = overlay(frame, found, maximum=max(greatest, 0.0), signed=is_signed, palette=self.style)
            for line, picture in enumerate((frame, heated)):
                at = y + line * (self.cell_height + _BETWEEN)
                axes = page.axes_at(x, at, self.cell_width, self.cell_height)
                axes.imshow(picture, aspect="auto")
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(color=EDGE, linewidth=0.6)
            below = y + 2 * self.cell_height + _BETWEEN
            told = [(self.timeline.names[index], INK)]
            if self.wording.has_totals:
                told.append((self.wording.amount(float(values[index].sum())), QUIET))
            for line, (text, color) in enumerate(told):
                text = elide(text, self.cell_width, 8.5)
                middle = x + self.cell_width / 2
                write(page.page, middle, below + 0.14 + 0.17 * line, text, size=8.5, color=color, ha="center")
        bar_left = MARGIN + self.columns * (self.cell_width + _BETWEEN) - _BETWEEN + _GAP
        high = max(2 * self.cell_height + _BETWEEN, 1.3)
        heat_bar(page.axes_at(bar_left, top, _BAR, high), heat, scale, is_signed, self.style)
