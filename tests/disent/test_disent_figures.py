"""Figures: they draw what the explanation says, whatever the names, sizes and numbers of halves."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from disent_models import CLASSES, SIDE, TinyViT, batches, planted

from captum_m2ib import PatchLayout
from captum_m2ib.disent import InfoDisent, class_figure, explain_class, find_prototypes, local_figure

IMAGES, LABELS = planted(24, seed=6)
PICTURES = [np.full((SIDE, SIDE, 3), 10 * index, np.uint8) for index in range(24)]


def texts(figure) -> list[str]:
    figure.canvas.draw()
    found = []
    for axes in figure.axes:
        found += [text.get_text() for text in axes.texts]
        found += [label.get_text() for label in axes.get_yticklabels()]
    return found


@pytest.mark.parametrize(("n_halves", "contrast"), [(1, True), (4, False), (7, True)])
def test_local_figure_shows_the_halves_and_all_of_the_logit(fitted, n_halves, contrast):
    found = fitted.contributions(IMAGES[:1], contrast=contrast)
    halves = found.top(n_halves)[0]
    figure = local_figure(fitted, IMAGES[:1], PICTURES[0], n_halves=n_halves, contrast=contrast)
    written = " | ".join(texts(figure))
    for half in halves:
        assert f"channel {half.channel} {'positive' if half.sign > 0 else 'negative'}" in written
        assert f"{half.contribution:+.2f}".replace("-", "−") in written
    explained = found.logits.max() - (found.logits.mean() if contrast else 0)
    assert f"{float(explained):.2f}" in written and fitted.name_of(int(found.target[0])) in written
    bars = next(axes for axes in figure.axes if axes.get_xlabel() == "contribution")
    total = sum(patch.get_width() for patch in bars.patches)
    assert total == pytest.approx(float(explained), abs=1e-4)
    # The picture, the bars, a map and a place per half, and the page itself.
    assert len(figure.axes) == 3 + 2 * len(halves)


def test_everything_lies_inside_the_page(fitted):
    prototypes = find_prototypes(fitted, batches(IMAGES), per_half=6)
    page = explain_class(fitted, batches(IMAGES, LABELS), 0, prototypes, n_halves=2)
    for figure in (
        local_figure(fitted, IMAGES[:1], PICTURES[0], n_halves=6),
        class_figure(fitted, page, prototypes, PICTURES),
    ):
        figure.canvas.draw()
        width, height = figure.canvas.get_width_height()
        for axes in figure.axes:
            box = axes.get_tightbbox()
            assert box.x0 >= -2 and box.y0 >= -2 and box.x1 <= width + 2 and box.y1 <= height + 2


def test_boxes_are_at_the_strongest_cells(fitted):
    picture = np.zeros((4 * SIDE, 6 * SIDE, 3), np.uint8)
    figure = local_figure(fitted, IMAGES[3:4], picture, n_halves=1)
    (half,) = fitted.contributions(IMAGES[3:4]).top(1)[0]
    axes = next(axes for axes in figure.axes if axes.patches and axes.images)
    shown = axes.images[0].get_array().shape
    box = axes.patches[0]
    assert box.get_x() == pytest.approx(half.cell[1] * shown[1] / 4, abs=1)
    assert box.get_y() == pytest.approx(half.cell[0] * shown[0] / 4, abs=1)
    assert box.get_width() == pytest.approx(shown[1] / 4, abs=1)


def test_class_figure_tells_who_shares(fitted):
    prototypes = find_prototypes(fitted, batches(IMAGES), per_half=3)
    page = explain_class(fitted, batches(IMAGES, LABELS), 2, prototypes, n_halves=6)
    written = texts(class_figure(fitted, page, prototypes, PICTURES))
    # A name with signs that mathematics would swallow is written as it is.
    assert "$slash_1" in written
    for half in page.halves:
        shared = ", ".join(fitted.name_of(other) for other in half.shared_with)
        assert (f"shared with {shared}" if shared else "of this class alone") in written


def test_names_in_other_scripts_draw_without_a_warning():
    model = InfoDisent(TinyViT(1), "block", CLASSES, channels=6, class_names=["猫", "كلب", "x" * 300])
    for target in range(CLASSES):
        local_figure(model, IMAGES[:1], PICTURES[0], target).canvas.draw()


def test_heat_lies_on_the_patches_and_not_on_their_margin():
    model = InfoDisent(TinyViT(1), "block", CLASSES, channels=6, layout=PatchLayout((2, 2), 1))
    figure = local_figure(model, torch.randn(1, 1, 11, 9), np.zeros((110, 90, 3), np.uint8), n_halves=2)
    figure.canvas.draw()


def test_evidence_of_nothing_still_draws(fitted):
    model = InfoDisent(TinyViT(1), "block", CLASSES, channels=6)
    with torch.no_grad():
        model.head.raw_weight.fill_(-200)
    local_figure(model, IMAGES[:1], PICTURES[0]).canvas.draw()


def test_pyplot_is_left_alone(fitted):
    sys.modules.pop("matplotlib.pyplot", None)
    local_figure(fitted, IMAGES[:1], PICTURES[0]).canvas.draw()
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: local_figure(model, IMAGES, PICTURES[0]), r"^image: expected a single picture"),
        (lambda model: local_figure(model, IMAGES[:1], PICTURES[0][..., 0]), r"^picture: expected uint8"),
        (lambda model: local_figure(model, IMAGES[:1], PICTURES[0] / 255), r"^picture: expected uint8"),
        (lambda model: local_figure(model, IMAGES[:1], PICTURES[0], n_halves=0), r"^n_halves: expected"),
    ],
)
def test_bad_input_is_named(fitted, call, message):
    with pytest.raises(ValueError, match=message):
        call(fitted)
