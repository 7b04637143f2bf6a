"""A small data set in COCO's format, drawn: coloured rectangles on grey, with every kind of segmentation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 120, 80
NAMES = {1: "circle", 2: "cross", 7: "triangle", 9: "star", 11: "never_seen"}

Box = tuple[int, int, int, int]


def polygon(box: Box) -> list[list[float]]:
    left, top, right, bottom = box
    return [[left, top, right, top, right, bottom, left, bottom]]


def mask_of(box: Box) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), dtype=bool)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed: down the columns, outside first."""
    flat = mask.T.ravel()
    changes = np.flatnonzero(np.diff(np.concatenate([[False], flat])))
    return {"size": list(mask.shape), "counts": np.diff([0, *changes, flat.size]).tolist()}


def compressed(mask: np.ndarray) -> dict[str, Any]:
    from pycocotools import mask as drawing

    found = drawing.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": found["counts"].decode()}


def annotation(picture: int, category: int, segmentation: Any, crowd: int = 0) -> dict[str, Any]:
    found = {"image_id": picture, "category_id": category, "iscrowd": crowd, "segmentation": segmentation}
    return found if segmentation is not None else {key: found[key] for key in ("image_id", "category_id")}


def write_coco(folder: Path, objects: list[dict[str, Any]], pictures: int = 12, **changed: Any) -> Path:
    """Pictures 1 to ``pictures`` in ``images``, each grey with its own rectangle of colour, and instances.json."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = []
    for number in range(1, pictures + 1):
        picture = np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)
        picture[20:60, 40:70] = rng.integers(0, 255, 3)
        Image.fromarray(picture).save(folder / "images" / f"{number:012d}.png")
        images.append({"id": number, "file_name": f"{number:012d}.png", "width": WIDTH, "height": HEIGHT})
    told = {
        "images": images,
        "annotations": objects,
        "categories": [{"id": key, "name": name} for key, name in NAMES.items()],
        **changed,
    }
    (folder / "instances.json").write_text(json.dumps(told))
    return folder


def usual(pictures: int = 12) -> list[dict[str, Any]]:
    """In each picture but the last two one category in turn, and in every third one another beside it."""
    keys = [1, 2, 7]
    found = []
    for number in range(1, pictures - 1):
        found.append(annotation(number, keys[number // 2 % 3], polygon((40, 20, 70, 60))))
        if number % 3 == 0:
            found.append(annotation(number, 9, run_lengths(mask_of((72, 10, 95, 70)))))
    return found
