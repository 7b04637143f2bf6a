"""Pages with exact ground truth: words, years and small charts at known places among lines that say nothing.

A page is cut into cells; some of them hold an item each, of kinds that do not repeat on a page, moved about at random,
and some of the others a grey line. A page is determined by its purpose, seed and index alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.scenes.drawing import generator

if TYPE_CHECKING:
    from PIL.Image import Image

WORDS = (
    *("cost", "sales", "tax", "rent", "loan", "cash", "debt", "wage"),
    *("plan", "fund", "gold", "coal", "rice", "iron", "milk", "wool"),
)
YEARS = tuple(str(year) for year in range(2013, 2025))
CHARTS = ("bars", "curve", "pie", "steps")
KINDS = (*WORDS, *YEARS, *CHARTS)
"""What items are called, one word each."""

TEMPLATES = ("{}", "the {}", "find {}", "where is {}", "page with {}")
SIDE = 96
_COLUMNS, _ROWS = 3, 6
_WIDTH, _HEIGHT = SIDE // _COLUMNS, SIDE // _ROWS
_COUNTS = (3, 8)


class Item(NamedTuple):
    """What stands on a page, and the box that holds its ink, in pixels."""

    kind: str
    left: int
    top: int
    right: int
    bottom: int


class Page(NamedTuple):
    r"""A page.

    Attributes:

        picture (PIL.Image.Image): RGB, 96 pixels a side.
        items (tuple[Item, ...]): What stands on it.
    """

    picture: Image
    items: tuple[Item, ...]

    def mask(self, kind: str) -> NDArray[np.bool_]:
        """Where items of a kind stand, boolean, (height, width)."""
        found = np.zeros((SIDE, SIDE), dtype=bool)
        for item in self.items:
            if item.kind == kind:
                found[item.top : item.bottom, item.left : item.right] = True
        return found


class PageProbe(NamedTuple):
    """A page, a query that names one of its items, and the item's name."""

    page: Page
    query: str
    kind: str


def draw_page(seed: int, index: int = 0, purpose: str = "training") -> Page:
    r"""Draw a page.

    Args:

        seed (int): Not negative.
        index (int, optional): Which page. Default: 0
        purpose (str, optional): As for :func:`captum_m2ib.scenes.draw_scene`; pages of different purposes share
            nothing. Default: "training"

    Returns:
        Page: the same for the same arguments.

    Examples::

        >>> page = draw_page(0)
        >>> page.picture.size, len(page.items)
        ((96, 96), 4)
        >>> bool(page.mask(page.items[0].kind).any())
        True
    """
    return _draw(generator(purpose, seed, index))


def page_probes(count: int, seed: int = 0, start: int = 0) -> list[PageProbe]:
    r"""Held-out pages, each with a query that names one of its items.

    Args:

        count (int): How many.
        seed (int, optional): Not negative. Default: 0
        start (int, optional): Index of the first. Default: 0

    Returns:
        list[PageProbe]: the same for the same arguments.
    """
    probes = []
    for index in range(start, start + count):
        rng = generator("held_out", seed, index)
        page = _draw(rng)
        kind = page.items[rng.integers(len(page.items))].kind
        probes.append(PageProbe(page, query_of(kind, rng), kind))
    return probes


def query_of(kind: str, rng: np.random.Generator) -> str:
    """A query that names an item."""
    return TEMPLATES[rng.integers(len(TEMPLATES))].format(kind)


def _draw(rng: np.random.Generator) -> Page:
    from PIL import Image, ImageDraw

    ground = rng.integers(225, 256, 3)
    picture = Image.new("RGB", (SIDE, SIDE), tuple(int(value) for value in ground))
    pen = ImageDraw.Draw(picture)
    cells = rng.permutation(_COLUMNS * _ROWS)
    kinds = rng.permutation(len(KINDS))[: rng.integers(_COUNTS[0], _COUNTS[1] + 1)]
    items = []
    for cell, kind in zip(cells, kinds, strict=False):
        ink = tuple(int(value) for value in rng.integers(0, 110, 3))
        shape = _shape(KINDS[kind], rng)
        corner = (
            int(cell) % _COLUMNS * _WIDTH + int(rng.integers(_WIDTH - shape.width + 1)),
            int(cell) // _COLUMNS * _HEIGHT + int(rng.integers(_HEIGHT - shape.height + 1)),
        )
        pen.bitmap(corner, shape, fill=ink)
        items.append(Item(KINDS[kind], *corner, corner[0] + shape.width, corner[1] + shape.height))
    for cell in cells[len(kinds) :]:
        if rng.random() < 0.5:
            left, top = (
                int(cell) % _COLUMNS * _WIDTH + 2,
                int(cell) // _COLUMNS * _HEIGHT + int(rng.integers(3, _HEIGHT - 3)),
            )
            grey = int(rng.integers(120, 200))
            pen.line((left, top, left + int(rng.integers(10, _WIDTH - 4)), top), fill=(grey, grey, grey), width=1)
    return Page(picture, tuple(items))


def _shape(kind: str, rng: np.random.Generator) -> Image:
    """An item's ink, mode L, cut to what it covers."""
    from PIL import Image, ImageDraw

    drawn = Image.new("L", (_WIDTH, _HEIGHT))
    pen = ImageDraw.Draw(drawn)
    if kind in CHARTS:
        _chart(kind, pen, rng)
    else:
        pen.text((0, 0), kind, fill=255, font=_font())
    box = drawn.getbbox()
    return drawn.crop(box)


def _font() -> Any:
    """Pillow's own font of pixels, the same in every release."""
    from PIL import ImageFont

    return ImageFont.load_default_imagefont()


def _chart(kind: str, draw: Any, rng: np.random.Generator) -> None:
    heights = [int(height) for height in rng.integers(3, 13, 5)]
    if kind == "pie":
        start = int(rng.integers(360))
        draw.ellipse((0, 0, 13, 13), outline=255)
        draw.pieslice((0, 0, 13, 13), start, start + int(rng.integers(60, 150)), fill=255)
        return
    places = [(2 + 4 * place, 13 - height) for place, height in enumerate(heights)]
    if kind == "bars":
        for x, y in places:
            draw.rectangle((x, y, x + 2, 13), fill=255)
    elif kind == "curve":
        draw.line((0, 0, 0, 13, 21, 13), fill=255)
        draw.line(places, fill=255)
    else:
        rising = sorted(y for _, y in places)[::-1]
        corners = [(2 + 4 * (i + dx), y) for i, y in enumerate(rising) for dx in (0, 1)]
        draw.line((0, 0, 0, 13, 21, 13), fill=255)
        draw.line(corners, fill=255)
