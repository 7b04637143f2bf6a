"""Drawing: the same seed gives the same scene, at any size, and masks say exactly what is visible."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from captum_m2ib.scenes import (
    COLOURS,
    GROUNDS,
    SHAPES,
    draw_batch,
    draw_scene,
    image_probes,
    naming_trials,
    token_probes,
)
from captum_m2ib.scenes.drawing import (
    OBJECT_COUNTS,
    PURPOSES,
    RADIUS,
    VISIBLE_SHARE,
    Layouts,
    draw_scenes,
    generator,
    render,
    sample_layouts,
    visible_masks,
)


def layouts(n: int = 200, seed: int = 0) -> Layouts:
    return sample_layouts(generator("scenes", seed), n)


def whole_masks(given: Layouts, slot: int, size: int) -> np.ndarray:
    """Masks of the objects in one slot as if nothing lay over them: (n, size, size)."""
    count = np.minimum(given.count, slot + 1)
    return visible_masks(dataclasses.replace(given, count=count), size)[:, slot]


def test_same_seed_same_scene() -> None:
    first, again, other = draw_scene(3), draw_scene(3), draw_scene(4)
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(first.masks, again.masks)
    assert (first.caption, first.objects) == (again.caption, again.objects)
    assert not np.array_equal(first.image, other.image)


def test_batch_is_deterministic_and_a_batch_of_one_is_the_scene() -> None:
    images, captions, _ = draw_batch(5, 7)
    again, captions_again, _ = draw_batch(5, 7)
    assert images.shape == (5, 64, 64, 3) and images.dtype == np.uint8
    assert np.array_equal(images, again) and captions == captions_again
    image, caption, _ = draw_batch(1, 7)
    scene = draw_scene(7)
    assert np.array_equal(image[0], scene.image) and caption == [scene.caption]


def test_purposes_and_indices_have_streams_of_their_own() -> None:
    pixels = {draw_scene(0, 16, purpose=purpose, index=i).image.tobytes() for purpose in PURPOSES for i in range(3)}
    assert len(pixels) == 3 * len(PURPOSES)


def test_scene_fields_agree() -> None:
    scenes = draw_scenes(generator("scenes", 1), 100, 48)
    for scene in scenes:
        k = len(scene.objects)
        assert 1 <= k <= 4
        assert scene.image.shape == (48, 48, 3) and scene.image.dtype == np.uint8
        assert scene.masks.shape == (k, 48, 48) and scene.masks.dtype == bool
        assert tuple(scene.caption.split()) == scene.words
        assert len({(thing.shape, thing.colour) for thing in scene.objects}) == k
        for thing in scene.objects:
            assert thing.shape in SHAPES and thing.colour in COLOURS
            assert RADIUS[0] <= thing.radius <= RADIUS[1]
            assert thing.radius < thing.x < 1 - thing.radius and thing.radius < thing.y < 1 - thing.radius


@pytest.mark.parametrize("size", [64, 160])
def test_masks_are_disjoint_and_enough_is_visible(size: int) -> None:
    given = layouts(400 if size == 64 else 100)
    masks = visible_masks(given, size)
    assert masks.sum(axis=1).max() == 1
    for slot in range(4):
        present = given.count > slot
        whole = whole_masks(given, slot, size)[present].sum(axis=(1, 2))
        assert (masks[present, slot].sum(axis=(1, 2)) >= VISIBLE_SHARE * whole).all()
        assert not masks[~present, slot].any()
    assert not masks[..., [0, -1], :].any() and not masks[..., [0, -1]].any()


@pytest.mark.parametrize("slot", range(4))
def test_mask_is_where_paint_covers_at_least_half_of_what_lies_below(slot: int) -> None:
    size, given = 96, layouts(60)
    below = dataclasses.replace(given, count=np.minimum(given.count, slot))
    black = dataclasses.replace(given, count=np.minimum(given.count, slot + 1), rgb=np.zeros_like(given.rgb))
    black.rgb[:, :slot] = given.rgb[:, :slot]
    present = given.count > slot
    # Black paint leaves (1 - opacity) of what was there.
    left = render(black, size)[present].astype(float).sum(axis=-1)
    there = render(below, size)[present].astype(float).sum(axis=-1)
    mask = whole_masks(given, slot, size)[present]
    rounding = 3
    assert (left[mask] <= there[mask] / 2 + rounding).all()
    assert (left[~mask] >= there[~mask] / 2 - rounding).all()


def test_visible_is_whole_less_what_later_objects_cover() -> None:
    given = layouts(100)
    masks = visible_masks(given, 64)
    whole = np.stack([whole_masks(given, slot, 64) for slot in range(4)], axis=1)
    for slot in range(4):
        assert np.array_equal(masks[:, slot], whole[:, slot] & ~whole[:, slot + 1 :].any(axis=1))


def test_recolouring_an_object_changes_its_mask_and_nothing_far_from_it() -> None:
    size, reach, given = 64, 4, layouts(100)
    before, masks = render(given, size), visible_masks(given, size)
    for slot in range(4):
        rgb = given.rgb.copy()
        rgb[:, slot] = np.where(rgb[:, slot] > 127, 0, 255)
        changed = (render(dataclasses.replace(given, rgb=rgb), size) != before).any(axis=-1)
        mask = masks[:, slot]
        window = range(2 * reach + 1)
        grown = np.pad(whole_masks(given, slot, size), ((0, 0), (reach, reach), (reach, reach)))
        near = np.any([grown[:, i : i + size, j : j + size] for i in window for j in window], axis=0)
        assert changed[mask].all()
        assert not changed[~near].any()


def test_same_scene_at_any_size() -> None:
    for seed in range(20):
        small, large = draw_scene(seed, 64), draw_scene(seed, 256)
        assert (small.caption, small.objects) == (large.caption, large.objects)
        k = len(small.objects)
        shares = large.masks.reshape(k, 64, 4, 64, 4).mean(axis=(2, 4))
        # Away from the outline a coarse pixel is wholly in or out in the fine picture.
        assert small.masks[shares == 1].all()
        assert not small.masks[shares == 0].any()
        assert np.abs(small.masks.sum(axis=(1, 2)) - shares.sum(axis=(1, 2))).max() < 12
        averaged = large.image.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
        assert np.abs(averaged - small.image).mean() < 2.5


def test_shapes_differ_under_any_rotation() -> None:
    given = layouts(1)
    n = len(SHAPES)
    fixed = {
        "count": np.ones(n, dtype=int),
        "shape": np.tile(np.arange(n)[:, None], (1, 4)),
        "x": np.full((n, 4), 0.5, np.float32),
        "y": np.full((n, 4), 0.5, np.float32),
        "radius": np.full((n, 4), 0.2, np.float32),
    }
    rest = {f.name: np.repeat(getattr(given, f.name), n, axis=0) for f in dataclasses.fields(Layouts)}
    still = dataclasses.replace(given, **{**rest, **fixed, "angle": np.zeros((n, 4), np.float32)})
    upright = visible_masks(still, 64)[:, 0]
    for angle in np.arange(0, 360, 6):
        turned_layouts = dataclasses.replace(still, angle=np.full((n, 4), np.deg2rad(angle), np.float32))
        turned = visible_masks(turned_layouts, 64)[:, 0]
        both = (upright[:, None] & turned[None]).sum(axis=(2, 3))
        either = (upright[:, None] | turned[None]).sum(axis=(2, 3))
        overlap = both / either
        np.fill_diagonal(overlap, 0)
        assert overlap.max() < 0.86


def test_colours_differ_more_between_names_than_within() -> None:
    given = layouts(600)
    present = np.arange(4) < given.count[:, None]
    rgb, names = given.rgb[present], given.colour[present]
    centres = np.stack([rgb[names == index].mean(axis=0) for index in range(len(COLOURS))])
    nearest = np.linalg.norm(rgb[:, None] - centres, axis=-1).argmin(axis=1)
    assert (nearest == names).all()


def test_object_counts_follow_the_distribution() -> None:
    count = sample_layouts(generator("scenes", 2), 3000).count
    assert sum(OBJECT_COUNTS.values()) == pytest.approx(1)
    for k, share in OBJECT_COUNTS.items():
        assert (count == k).mean() == pytest.approx(share, abs=0.03)


def test_kinds_are_what_each_scene_contains() -> None:
    kinds = draw_batch(1, 7).kinds[0]
    named = {(thing.shape, thing.colour) for thing in draw_scene(7).objects}
    assert {(SHAPES[k // len(COLOURS)], COLOURS[k % len(COLOURS)]) for k in np.flatnonzero(kinds)} == named
    assert kinds.shape == (len(SHAPES) * len(COLOURS),)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_scene(0, 8), r"size: expected 16 pixels or more, got 8"),
        (lambda: draw_scene(-1), r"seed: expected an integer of 0 or more, got -1"),
        (lambda: draw_batch(0, 0), r"n: expected 1 scene or more, got 0"),
        (lambda: draw_batch(1, 0, purpose="other"), r"purpose: expected one of .* got 'other'"),
        (lambda: draw_scene(0, counts={5: 1.0}), r"counts: expected probabilities .* got \{5: 1.0\}"),
    ],
)
def test_bad_arguments_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_import_is_light() -> None:
    code = """
import sys
import captum_m2ib
before = set(sys.modules)
import captum_m2ib.scenes
heavy = {"transformers", "tokenizers", "safetensors", "PIL", "matplotlib.pyplot", "tqdm.notebook"}
assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("ground", GROUNDS)
def test_only_the_ground_of_a_scene_depends_on_the_ground(ground: str) -> None:
    scene, textured = draw_scene(5, ground=ground), draw_scene(5)
    assert (scene.caption, scene.objects) == (textured.caption, textured.objects)
    assert np.array_equal(scene.masks, textured.masks)
    # A pixel's rim mixes an object with what lies behind it.
    inside = scene.masks.any(0)
    for axis in (0, 1):
        inside &= np.roll(inside, 1, axis) & np.roll(inside, -1, axis)
    assert np.array_equal(scene.image[inside], textured.image[inside])
    for draw in (image_probes, token_probes, naming_trials):
        probe, usual = draw(1, 3, 32, ground)[0], draw(1, 3, 32)[0]
        assert probe.scene.caption == usual.scene.caption
        assert np.array_equal(probe.image, usual.image) == (ground == "textured")


@pytest.mark.parametrize(("ground", "level"), [("white", 255), ("black", 0), ("grey", 128)])
def test_a_plain_ground_has_one_level(ground: str, level: int) -> None:
    scene = draw_scene(5, ground=ground)
    assert (scene.image[~scene.masks.any(0)] == level).all(-1).mean() > 0.9


def test_plain_grounds_are_white_black_and_grey_in_turn() -> None:
    images = draw_batch(300, 1, 16, ground="plain").images
    corners = images[:, 0, 0].astype(int)
    shares = [(corners == level).all(-1).mean() for level in (255, 0, 128)]
    assert min(shares) > 0.25 and sum(shares) > 0.95


def test_an_unknown_ground_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^ground: expected one of textured, .*got 'lawn'"):
        draw_scene(0, ground="lawn")
