"""A caption's tokens as a figure holds them: boxes in rows, each with its number below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from captum_m2ib.explanations.lettering import EDGE, QUIET, elide, text_width, write

_TOKEN_SIZE, _BITS_SIZE = 10.5, 8.0
_BOX_HEIGHT, _BOX_GAP, ROW_PITCH = 0.3, 0.07, 0.62


def token_rows(tokens: Sequence[str], numbers: Sequence[str], room: float) -> list[list[tuple[int, float, float, str]]]:
    """Break the tokens into lines no wider than room: per token its index, left edge, box width and text."""
    rows: list[list[tuple[int, float, float, str]]] = []
    x = room + 1
    for index, (token, number) in enumerate(zip(tokens, numbers, strict=True)):
        text = elide(token, room - 0.2, _TOKEN_SIZE)
        needed = max(text_width(text, _TOKEN_SIZE) + 0.18, text_width(number, _BITS_SIZE) + 0.06, 0.36)
        if x + needed > room:
            rows.append([])
            x = 0.0
        rows[-1].append((index, x, needed, text))
        x += needed + _BOX_GAP
    return rows


def token_box(
    page: Any,
    x: float,
    y: float,
    width: float,
    text: str,
    number: str,
    colors: tuple[str, str],
    special: bool,
) -> None:
    """Draw one token in its box, its number below."""
    from matplotlib.patches import FancyBboxPatch

    background, ink = colors
    edge = {"edgecolor": QUIET, "linestyle": (0, (3, 2))} if special else {"edgecolor": EDGE}
    style = "round,pad=0,rounding_size=0.05"
    page.add_patch(
        FancyBboxPatch((x, y), width, _BOX_HEIGHT, boxstyle=style, facecolor=background, linewidth=0.8, **edge)
    )
    write(page, x + width / 2, y + _BOX_HEIGHT / 2, text, size=_TOKEN_SIZE, color=ink, ha="center")
    below = y + _BOX_HEIGHT + 0.1
    write(page, x + width / 2, below, number, size=_BITS_SIZE, color=QUIET, ha="center")
