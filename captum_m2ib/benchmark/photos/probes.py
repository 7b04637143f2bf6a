"""What is asked about photographs: where is the thing that the caption names, alone or in a mosaic of four pictures?

Asked is only about what the model knows: the name of a category must be among the first so many of all names, by the
model's score with the whole photograph. No method that is measured has a part in that choice.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image

from captum_m2ib.benchmark.photos.coco import Photo, Photos
from captum_m2ib.benchmark.truth import truth_of

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder

CAPTION = "a photo of a {}"

AREAS = (0.01, 0.6)
"""How much of what the model sees of a picture a category may cover to be asked about."""

TILES = 4
SIDE = 448
"""Height and width of a mosaic in pixels, before the model's processor."""

_ROWS = 2
_TILE = SIDE // _ROWS
_BATCH = 16

# The grid that areas are measured on.
_GRID = (64, 64)


@dataclass(frozen=True)
class Known:
    r"""A category that is in a photograph.

    Attributes:

        photo (Photo): The photograph.
        name (str): What the category is called.
        rank (int): How many names the model scores at least as high, this one included.
        area (float): Which share of what the model sees it covers; NaN where there is no mask, or nobody asked.
    """

    photo: Photo
    name: str
    rank: int
    area: float

    @property
    def is_shown(self) -> bool:
        """Whether its mask is neither a speck nor nearly everything."""
        return AREAS[0] <= self.area <= AREAS[1]


@dataclass(frozen=True)
class Shown:
    r"""What a probe shows.

    Attributes:

        picture (PIL.Image.Image): The picture.
        caption (str): Names one thing.
        region (PIL.Image.Image): White where that is, as large as the picture.
        other_caption (str or None): Names another thing of the picture.
        other_region (PIL.Image.Image or None): White where that is.
    """

    picture: Image.Image
    caption: str
    region: Image.Image
    other_caption: str | None = None
    other_region: Image.Image | None = None


class Probe(Protocol):
    """A question whose answer is known."""

    def show(self) -> Shown:
        """Read its picture."""

    def told(self) -> list[Any]:
        """What tells it from others, as plain values."""


@dataclass(frozen=True)
class PhotoProbe:
    r"""A photograph and the name of what is in it; the truth is its mask.

    Attributes:

        photo (Photo): The photograph.
        name (str): The category that the caption names.
        other (str or None): Another category of the picture.
    """

    photo: Photo
    name: str
    other: str | None

    def show(self) -> Shown:
        """Read the picture and draw the masks."""
        other = None if self.other is None else (CAPTION.format(self.other), _region(self.photo, self.other))
        region = _region(self.photo, self.name)
        return Shown(self.photo.picture(), CAPTION.format(self.name), region, *(other or ()))

    def told(self) -> list[Any]:
        """The picture's id and both names."""
        return [self.photo.id, self.name, self.other]


@dataclass(frozen=True)
class Mosaic:
    r"""Four photographs in a grid, and the name of what is in one of them alone; the truth is its cell.

    Attributes:

        photos (tuple[Photo, ...]): Row by row.
        name (str): The category that the caption names.
        cell (int): Which photograph it is in.
        other (str or None): A category that is in one other photograph alone.
        other_cell (int): Which.
    """

    photos: tuple[Photo, ...]
    name: str
    cell: int
    other: str | None
    other_cell: int

    def show(self) -> Shown:
        """Read the four pictures, cut the middle square of each, and lay them side by side."""
        whole = Image.new("RGB", (SIDE, SIDE))
        for number, photo in enumerate(self.photos):
            whole.paste(_square(photo.picture()), _corner(number))
        other = None if self.other is None else (CAPTION.format(self.other), _cell(self.other_cell))
        return Shown(whole, CAPTION.format(self.name), _cell(self.cell), *(other or ()))

    def told(self) -> list[Any]:
        """The pictures' ids, both names and their cells."""
        return [[photo.id for photo in self.photos], self.name, self.cell, self.other, self.other_cell]


def name_photos(encoder: DualEncoder, photos: Photos, rank: int) -> list[Known]:
    r"""Rank the names of what is in each photograph among all names, by the model's score.

    Args:

        encoder (DualEncoder): With a processor.
        photos (Photos): The photographs.
        rank (int): Up to which rank areas are measured.

    Returns:
        list[Known]: every category of every photograph, in the order of ids and of names.
    """
    captions = [CAPTION.format(name) for name in photos.names]
    found = []
    for start in range(0, len(photos.photos), _BATCH):
        some = photos.photos[start : start + _BATCH]
        scores = _scores(encoder, [photo.picture() for photo in some], captions)
        for photo, row in zip(some, scores, strict=True):
            for place, name in enumerate(photos.names):
                if name in photo.outlines:
                    higher = int((row >= row[place]).sum())
                    area = _area(encoder, photo, name) if higher <= rank else float("nan")
                    found.append(Known(photo, name, higher, area))
    return found


def photo_probes(known: Sequence[Known]) -> list[PhotoProbe]:
    r"""A probe for each category with a mask; the other caption names the one after it in the same picture.

    Args:

        known (sequence of Known): What may be asked about.

    Returns:
        list[PhotoProbe]: in the order given.
    """
    names: dict[int, list[str]] = {}
    shown = [one for one in known if one.is_shown]
    for one in shown:
        names.setdefault(one.photo.id, []).append(one.name)
    found = []
    for one in shown:
        there = names[one.photo.id]
        other = there[(there.index(one.name) + 1) % len(there)]
        found.append(PhotoProbe(one.photo, one.name, None if other == one.name else other))
    return found


def mosaics(known: Sequence[Known], seed: int = 0) -> list[Mosaic]:
    r"""A mosaic for each category, its three other pictures drawn from those that do not hold it.

    Args:

        known (sequence of Known): What may be asked about, and the pictures that are drawn from.
        seed (int, optional): Of the draws. Default: 0

    Returns:
        list[Mosaic]: in the order given; without those for which there are not three other pictures.
    """
    by_photo: dict[int, list[Known]] = {}
    for one in known:
        by_photo.setdefault(one.photo.id, []).append(one)
    found = []
    for one in known:
        # A seed of the pair's own, so that its draw does not depend on its place.
        rng = np.random.default_rng([seed, one.photo.id, zlib.crc32(one.name.encode())])
        rest = [there[0].photo for there in by_photo.values() if one.name not in there[0].photo.outlines]
        if len(rest) < TILES - 1:
            continue
        drawn = [rest[place] for place in rng.choice(len(rest), TILES - 1, replace=False)]
        cell = int(rng.integers(TILES))
        photos = (*drawn[:cell], one.photo, *drawn[cell:])
        others = [
            (place, other.name)
            for place, photo in enumerate(photos)
            for other in by_photo[photo.id]
            if place != cell and sum(other.name in shown.outlines for shown in photos) == 1
        ]
        place, name = others[int(rng.integers(len(others)))] if others else (0, None)
        found.append(Mosaic(photos, one.name, cell, name, place))
    return found


def _scores(encoder: DualEncoder, pictures: list[Any], captions: list[str]) -> Any:
    # The processor makes pairs; towers are run apart, so that each caption and each picture is read once.
    first, second = encoder.prepare(pictures, captions[0]), encoder.prepare(pictures[0], captions)
    of_text = {"input_ids", "text", "attention_mask"}
    names = encoder.argument_names[2:]
    additional = [
        (second if name in of_text else first).additional_forward_args[place]
        for place, name in enumerate(names[: len(second.additional_forward_args)])
    ]
    with torch.no_grad():
        return encoder.similarities(first.inputs[0], second.inputs[1], *additional).double().cpu().numpy()


def _area(encoder: DualEncoder, photo: Photo, name: str) -> float:
    if photo.mask(name) is None:
        return float("nan")
    return float(truth_of(encoder, _region(photo, name), name, _GRID).double().mean())


def _region(photo: Photo, name: str) -> Image.Image:
    mask = photo.mask(name)
    if mask is None:
        raise ValueError(f"{name}: picture {photo.id} has no mask of it.")
    return Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")


def _corner(cell: int) -> tuple[int, int]:
    return cell % _ROWS * _TILE, cell // _ROWS * _TILE


def _cell(cell: int) -> Image.Image:
    left, top = _corner(cell)
    region = Image.new("RGB", (SIDE, SIDE))
    region.paste((255, 255, 255), (left, top, left + _TILE, top + _TILE))
    return region


def _square(picture: Image.Image) -> Image.Image:
    """The middle of a picture as a tile of a mosaic."""
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    # Cut first: a resized box would hold something of what lies beside it.
    return picture.crop((left, top, left + edge, top + edge)).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
