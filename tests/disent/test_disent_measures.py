"""Measures: closed forms, and Captum's own Grad-CAM."""

from __future__ import annotations

import math

import pytest
import torch
from captum.attr import LayerGradCam
from disent_models import TinyCNN, planted
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_m2ib.disent.measures import (
    attribute_information,
    entropy,
    grad_cam,
    mutual_information,
    perturbation_curves,
)


def test_a_copy_carries_the_entropy_and_a_constant_nothing():
    attribute = torch.arange(4000) % 4
    correction = 3 / (2 * 4000 * math.log(2))
    assert entropy(attribute) == pytest.approx(2.0)
    # A copy occupies 4 cells of 4 x 4, so that its correction is (4 - 4 - 4 + 1) / 2n, upwards.
    assert mutual_information(attribute * 2.5 + 1, attribute) == pytest.approx(2.0 + correction, rel=1e-9)
    assert mutual_information(torch.ones(4000), attribute) == 0.0
    halved = (attribute >= 2).float()
    assert mutual_information(halved, attribute) == pytest.approx(1.0 + 1 / (2 * 4000 * math.log(2)), rel=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 12))
def test_independent_values_carry_about_nothing(seed, classes):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3000, generator=generator)
    attribute = torch.randint(0, classes, (3000,), generator=generator)
    # Without the correction 8 bins and 12 classes would show 77 / (6000 ln 2), or 0.019 bits.
    assert 0 <= mutual_information(values, attribute) < 0.012


def test_it_does_not_depend_on_the_scale_and_shares_bins_of_ties():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(500, generator=generator).clamp(min=0)
    attribute = (values + torch.randn(500, generator=generator) > 0.5).long()
    assert mutual_information(values, attribute) == mutual_information(values.exp() * 7, attribute) > 0.05


def test_information_and_gap_over_attributes():
    generator = torch.Generator().manual_seed(0)
    shape, colour = (torch.randint(0, 2, (2000,), generator=generator) for _ in "ab")
    # One half follows the shape exactly, one follows nothing, two never vary.
    evidence = torch.zeros(2000, 2, 2)
    evidence[:, 0, 0] = shape
    evidence[:, 1, 1] = torch.rand(2000, generator=generator)
    found = attribute_information(evidence, {"shape": shape, "colour": colour})
    assert found["information"] == pytest.approx(0.5, abs=0.01) and found["gap"] == pytest.approx(0.5, abs=0.01)
    assert attribute_information(evidence * 0, {"shape": shape}) == {"information": 0.0}


def test_grad_cam_is_captums():
    backbone, (images, labels) = TinyCNN(), planted(6)
    features = backbone.body(images).detach()
    expected = LayerGradCam(backbone, backbone.body).attribute(images, target=labels.tolist(), relu_attributions=True)
    ours = grad_cam(features, backbone.fc.weight.detach(), labels)
    torch.testing.assert_close(ours, expected.squeeze(1).detach(), atol=1e-6, rtol=1e-4)


def test_curves_by_hand():
    # The model's logit for class 1 is log of the brightness left, so that its probability is b / (1 + b).
    images = torch.zeros(1, 1, 4, 4)
    images[0, 0, :2, :2] = 12.0

    def classify(pictures):
        bright = (pictures - 3.0).clamp(min=0).sum((1, 2, 3)) / 36
        return torch.stack([torch.zeros(len(pictures)), bright.clamp(min=1e-9).log()], 1)

    grid = torch.tensor([[[5.0, 1.0], [2.0, 0.0]]])
    deletion, insertion = perturbation_curves(classify, images, grid, torch.tensor([1]), steps=4)
    # Deletion: 1/2 at the start, then 0; insertion: 0, then 1/2 from the first cell on; trapezia of width 1/4.
    assert deletion == pytest.approx(0.5 / 2 / 4, abs=1e-6)
    assert insertion == pytest.approx((0.25 + 3 * 0.5) / 4, abs=1e-6)
    worst = perturbation_curves(classify, images, -grid, torch.tensor([1]), steps=4)
    assert worst[0] > deletion and worst[1] < insertion


@pytest.mark.parametrize(("values", "attribute"), [(torch.ones(3), torch.ones(2)), (torch.ones(0), torch.ones(0))])
def test_rows_of_two_lengths_are_refused(values, attribute):
    with pytest.raises(ValueError, match=r"^values, attribute: expected two rows"):
        mutual_information(values, attribute.long())
