"""Photographs and masks from COCO's format, and one sentence for whatever is wrong with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from coco_cases import HEIGHT, NAMES, WIDTH, annotation, compressed, mask_of, polygon, run_lengths, usual, write_coco
from PIL import Image

from captum_m2ib.benchmark.photos.coco import read_photos

FIRST, SECOND = (10, 5, 40, 30), (60, 20, 100, 75)
SEVERAL = run_lengths(mask_of(FIRST) | mask_of(SECOND))


@pytest.mark.parametrize(
    "segmentation",
    [
        [*polygon(FIRST), *polygon(SECOND)],
        [*polygon(FIRST), *polygon(SECOND), [3, 3, 90, 90]],
        SEVERAL,
        compressed(mask_of(FIRST) | mask_of(SECOND)),
    ],
    ids=["polygons", "a line is no polygon", "run lengths", "compressed"],
)
def test_every_kind_of_segmentation_is_drawn(tmp_path: Path, segmentation: Any):
    write_coco(tmp_path, [annotation(2, 1, segmentation)])
    (photo,) = read_photos(tmp_path, "instances.json", "validation").photos
    np.testing.assert_array_equal(photo.mask("circle"), mask_of(FIRST) | mask_of(SECOND))


def test_a_mask_is_the_union_of_objects_and_crowds(tmp_path: Path):
    crowd = run_lengths(mask_of((20, 10, 70, 40)))
    write_coco(tmp_path, [annotation(2, 1, polygon(FIRST)), annotation(2, 1, crowd, 1), annotation(2, 2, SEVERAL)])
    (photo,) = read_photos(tmp_path, "instances.json", "validation").photos
    assert list(photo.outlines) == ["circle", "cross"]
    np.testing.assert_array_equal(photo.mask("circle"), mask_of(FIRST) | mask_of((20, 10, 70, 40)))


@pytest.mark.parametrize("segmentation", [None, [], [[1, 2, 3, 4]]])
def test_without_a_segmentation_of_every_object_there_is_no_mask(tmp_path: Path, segmentation: Any):
    write_coco(tmp_path, [annotation(2, 1, polygon(FIRST)), annotation(2, 1, segmentation)])
    (photo,) = read_photos(tmp_path, "instances.json", "validation").photos
    assert photo.mask("circle") is None


def test_ids_decide_the_split_and_pictures_of_nothing_are_left_out(tmp_path: Path):
    write_coco(tmp_path, usual())
    validation, test = (read_photos(tmp_path, "instances.json", split) for split in ("validation", "test"))
    assert [photo.id for photo in validation.photos] == [2, 4, 6, 8, 10]
    assert [photo.id for photo in test.photos] == [1, 3, 5, 7, 9]
    assert validation.names == test.names == ("circle", "cross", "triangle", "star", "never seen")
    assert validation.digest == test.digest
    few = read_photos(tmp_path, tmp_path / "instances.json", "test", limit=2)
    assert [photo.id for photo in few.photos] == [1, 3]
    assert few.photos[0].picture().size == (WIDTH, HEIGHT)


def test_pictures_may_lie_beside_the_annotations(tmp_path: Path):
    folder = write_coco(tmp_path, usual())
    for path in (folder / "images").iterdir():
        path.rename(folder / path.name)
    assert len(read_photos(folder, "instances.json").photos) == 5


def test_a_missing_picture_is_named(tmp_path: Path):
    folder = write_coco(tmp_path, usual())
    (folder / "images" / "000000000003.png").unlink()
    assert len(read_photos(folder, "instances.json", "validation").photos) == 5
    with pytest.raises(ValueError, match=r"^--data: .* lacks 1 of 5 pictures, 000000000003.png among them"):
        read_photos(folder, "instances.json", "test")


def test_a_picture_of_another_size_is_refused(tmp_path: Path):
    folder = write_coco(tmp_path, usual())
    Image.new("RGB", (60, 40)).save(folder / "images" / "000000000001.png")
    photo = read_photos(folder, "instances.json").photos[0]
    with pytest.raises(ValueError, match=r"^--data: .*01.png has 60 x 40 pixels, its annotations are for 120 x 80"):
        photo.picture()


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"images": None}, "is not in COCO's format"),
        ({"categories": [{"id": 1, "name": "circle"}]}, r"is not in COCO's format \(there is no 2\)"),
        ({"annotations": [{"category_id": 1}]}, r"\(there is no 'image_id'\)"),
        (
            {"images": [{"id": 1, "file_name": "../secret.png", "width": 8, "height": 8}]},
            "the file name '../secret.png' leads out of the folder",
        ),
        ({"annotations": []}, "annotates no picture of the test split"),
    ],
)
def test_what_is_not_coco_s_format_is_said(tmp_path: Path, changed: dict[str, Any], says: str):
    write_coco(tmp_path, usual(), **changed)
    with pytest.raises(ValueError, match=says):
        read_photos(tmp_path, "instances.json")


def test_files_that_are_not_there_are_said(tmp_path: Path):
    write_coco(tmp_path / "data", usual())
    with pytest.raises(ValueError, match=r"^--data: .*none is not a directory"):
        read_photos(tmp_path / "none", "instances.json")
    with pytest.raises(ValueError, match=r"^--annotations: there is no file other.json, nor one of that name in"):
        read_photos(tmp_path / "data", "other.json")
    (tmp_path / "data" / "broken.json").write_text('{"images": [')
    with pytest.raises(ValueError, match=r"^--annotations: .*broken.json is not in COCO's format \(Expecting value"):
        read_photos(tmp_path / "data", "broken.json")
    with pytest.raises(ValueError, match=r"^--split: expected validation or test, got 'train'"):
        read_photos(tmp_path / "data", "instances.json", "train")


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [HEIGHT, WIDTH], "counts": [3, 4]},
        {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH + 5, -5]},
        {"size": [WIDTH, HEIGHT], "counts": [HEIGHT * WIDTH]},
        {"size": [HEIGHT, WIDTH], "counts": "garbage!!"},
        {"size": [HEIGHT, WIDTH]},
        [["a", 1, 2, 3, 4, 5]],
        7,
    ],
)
def test_a_damaged_segmentation_is_named(tmp_path: Path, segmentation: Any):
    write_coco(tmp_path, [annotation(2, 1, segmentation)])
    (photo,) = read_photos(tmp_path, "instances.json", "validation").photos
    with pytest.raises(ValueError, match=r"^--annotations: cannot draw the mask of 'circle' in picture 2 \(.+\)\.$"):
        photo.mask("circle")


def test_without_pycocotools_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_coco(tmp_path, usual())
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(ImportError, match=r"pip install 'captum_m2ib\[photos\]'"):
        read_photos(tmp_path, "instances.json").photos[0].mask("circle")


def test_the_order_of_names_is_the_file_s(tmp_path: Path):
    folder = write_coco(tmp_path, usual())
    told = json.loads((folder / "instances.json").read_text())
    told["categories"].reverse()
    (folder / "instances.json").write_text(json.dumps(told))
    assert read_photos(folder, "instances.json").names == tuple(
        name.replace("_", " ") for name in reversed(NAMES.values())
    )
