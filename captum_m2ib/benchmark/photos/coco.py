"""Photographs and what is in them, from annotations in COCO's format (Lin et al. 2014)."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.encoders.pictures import load_picture

if TYPE_CHECKING:
    from PIL.Image import Image

SPLITS = ("validation", "test")
"""Photographs of even ids, and of odd ids."""


@dataclass(frozen=True)
class Photo:
    r"""A photograph.

    Attributes:

        id (int): As annotated.
        path (Path): The file.
        size (tuple[int, int]): Width and height that the annotations are for.
        outlines (mapping): Each category that is in the picture to the segmentations of all its objects: polygons, or
            run lengths, compressed or not; None for an object that has none.
    """

    id: int
    path: Path
    size: tuple[int, int]
    outlines: Mapping[str, Sequence[Any]]

    def picture(self) -> Image:
        r"""The picture in mode RGB.

        Raises:
            ValueError: if it cannot be read, or has another size than the annotations say.
        """
        found = load_picture(self.path, "--data")
        if found.size != self.size:
            raise ValueError(
                f"--data: {self.path} has {found.size[0]} x {found.size[1]} pixels, its annotations are for "
                f"{self.size[0]} x {self.size[1]}."
            )
        return found

    def mask(self, category: str) -> NDArray[np.bool_] | None:
        r"""Where a category is: the union of its objects, crowds included.

        Args:

            category (str): One that is in the picture.

        Returns:
            numpy.ndarray or None: bool (H, W); None where an object has no segmentation.

        Raises:
            ImportError: if pycocotools is not installed.
            ValueError: if a segmentation is damaged.
        """
        whole = np.zeros(self.size[::-1], dtype=np.bool_)
        for outline in self.outlines[category]:
            if not outline:
                return None
            whole |= self._drawn(outline, category)
        return whole

    def _drawn(self, outline: Any, category: str) -> NDArray[np.bool_]:
        width, height = self.size
        try:
            parts = _polygons(outline, height, width) if isinstance(outline, list) else [outline]
            return np.any([_filled(part, height, width) for part in parts], axis=0)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(
                f"--annotations: cannot draw the mask of {category!r} in picture {self.id} ({error})."
            ) from None


@dataclass(frozen=True)
class Photos:
    r"""The photographs of one split.

    Attributes:

        names (tuple[str, ...]): What the data set's categories are called, those that no picture holds included.
        photos (tuple[Photo, ...]): In the order of their ids.
        digest (str): What tells the annotations from others.
    """

    names: tuple[str, ...]
    photos: tuple[Photo, ...]
    digest: str


def read_photos(
    data: str | os.PathLike[str], annotations: str | os.PathLike[str], split: str = "test", limit: int | None = None
) -> Photos:
    r"""Read the photographs of a split.

    Args:

        data (str or PathLike): The folder where the pictures lie, or the one above their folder ``images``.
        annotations (str or PathLike): The file, by its path or by its name in ``data``.
        split (str, optional): ``"validation"`` or ``"test"``. Default: "test"
        limit (int, optional): The first so many. Default: None (all)

    Returns:
        Photos: those with at least one annotated object.

    Raises:
        ValueError: if the annotations cannot be read, a picture is not there, or the split has none.
    """
    if split not in SPLITS:
        raise ValueError(f"--split: expected {' or '.join(SPLITS)}, got {split!r}.")
    folder = Path(data)
    if not folder.is_dir():
        raise ValueError(f"--data: {folder} is not a directory.")
    path = next((place for place in (Path(annotations), folder / annotations) if place.is_file()), None)
    if path is None:
        raise ValueError(f"--annotations: there is no file {annotations}, nor one of that name in {folder}.")
    text = path.read_bytes()
    try:
        names, photos = _parsed(json.loads(text), folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        told = f"there is no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"--annotations: {path} is not in COCO's format ({told}).") from None
    wanted = [photo for photo in photos if photo.id % 2 == SPLITS.index(split) and photo.outlines][:limit]
    if not wanted:
        raise ValueError(f"--split: {path} annotates no picture of the {split} split.")
    if lacking := [photo.path.name for photo in wanted if not photo.path.is_file()]:
        raise ValueError(
            f"--data: {folder} lacks {len(lacking)} of {len(wanted)} pictures, {lacking[0]} among them; expected them "
            "there or in its folder images."
        )
    return Photos(names, tuple(wanted), hashlib.sha256(text).hexdigest()[:16])


def _parsed(told: Any, folder: Path) -> tuple[tuple[str, ...], list[Photo]]:
    # LVIS writes what consists of several words with underscores.
    names = {int(one["id"]): str(one["name"]).replace("_", " ") for one in told["categories"]}
    outlines: dict[int, dict[str, list[Any]]] = {}
    for one in told["annotations"]:
        objects = outlines.setdefault(int(one["image_id"]), {})
        objects.setdefault(names[int(one["category_id"])], []).append(_outline(one.get("segmentation")))
    photos = [
        Photo(
            int(one["id"]),
            _place(folder, str(one["file_name"])),
            (int(one["width"]), int(one["height"])),
            outlines.get(int(one["id"]), {}),
        )
        for one in told["images"]
    ]
    return tuple(dict.fromkeys(names.values())), sorted(photos, key=lambda photo: photo.id)


def _place(folder: Path, name: str) -> Path:
    inside = Path(name)
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"the file name {name!r} leads out of the folder")
    place = folder / "images" / inside
    return place if place.is_file() else folder / inside


def _outline(segmentation: Any) -> Any:
    # Fewer than three corners enclose nothing, and pycocotools takes two for a box.
    return [part for part in segmentation if len(part) >= 6] if isinstance(segmentation, list) else segmentation


def _polygons(corners: list[Any], height: int, width: int) -> list[Any]:
    """Polygons as compressed run lengths, drawn by COCO's own rules."""
    try:
        mask: Any = importlib.import_module("pycocotools.mask")
    except ImportError as error:
        raise ImportError(
            f"--annotations: masks need pycocotools ({error}); install it with: pip install 'captum_m2ib[photos]'."
        ) from error
    found: list[Any] = mask.frPyObjects(corners, height, width)
    return found


def _filled(told: Mapping[str, Any], height: int, width: int) -> NDArray[np.bool_]:
    """Run lengths down the columns, outside first; pycocotools would not look whether they fill the picture."""
    if list(told["size"]) != [height, width]:
        raise ValueError(f"its size is {told['size']}, the picture's {[height, width]}")
    counts = told["counts"]
    runs = np.asarray(counts if isinstance(counts, list) else _decompressed(counts), dtype=np.int64)
    if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
        raise ValueError(f"its run lengths do not add up to {height * width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _decompressed(text: str | bytes) -> list[int]:
    """Run lengths from COCO's text: five bits a letter, the lowest first, each from the third on less the one before
    the last.
    """
    counts: list[int] = []
    letters = iter(text.encode() if isinstance(text, str) else text)
    for letter in letters:
        bits, shift = letter - 48, 5
        value = bits & 31
        while bits & 32:
            bits = next(letters, 48) - 48
            value |= (bits & 31) << shift
            shift += 5
        if bits & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts
