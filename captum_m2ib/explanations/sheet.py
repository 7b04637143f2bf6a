"""The page that figures of explanations are drawn on: title, totals, notes, room for maps, the caption's tokens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from captum_m2ib.explanations.lettering import EDGE, QUIET, elide, text_width, visible, write
from captum_m2ib.explanations.token_boxes import ROW_PITCH, token_box, token_rows
from captum_m2ib.explanations.units import Wording

# All lengths in inches, from the top left.
WIDTH, MARGIN = 9.0, 0.35
ROOM = WIDTH - 2 * MARGIN
"""How wide maps may be."""


@dataclass(frozen=True)
class Words:
    r"""A caption as it is drawn.

    Args:

        tokens (sequence of str): Display tokens.
        values (sequence of float): One number per token.
        special (sequence of bool): Which tokens are the model's own.
        colors (sequence): Per token the colours of its box and of its letters.
        wording (Wording): How the numbers are spoken of.
        caption (str or None): The caption as it was given.
    """

    tokens: Sequence[str]
    values: Sequence[float]
    special: Sequence[bool]
    colors: Sequence[tuple[str, str]]
    wording: Wording
    caption: str | None


class Page:
    r"""A figure measured in inches from the top left.

    Args:

        height (float): Its height; all have one width.

    Attributes:

        figure (matplotlib.figure.Figure): Outside pyplot.
        page (matplotlib.axes.Axes): The whole figure.
    """

    def __init__(self, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.height = height
        self.figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.page = self.axes_at(0, 0, WIDTH, height)
        self.page.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.page.set_axis_off()

    def axes_at(self, x: float, y: float, width: float, height: float) -> Any:
        """Axes at a place of the page."""
        box = (x / WIDTH, 1 - (y + height) / self.height, width / WIDTH, height / self.height)
        return self.figure.add_axes(box)


class Sheet(Page):
    r"""A figure with everything but the maps drawn.

    Args:

        title (str): What stands above all.
        first (tuple[str, float]): What is explained beside the caption, and its total.
        notes (sequence of str): Lines below the title.
        words (Words): The caption.
        body (float): How high the maps are, in inches.

    Attributes:

        top (float): Where the maps begin.
    """

    def __init__(self, title: str, first: tuple[str, float], notes: Sequence[str], words: Words, body: float) -> None:
        wording = words.wording
        self.top = 1.12 + (0.06 + 0.22 * len(notes) if notes else 0.0)
        heading = [] if words.caption is None else _caption_lines(words.caption, ROOM)
        caption_top = self.top + body + 0.42
        tokens_top = caption_top + 0.3 + 0.24 * len(heading)
        numbers = [wording.number(value) for value in words.values]
        rows = token_rows([visible(token) for token in words.tokens], numbers, ROOM)
        super().__init__(tokens_top + ROW_PITCH * len(rows) + 0.2 if words.tokens else self.top + body + 0.2)

        page = self.page
        write(page, MARGIN, 0.36, title, size=15, weight="bold")
        if wording.has_totals:
            name, total = first
            text = f"   ·   text {wording.amount(sum(words.values))}" if words.tokens else ""
            totals = f"{name} {wording.amount(total)}{text}"
            write(page, WIDTH - MARGIN, 0.36, totals, size=11.5, ha="right")
        page.plot((MARGIN, WIDTH - MARGIN), (0.6, 0.6), color=EDGE, linewidth=0.8)
        for line, note in enumerate(notes):
            write(page, MARGIN, 0.8 + 0.22 * line, elide(note, ROOM, 9), size=9, color=QUIET)

        if not words.tokens:
            return
        count = f"{len(words.tokens)} token{'' if len(words.tokens) == 1 else 's'}, {wording.name} below each"
        write(page, MARGIN, caption_top, f"caption: {count}", size=10, color=QUIET)
        for line, text in enumerate(heading):
            write(page, MARGIN, caption_top + 0.27 + 0.24 * line, text, size=11.5)
        for line, row in enumerate(rows):
            y = tokens_top + ROW_PITCH * line
            for index, x, box_width, text in row:
                flag = words.special[index]
                token_box(page, MARGIN + x, y, box_width, text, numbers[index], words.colors[index], flag)


def _caption_lines(caption: str, room: float) -> list[str]:
    """The caption on at most two lines that fit into room."""
    size = 11.5
    text = " ".join(visible(caption).split())
    if not text:
        return []
    text = f"“{text}”"
    if text_width(text, size) <= room:
        return [text]
    columns = max(1, int(len(text) * room / text_width(text, size) * 0.96))
    lines = textwrap.wrap(text, columns)
    first, rest = lines[0], " ".join(lines[1:])
    return [elide(first, room, size), *([elide(rest, room, size)] if rest else [])]
