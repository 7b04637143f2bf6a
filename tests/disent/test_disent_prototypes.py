"""Prototypes and pages of classes, against a search written out in loops."""

from __future__ import annotations

import pytest
import torch
from disent_models import CLASSES, TinyCNN, batches, planted

from captum_m2ib.disent import FeatureSet, InfoDisent, explain_class, find_prototypes, purity
from captum_m2ib.disent import prototypes as room

IMAGES, LABELS = planted(60, seed=3)


@pytest.mark.parametrize("rank_by", ["max", "sum"])
@pytest.mark.parametrize("part", [7, 256])
def test_against_a_search_in_loops(fitted, rank_by, part, monkeypatch):
    monkeypatch.setattr(room, "_BATCH", part)
    found = find_prototypes(fitted, batches(IMAGES), per_half=4, rank_by=rank_by)
    maps = fitted.head.maps(fitted.features(IMAGES)).detach()
    pure = purity(maps)
    for channel in range(6):
        for side, sign in enumerate((1, -1)):
            half = (sign * maps[:, channel]).clamp(min=0)
            strength = half.amax((1, 2)) if rank_by == "max" else half.sum((1, 2))
            order = strength.argsort(descending=True, stable=True)[:4].tolist()
            listed = found.of(channel, sign)
            assert [one.image for one in listed] == [image for image in order if strength[image] > 0]
            for one in listed:
                assert one.value == pytest.approx(float(strength[one.image]), rel=1e-5)
                assert one.purity == pytest.approx(float(pure[one.image, channel, side]), rel=1e-5)
                assert half[one.image][one.cell] == half[one.image].max()
    assert found.grid == (4, 4) and found.size == (8, 8)
    listed = {sign: [one.purity for c in range(6) for one in found.of(c, sign)] for sign in (1, -1)}
    for sign, values in listed.items():
        assert found.mean_purity(sign) == pytest.approx(sum(values) / len(values))
    assert found.mean_purity() == pytest.approx(sum(listed[1] + listed[-1]) / len(listed[1] + listed[-1]))


def test_a_repeated_picture_takes_one_place(fitted):
    twice = torch.cat([IMAGES, IMAGES.flip(0)])
    found, once = (find_prototypes(fitted, batches(images), per_half=8) for images in (twice, IMAGES))
    assert torch.equal(found.images, once.images)
    ids = torch.arange(60) % 10
    named = find_prototypes(fitted, [(IMAGES, LABELS, ids)], per_half=20)
    for channel in range(6):
        chosen = [one.image for one in named.of(channel, 1)]
        assert len({image % 10 for image in chosen}) == len(chosen) <= 10


def test_halves_that_no_picture_has_are_empty():
    model = InfoDisent(TinyCNN(), "body", CLASSES, channels=6, transform="none", standardise="none")
    positive = FeatureSet(torch.rand(5, 6, 2, 2, generator=torch.Generator().manual_seed(0)))
    found = find_prototypes(model, positive, per_half=3)
    assert found.of(2, -1) == [] and len(found.of(2, 1)) == 3
    assert bool((found.images[:, 1] == -1).all())


def test_a_class_rests_on_what_its_pictures_contribute(fitted):
    features = fitted.collect(batches(IMAGES, LABELS))
    prototypes = find_prototypes(fitted, features)
    page = explain_class(fitted, features, 1, prototypes, n_halves=3)
    assert (page.index, page.name) == (1, "pole")
    parts = fitted.contributions(IMAGES[LABELS == 1], 1)
    means = torch.stack([parts.positive.mean(0), parts.negative.mean(0)], -1)
    order = means.abs().flatten().argsort(descending=True)[:3]
    for half, position in zip(page.halves, order.tolist(), strict=True):
        channel, side = divmod(position, 2)
        assert (half.channel, half.sign) == (channel, 1 - 2 * side)
        assert half.mean_contribution == pytest.approx(float(means[channel, side]), rel=1e-4)
        assert half.weight == pytest.approx(float(fitted.head.class_weight[1, channel].detach()), rel=1e-5)
        assert list(half.prototypes) == prototypes.of(half.channel, half.sign)
    assert page.share == pytest.approx(float(means.abs().flatten()[order].sum() / means.abs().sum()), rel=1e-4)
    for half in page.halves:
        for other in range(3):
            listed = [(h.channel, h.sign) for h in explain_class(fitted, features, other, prototypes, 3).halves]
            assert (other in half.shared_with) == (other != 1 and (half.channel, half.sign) in listed)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: find_prototypes(model, batches(IMAGES), per_half=0), "^per_half: expected a whole number"),
        (lambda model: find_prototypes(model, batches(IMAGES), rank_by="mean"), "^rank_by: expected one of max, sum"),
        (lambda model: find_prototypes(model, []), "^loader: expected at least one batch"),
        (
            lambda model: explain_class(model, batches(IMAGES, LABELS), 3, find_prototypes(model, batches(IMAGES))),
            "^index: expected a class from 0 to 2, got 3",
        ),
        (
            lambda model: explain_class(model, batches(IMAGES, LABELS * 0), 1, find_prototypes(model, batches(IMAGES))),
            "^index: expected a class that occurs",
        ),
        (
            lambda model: explain_class(model, batches(IMAGES), 0, find_prototypes(model, batches(IMAGES))),
            "^labels: expected one per example",
        ),
        (lambda model: find_prototypes(model, batches(IMAGES)).of(0, 0), "^sign: expected 1 or -1"),
    ],
)
def test_bad_input_is_named(fitted, call, message):
    with pytest.raises(ValueError, match=message):
        call(fitted)
