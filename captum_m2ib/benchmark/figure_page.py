"""One page of example maps, every method beside every other.

A band per example: its caption, the picture with the truth outlined, then each method's map over the picture and its
tokens below, coloured by their own share. Each map has its own scale, from zero to its 99.5th percentile; what is
negative shows as nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.benchmark.faithfulness import maskable_tokens
from captum_m2ib.benchmark.methods import Method
from captum_m2ib.benchmark.truth import grids_of
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pairs import Pairs
from captum_m2ib.explanations.lettering import INK, elide, text_width, write
from captum_m2ib.explanations.visualization import at_display_size, overlay, token_colors
from captum_m2ib.scenes import image_probes, token_probes
from captum_m2ib.scenes.grounds import TEXTURED

COLUMNS = 9
_SIDE, _GAP, _MARGIN = 1.7, 0.14, 0.3
_TITLE, _HEADING, _CHIP, _PITCH = 0.24, 0.42, 0.17, 0.2
_SIZE = 7.0
_QUIET, _EDGE = "#5c5c66", "#b8b8c2"


@dataclass(frozen=True)
class Example:
    r"""What a band of the page shows.

    Attributes:

        picture (numpy.ndarray): uint8, (H, W, 3).
        caption (str): The caption.
        mask (numpy.ndarray): The truth, bool (H, W).
        tokens (tuple[str, ...]): The caption's words as the tokenizer cuts them.
        maps (mapping): Method to its map over the picture, (h, w), and its value for each token.
    """

    picture: NDArray[np.uint8]
    caption: str
    mask: NDArray[np.bool_]
    tokens: tuple[str, ...]
    maps: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]


def make_examples(
    encoder: DualEncoder, methods: Sequence[Method], seed: int = 0, each: int = 2, ground: str = TEXTURED
) -> list[Example]:
    r"""Explain some probes by every method.

    Args:

        encoder (DualEncoder): An encoder trained on scenes.
        methods (sequence of Method): The methods.
        seed (int, optional): Which probes. Default: 0
        each (int, optional): How many of each kind: captions of one object, and captions of one that is there and one
                    that is not. Default: 2
        ground (str, optional): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``. Default: ``"textured"``

    Returns:
        list[Example]: 2 * ``each`` of them.
    """
    side = encoder.prepare(image_probes(1, seed)[0].image, "a scene").inputs[0].shape[-1]
    pictures, captions = image_probes(each, seed, side, ground), token_probes(each, seed, side, ground)
    probes: list[Any] = [*pictures, *captions]
    masks = [*(probe.mask for probe in pictures), *(probe.scene.masks[probe.target] for probe in captions)]
    pairs = encoder.prepare([probe.image for probe in probes], [probe.caption for probe in probes])
    return explained(encoder, methods, pairs, [probe.image for probe in probes], masks)


def explained(
    encoder: DualEncoder,
    methods: Sequence[Method],
    pairs: Pairs,
    pictures: Sequence[NDArray[np.uint8]],
    masks: Sequence[NDArray[np.bool_]],
) -> list[Example]:
    r"""Explain given pairs by every method.

    Args:

        encoder (DualEncoder): The encoder.
        methods (sequence of Method): The methods.
        pairs (Pairs): What is explained.
        pictures (sequence of numpy.ndarray): What is shown of each pair, uint8 (H, W, 3).
        masks (sequence of numpy.ndarray): The truth of each pair, bool, over the same part of the picture.

    Returns:
        list[Example]: one per pair.
    """
    found = []
    for method in methods:
        image, text = method(encoder).attribute(pairs.inputs, pairs.additional_forward_args)
        maps = [grid.double().numpy() for grid in grids_of(encoder, pairs, image.detach())]
        found.append((method.name, maps, text.detach().double().cpu().numpy()))
    words = maskable_tokens(pairs).numpy()
    return [
        Example(
            picture,
            pairs.captions[i],
            mask,
            tuple(token for token, is_word in zip(pairs.tokens[i], words[i], strict=True) if is_word),
            {name: (image[i], text[i][words[i]]) for name, image, text in found},
        )
        for i, (picture, mask) in enumerate(zip(pictures, masks, strict=True))
    ]


def write_page(path: str | os.PathLike[str], examples: Sequence[Example], title: str = "") -> None:
    r"""Draw the page.

    Args:

        path (str or PathLike): A .png file, replaced if it exists.
        examples (sequence of Example): From :func:`make_examples`; at least one.
        title (str, optional): Above the page. Default: ""

    Raises:
        ValueError: if there are no examples.
    """
    if not examples:
        raise ValueError("examples: expected at least one, got none.")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, 1 + max(len(example.maps) for example in examples))
    width = 2 * _MARGIN + columns * _SIDE + (columns - 1) * _GAP
    chips = [_chip_lines(example.tokens) for example in examples]
    heights = [_band_height(example, len(lines), columns) for example, lines in zip(examples, chips, strict=True)]
    height = 2 * _MARGIN + (0.35 if title else 0.0) + sum(heights)

    figure = Figure(figsize=(width, height), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    canvas = _Canvas(figure, page, width, height)
    top = _MARGIN
    if title:
        write(page, _MARGIN, top + 0.1, title, size=13.0, weight="bold")
        top += 0.35
    for example, lines, band in zip(examples, chips, heights, strict=True):
        _draw_band(canvas, example, lines, top, columns)
        top += band
    temporary = Path(path).with_name(f".{Path(path).name}.unfinished.png")
    figure.savefig(temporary)
    os.replace(temporary, path)


@dataclass(frozen=True)
class _Canvas:
    """A figure measured in inches from the top left."""

    figure: Any
    page: Any
    width: float
    height: float

    def picture(self, x: float, y: float, image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> None:
        """A square picture with the mask's outline."""
        box = (x / self.width, 1 - (y + _SIDE) / self.height, _SIDE / self.width, _SIDE / self.height)
        axes = self.figure.add_axes(box)
        axes.imshow(image, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=_EDGE, linewidth=0.6)
        if mask.any() and not mask.all():
            rows, columns = (
                np.linspace(0, side - 1, count) for side, count in zip(image.shape, mask.shape, strict=False)
            )
            for color, line in (("black", 2.2), ("white", 1.0)):
                axes.contour(columns, rows, mask.astype(float), levels=[0.5], colors=color, linewidths=line)


def _draw_band(
    canvas: _Canvas, example: Example, lines: list[list[tuple[int, float, float]]], top: float, columns: int
) -> None:
    caption = elide(f"“{example.caption}”", canvas.width - 2 * _MARGIN, 11.0)
    write(canvas.page, _MARGIN, top + 0.16, caption, size=11.0)
    shown = at_display_size(example.picture)
    row_height = _row_height(len(lines))
    cells: list[tuple[str, Any]] = [("picture and truth", None), *example.maps.items()]
    for number, (name, found) in enumerate(cells):
        x = _MARGIN + (number % columns) * (_SIDE + _GAP)
        y = top + _HEADING + (number // columns) * row_height
        write(canvas.page, x, y + 0.08, elide(name, _SIDE, 8.5), size=8.5, color=_QUIET if found is None else INK)
        y += _TITLE
        if found is None:
            canvas.picture(x, y, shown, example.mask)
            continue
        heat, values = found
        canvas.picture(x, y, overlay(shown, heat.clip(min=0), percentile=99.5), example.mask)
        _draw_chips(canvas, example.tokens, values, lines, x, y + _SIDE + 0.06)


def _draw_chips(
    canvas: _Canvas,
    tokens: Sequence[str],
    values: NDArray[np.float64],
    lines: list[list[tuple[int, float, float]]],
    x: float,
    y: float,
) -> None:
    from matplotlib.patches import Rectangle

    colors = token_colors(values.clip(min=0))
    for line, row in enumerate(lines):
        for index, left, width in row:
            background, ink = colors[index]
            corner = (x + left, y + line * _PITCH)
            canvas.page.add_patch(Rectangle(corner, width, _CHIP, facecolor=background, edgecolor=_EDGE, linewidth=0.5))
            centre = x + left + width / 2
            text = elide(tokens[index], width, _SIZE)
            write(canvas.page, centre, y + line * _PITCH + _CHIP / 2, text, size=_SIZE, color=ink, ha="center")


def _chip_lines(tokens: Sequence[str]) -> list[list[tuple[int, float, float]]]:
    """Tokens on lines as wide as a picture: index, left edge and width of each, in inches."""
    lines: list[list[tuple[int, float, float]]] = [[]]
    left = 0.0
    for index, token in enumerate(tokens):
        width = min(text_width(token, _SIZE) + 0.08, _SIDE)
        if left + width > _SIDE and lines[-1]:
            lines.append([])
            left = 0.0
        lines[-1].append((index, left, width))
        left += width + 0.03
    return lines


def _row_height(lines: int) -> float:
    return _TITLE + _SIDE + 0.06 + lines * _PITCH + 0.14


def _band_height(example: Example, lines: int, columns: int) -> float:
    rows = -(-(1 + len(example.maps)) // columns)
    return _HEADING + rows * _row_height(lines) + 0.1
