"""What is asked about photographs: names are ranked, masks go with the pictures, mosaics have one right cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_cases import annotation, mask_of, polygon, usual, write_coco
from PIL import Image

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.photos.coco import Photos, read_photos
from captum_m2ib.benchmark.photos.probes import (
    AREAS,
    CAPTION,
    SIDE,
    Known,
    PhotoProbe,
    mosaics,
    name_photos,
    photo_probes,
)
from captum_m2ib.benchmark.truth import truth_of

pytestmark = pytest.mark.filterwarnings("ignore:captions")

BOX = (40, 20, 70, 60)


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    """With a processor that resizes the shorter side to 64 and cuts 64 x 64 from the middle."""
    encoder = DualEncoder.from_pretrained(checkpoint)
    encoder.processor.image_processor = type(encoder.processor.image_processor)(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_center_crop=True
    )
    return encoder


@pytest.fixture
def photos(tmp_path: Path) -> Photos:
    return read_photos(write_coco(tmp_path, usual()), "instances.json")


def known(photos: Photos, area: float = 0.2) -> list[Known]:
    return [Known(photo, name, 1, area) for photo in photos.photos for name in photo.outlines]


def test_names_are_ranked_by_the_model_s_score(encoder: DualEncoder, photos: Photos):
    found = name_photos(encoder, photos, rank=5)
    captions = [CAPTION.format(name) for name in photos.names]
    expected = {}
    for photo in photos.photos:
        pairs = encoder.prepare(photo.picture(), captions)
        with torch.no_grad():
            order = encoder(*pairs.inputs, *pairs.additional_forward_args).argsort(descending=True).tolist()
        for name in photo.outlines:
            expected[photo.id, name] = order.index(photos.names.index(name)) + 1
    assert {(one.photo.id, one.name): one.rank for one in found} == expected
    assert len({one.rank for one in found}) > 1


def test_areas_are_those_the_model_sees_and_only_of_what_is_known(encoder: DualEncoder, photos: Photos):
    everything = name_photos(encoder, photos, rank=5)
    # Of the 64 x 64 that the model sees of 96 x 64, the box covers 32 x 24.
    assert {one.area for one in everything if one.name != "star"} == {32 * 24 / 64**2}
    few = name_photos(encoder, photos, rank=2)
    assert [np.isnan(one.area) for one in few] == [one.rank > 2 for one in few]


def test_a_mask_is_cut_and_resized_with_its_picture(encoder: DualEncoder, photos: Photos):
    probe = PhotoProbe(photos.photos[1], "cross", "star")
    assert probe.photo.id == 3 and set(probe.photo.outlines) == {"cross", "star"}
    shown = probe.show()
    assert (shown.caption, shown.other_caption) == ("a photo of a cross", "a photo of a star")
    truth = truth_of(encoder, shown.region, shown.caption, (64, 64))[0]
    expected = torch.zeros(64, 64, dtype=torch.bool)
    # The middle 80 columns of 120 are seen at 4 / 5 of their size.
    expected[16:48, 16:40] = True
    assert torch.equal(truth, expected)
    pixels = encoder.prepare(shown.picture, shown.caption).inputs[0][0]
    coloured = (pixels - pixels[:, :1, :1]).abs().amax(0) > 0.5 * (pixels[:, 32, 28] - pixels[:, 0, 0]).abs().amax()
    assert torch.equal(coloured, expected)
    other = truth_of(encoder, shown.other_region, "star", (64, 64))[0]
    assert not bool((other & truth).any()) and bool(other[:, 50].any())


def test_what_covers_too_little_or_too_much_is_not_asked(photos: Photos):
    assert len(photo_probes(known(photos))) == 7
    for area in (AREAS[0] / 2, 1.1 * AREAS[1], float("nan")):
        assert photo_probes(known(photos, area)) == []


def test_the_other_caption_names_what_else_is_there(photos: Photos):
    found = {(probe.photo.id, probe.name): probe.other for probe in photo_probes(known(photos))}
    assert found[3, "cross"] == "star" and found[3, "star"] == "cross"
    assert {other for (number, _), other in found.items() if number not in (3, 9)} == {None}


def test_a_mosaic_holds_the_named_thing_in_its_cell_alone(photos: Photos):
    found = mosaics(known(photos), seed=1)
    assert len(found) == 7 and len({one.cell for one in found}) > 1
    for one in found:
        assert len({photo.id for photo in one.photos}) == 4
        assert [place for place, photo in enumerate(one.photos) if one.name in photo.outlines] == [one.cell]
        if one.other is not None:
            assert one.other_cell != one.cell
            assert [place for place, photo in enumerate(one.photos) if one.other in photo.outlines] == [one.other_cell]
    assert any(one.other is not None for one in found)
    assert found == mosaics(known(photos), seed=1) != mosaics(known(photos), seed=2)


def test_without_three_other_pictures_there_is_no_mosaic(tmp_path: Path):
    same = read_photos(
        write_coco(tmp_path, [annotation(number, 1, polygon(BOX)) for number in range(1, 9)]), "instances.json"
    )
    assert len(same.photos) == 4 and mosaics(known(same)) == []


def test_a_mosaic_shows_each_picture_s_middle_in_its_quarter(tmp_path: Path):
    folder = write_coco(tmp_path, [annotation(number, 1 if number == 1 else 2, None) for number in (1, 3, 5, 7)])
    colours = {1: (255, 0, 0), 3: (0, 255, 0), 5: (0, 0, 255), 7: (255, 255, 0)}
    for number, colour in colours.items():
        picture = np.zeros((80, 120, 3), dtype=np.uint8)
        picture[:, 20:100] = colour
        Image.fromarray(picture).save(folder / "images" / f"{number:012d}.png")
    one = mosaics(known(read_photos(folder, "instances.json"), float("nan")))[0]
    shown = one.show()
    whole, region = np.asarray(shown.picture), np.asarray(shown.region)[..., 0] > 0
    assert whole.shape == (SIDE, SIDE, 3) and region.mean() == 0.25
    half = SIDE // 2
    for place, photo in enumerate(one.photos):
        row, column = place // 2 * half, place % 2 * half
        cell: Any = (slice(row, row + half), slice(column, column + half))
        assert (whole[cell] == colours[photo.id]).all()
        assert region[cell].all() == region[cell].any() == (place == one.cell)
    # Everything else is in three pictures.
    assert one.name == "circle" and one.other is None and shown.other_caption is None


def test_without_masks_only_mosaics_are_asked(encoder: DualEncoder, tmp_path: Path):
    bare = [annotation(number, 1 + number % 3 % 2, None) for number in range(1, 11)]
    named = name_photos(encoder, read_photos(write_coco(tmp_path, bare), "instances.json"), rank=5)
    assert all(np.isnan(one.area) for one in named)
    assert photo_probes(named) == []


def test_the_mask_is_where_it_was_drawn(photos: Photos):
    np.testing.assert_array_equal(photos.photos[0].mask("circle"), mask_of(BOX))
