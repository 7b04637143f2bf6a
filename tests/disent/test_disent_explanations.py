"""Explanations: contributions that sum to the logit, maps in the input's shape, purity by hand."""

from __future__ import annotations

import pytest
import torch
from captum.attr import Attribution, NoiseTunnel
from disent_models import CLASSES, SIDE, TinyCNN, TinyViT, batches, planted

from captum_m2ib import PatchLayout
from captum_m2ib.disent import InfoDisent, InfoDisentAttribution, contributions, heatmaps, purity
from captum_m2ib.disent._grid import cell_box, spread
from captum_m2ib.disent.head import HeadOptions, InfoDisentHead

IMAGES, LABELS = planted(30, seed=4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight", ["softplus", "signed"])
@pytest.mark.parametrize("pooling", ["max", "top_k", "mean"])
def test_contributions_sum_to_the_logit(pooling, weight, bias):
    head = InfoDisentHead(8, 4, HeadOptions(pooling=pooling, weight=weight, bias=bias))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    features = 3 * torch.randn(5, 8, 4, 3, generator=torch.Generator().manual_seed(1))
    logits = head.eval()(features).detach()
    for target in range(4):
        found = contributions(head, features, target)
        expected = logits[:, target]
        torch.testing.assert_close(
            (found.positive + found.negative).sum(1) + found.bias, expected, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(found.cells.sum((1, 2)) + found.bias, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found.spread.sum((1, 2)) + found.bias, expected, atol=1e-5, rtol=1e-5)
        if weight == "softplus":
            assert float(found.positive.min()) >= 0 >= float(found.negative.max())


def by_hand() -> InfoDisentHead:
    """Two channels, two classes, the identity as transform and W = [[1, 2], [0.5, 0]]."""
    head = InfoDisentHead(2, 2, HeadOptions(transform="none", weight="signed", standardise="none"))
    with torch.no_grad():
        head.raw_weight.copy_(torch.tensor([[1.0, 2.0], [0.5, 0.0]]))
    return head.eval()


FEATURES = torch.tensor([[[[3.0, -1.0], [0.0, 1.0]], [[0.0, 2.0], [-4.0, 2.0]]]])


def test_contributions_by_hand():
    found = contributions(by_hand(), FEATURES, 0)
    # p = (3, 2), n = (1, 4): logit 0 is 1 (3 - 1) + 2 (2 - 4).
    assert found.logits.tolist() == [[-2.0, 1.0]]
    assert found.positive.tolist() == [[3.0, 4.0]] and found.negative.tolist() == [[-1.0, -8.0]]
    assert found.cells.tolist() == [[[3.0, 3.0], [-8.0, 0.0]]]
    # Channel 0's 3 is shared 3 : 1 between two cells, channel 1's 4 equally.
    assert found.spread.tolist() == [[[2.25, 1.0], [-8.0, 2.75]]]
    assert [tuple(half) for half in found.top(3)[0]] == [
        (1, -1, -8.0, (1, 0)),
        (1, 1, 4.0, (0, 1)),
        (0, 1, 3.0, (0, 0)),
    ]
    assert contributions(by_hand(), FEATURES).target.tolist() == [1]
    assert len(contributions(by_hand(), FEATURES, 1).top(9)[0]) == 2


@pytest.mark.parametrize(("share", "count"), [(0.5, 1), (0.75, 2), (0.9, 3), (1.0, 4), (0.01, 1)])
def test_how_few_halves_hold_a_share(share, count):
    assert contributions(by_hand(), FEATURES, 0).halves_holding(share).tolist() == [count]


def test_nothing_holds_nothing():
    assert contributions(by_hand(), FEATURES * 0, 0).halves_holding().tolist() == [0]
    assert contributions(by_hand(), FEATURES * 0, 0).top(3) == [[]]
    with pytest.raises(ValueError, match=r"^share: expected"):
        contributions(by_hand(), FEATURES).halves_holding(0)


def test_heatmaps_are_the_rectified_channel():
    found = contributions(by_hand(), FEATURES, 0)
    maps = heatmaps(found.maps, found.top(2))
    assert maps[0].tolist() == [[[0.0, 0.0], [4.0, 0.0]], [[0.0, 2.0], [0.0, 2.0]]]
    assert heatmaps(found.maps, [[]])[0].shape == (0, 2, 2)


def test_purity_by_hand():
    found = purity(FEATURES)
    # Channel 0: 3 against (3, 0); -1 against (-1, 2). Channel 1: 2 against (-1, 2); -4 against (0, -4).
    expected = torch.tensor([[[1.0, 1 / 5**0.5], [2 / 5**0.5, 1.0]]])
    torch.testing.assert_close(found, expected)
    assert purity(FEATURES * 0).tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("target", [None, 1, "each"])
def test_attributions_have_the_inputs_shape_and_sum_to_the_logit(fitted, exact, interpolation, target):
    chosen = LABELS if target == "each" else target
    found = InfoDisentAttribution(fitted).attribute(IMAGES, target=chosen, exact=exact, interpolation=interpolation)
    logits = fitted(IMAGES).detach()
    expected = logits.max(1).values if target is None else logits[torch.arange(30), LABELS if target == "each" else 1]
    assert found.shape == IMAGES.shape and found.is_contiguous() and not found.requires_grad
    torch.testing.assert_close(found.sum((1, 2, 3)), expected, atol=1e-5, rtol=1e-5)


def test_contrast_explains_the_margin_over_the_mean_logit(fitted):
    logits = fitted(IMAGES).detach()
    found = InfoDisentAttribution(fitted).attribute(IMAGES, target=1, contrast=True)
    torch.testing.assert_close(found.sum((1, 2, 3)), logits[:, 1] - logits.mean(1), atol=1e-5, rtol=1e-5)
    parts = [fitted.contributions(IMAGES, target, contrast=True) for target in range(CLASSES)]
    torch.testing.assert_close(sum(part.positive for part in parts), torch.zeros(30, 6), atol=1e-5, rtol=0)


def test_exact_map_fills_the_cells_it_came_from(fitted):
    found = InfoDisentAttribution(fitted).attribute(IMAGES, target=0)
    cells = fitted.contributions(IMAGES, 0).cells
    torch.testing.assert_close(found[:, 0], cells.repeat_interleave(2, 1).repeat_interleave(2, 2) / 4)


def test_maps_point_at_the_planted_pattern(fitted):
    found = InfoDisentAttribution(fitted).attribute(IMAGES, target=LABELS)
    strongest = found.abs().flatten(1).argmax(1)
    bright = IMAGES.flatten(2).squeeze(1).argmax(1)
    same_row = strongest // SIDE // 2 == bright // SIDE // 2
    same_column = strongest % SIDE // 2 == bright % SIDE // 2
    assert float((same_row & same_column).float().mean()) > 0.9


def test_examples_are_independent_and_the_call_is_captums(fitted):
    method = InfoDisentAttribution(fitted)
    assert isinstance(method, Attribution) and not method.has_convergence_delta()
    together = method.attribute(IMAGES, target=2)
    alone = torch.cat([method.attribute(IMAGES[i : i + 1], target=2) for i in range(len(IMAGES))])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)
    (inside,) = method.attribute((IMAGES,), target=2)
    assert torch.equal(inside, together)
    with torch.inference_mode():
        assert torch.equal(method.attribute(IMAGES, target=2), together)
    smooth = NoiseTunnel(method).attribute(IMAGES, nt_samples=2, stdevs=1e-6, target=2)
    assert smooth.shape == IMAGES.shape
    with pytest.raises(NotImplementedError):
        method.attribute_future()


def test_training_mode_explains_as_in_prediction(fitted):
    expected = fitted.contributions(IMAGES)
    fitted.train()
    try:
        assert torch.equal(fitted.contributions(IMAGES).positive, expected.positive)
    finally:
        fitted.eval()


def test_patches_that_do_not_divide_the_picture_leave_a_margin():
    backbone = TinyViT(1)
    model = InfoDisent(backbone, "block", CLASSES, channels=6, layout=PatchLayout((2, 2), 1))
    images = torch.randn(2, 1, 7, 9, generator=torch.Generator().manual_seed(0))
    found = InfoDisentAttribution(model).attribute(images, target=0)
    assert found[:, :, 6:].abs().sum() == 0 and found[:, :, :, 8:].abs().sum() == 0
    torch.testing.assert_close(found.sum((1, 2, 3)), model(images)[:, 0].detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_spreading_keeps_both_signs_sums(interpolation):
    grid = torch.randn(3, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fine = spread(grid, (11, 17), None, interpolation)
    torch.testing.assert_close(fine.sum((1, 2)), grid.sum((1, 2)))
    if interpolation == "nearest":
        torch.testing.assert_close(fine.clamp(min=0).sum((1, 2)), grid.clamp(min=0).sum((1, 2)))


@pytest.mark.parametrize(
    ("cell", "context", "box"),
    [((0, 0), 0, (0, 0, 2, 2)), ((3, 1), 0, (6, 2, 8, 4)), ((3, 1), 1, (4, 0, 8, 6)), ((1, 1), 9, (0, 0, 8, 8))],
)
def test_boxes_of_cells(cell, context, box):
    assert cell_box(cell, (4, 4), (8, 8), None, context) == box
    assert cell_box(cell, (4, 4), (9, 9), (2, 2), context) == box


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda method: method.attribute(IMAGES, target=3), ValueError, "^target: expected classes from 0 to 2, got"),
        (lambda method: method.attribute(IMAGES, target=-1), ValueError, "^target: expected classes from 0 to 2"),
        (lambda method: method.attribute(IMAGES, target=[0, 1]), ValueError, r"^target: .* one per example \(30\)"),
        (lambda method: method.attribute(IMAGES, target="cat"), ValueError, "^target: expected a class"),
        (lambda method: method.attribute(IMAGES, target=0.5), ValueError, "^target: expected a class"),
        (lambda method: method.attribute((IMAGES, IMAGES)), ValueError, "^inputs: expected one batch of pictures"),
        (lambda method: method.attribute(IMAGES, interpolation="cubic"), ValueError, "^interpolation: expected one of"),
        (lambda method: InfoDisentAttribution(TinyCNN()), TypeError, "^forward_func: expected an InfoDisent or EPIC"),
        (
            lambda method: InfoDisentAttribution(InfoDisent(TinyCNN(), "body", 3)).attribute(IMAGES),
            RuntimeError,
            "^head: not built",
        ),
    ],
)
def test_bad_input_is_named(fitted, call, error, message):
    with pytest.raises(error, match=message):
        call(InfoDisentAttribution(fitted))


def test_predict_equals_forward_in_parts(fitted):
    images, labels = planted(300, seed=9)
    torch.testing.assert_close(fitted.predict(batches(images, labels)), fitted(images).detach(), atol=1e-5, rtol=1e-5)
    evidence = fitted.evidence(batches(images))
    assert evidence.shape == (300, 6, 2) and float(evidence.min()) >= 0
