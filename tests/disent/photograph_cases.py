"""Folders of drawn pictures: a square of its class's colour on noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ("blue", "green", "red")


def draw(colour: str, seed: int) -> Image.Image:
    """48 x 40 pixels."""
    noise = np.random.default_rng([seed, COLOURS.index(colour)]).integers(0, 120, (40, 48, 3), dtype=np.uint8)
    noise[8:24, 8:24, 2 - COLOURS.index(colour)] = 250
    return Image.fromarray(noise)


def write_class(folder: Path, colour: str, count: int, first: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(first, first + count):
        draw(colour, index).save(folder / f"{index}.png")


def write_set(folder: Path, count: int = 8) -> Path:
    for colour in COLOURS:
        write_class(folder / colour, colour, count)
    return folder
