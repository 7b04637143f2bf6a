"""RISE against its expectation on linear scores, and mask by mask against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attr_oracles import clip_case
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from captum_m2ib import PatchLayout, TextLayout
from captum_m2ib.attr.rise import RISE, draw_masks


@pytest.mark.parametrize("probability", [0.3, 0.5, 0.8])
def test_expectation_on_a_linear_score(probability: float):
    torch.manual_seed(0)
    weight, inputs = torch.randn(6).double(), torch.randn(3, 6).double()
    terms = weight * inputs
    n_masks = 40_000
    found = RISE(lambda x: x @ weight).attribute(
        inputs, n_masks=n_masks, probability=probability, internal_batch_size=None
    )
    # E[sum_j w_j x_j m_j m_i] / p = w_i x_i + p * (all the other terms)
    expected = terms + probability * (terms.sum(1, keepdim=True) - terms)
    spread = terms.abs().sum(1).max() / probability / n_masks**0.5
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * float(spread))


def brute_force(score, hidden: Tensor, masks: Tensor, probability: float) -> Tensor:
    total = torch.zeros_like((hidden * masks[0])[:, :1] if hidden.ndim == 4 else hidden[..., 0])
    for mask in masks:
        for pair in range(len(hidden)):
            value = score(hidden[pair : pair + 1] * mask, pair)
            total[pair] += value * (mask if hidden.ndim == 4 else mask[:, 0])
    return total / len(masks) / probability


def test_pictures_mask_by_mask():
    case = clip_case()
    pixels, ids = case.inputs
    mask = case.additional[0]
    masks = torch.cat(list(draw_masks(np.random.default_rng((7, 0)), pixels, (2, 3), 12, 5, 0.4, 5)))

    @torch.no_grad()
    def score(picture: Tensor, pair: int) -> Tensor:
        return case.forward(picture, ids[pair : pair + 1], mask[pair : pair + 1])[0]

    expected = brute_force(score, pixels, masks, 0.4).expand_as(pixels) / 3
    settings = {"n_masks": 12, "cells": 5, "probability": 0.4, "seed": 7}
    for rows in (5, 24, None):
        found, _ = RISE(case.forward).attribute(
            case.inputs, additional_forward_args=case.additional, internal_batch_size=rows, **settings
        )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_captions_mask_by_mask_at_their_embeddings():
    case = clip_case()
    pixels, ids = case.inputs
    mask, embeddings = case.additional[0], case.roots[0].text_model.embeddings
    hidden = embeddings(input_ids=ids).detach()
    masks = torch.cat(list(draw_masks(np.random.default_rng((3, 1)), hidden, None, 30, 7, 0.6, 4)))
    assert set(masks.unique().tolist()) == {0.0, 1.0} and masks.shape == (30, 6, 1)

    @torch.no_grad()
    def score(embedded: Tensor, pair: int) -> Tensor:
        handle = embeddings.register_forward_hook(lambda module, args, output: embedded)
        value = case.forward(pixels[pair : pair + 1], ids[pair : pair + 1], mask[pair : pair + 1])[0]
        handle.remove()
        return value

    expected = brute_force(score, hidden, masks, 0.6) * mask
    _, found = RISE(case.forward).attribute(
        case.inputs, additional_forward_args=case.additional, n_masks=30, probability=0.6, seed=3
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not found[mask == 0].any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.integers(1, 9), st.floats(0.1, 0.9), st.integers(1, 50))
def test_masks_fit_are_in_range_and_do_not_depend_on_how_many_at_once(extents, cells, probability, at_once):
    hidden = torch.zeros(2, 3, *extents)
    axes = tuple(range(2, hidden.ndim))
    one, other = (
        torch.cat(list(draw_masks(np.random.default_rng(5), hidden, axes, 40, cells, probability, count)))
        for count in (at_once, 40)
    )
    assert torch.equal(one, other) and one.shape == (40, 1, *extents)
    assert float(one.min()) >= 0 and float(one.max()) <= 1


def test_masks_show_everything_equally_often():
    hidden = torch.zeros(1, 3, 20, 30, dtype=torch.float64)
    masks = torch.cat(list(draw_masks(np.random.default_rng(0), hidden, (2, 3), 6000, 7, 0.3, 1000)))
    torch.testing.assert_close(masks.mean(0), torch.full((1, 20, 30), 0.3).double(), rtol=0, atol=0.03)
    # Neighbours are alike, places far from each other are not.
    flat = masks[:, 0] - 0.3
    near, far = (flat[:, 5, 5] * flat[:, 5, 6]).mean(), (flat[:, 5, 5] * flat[:, 15, 25]).mean()
    assert float(near) > 10 * abs(float(far))


def test_a_longer_caption_leaves_the_first_tokens_masks_alone():
    short, long = (
        torch.cat(list(draw_masks(np.random.default_rng(1), torch.zeros(1, length, 4), None, 50, 7, 0.5, 50)))
        for length in (4, 9)
    )
    assert torch.equal(long[:, :4], short)


def test_the_seed_decides_and_the_global_state_is_untouched():
    case = clip_case()
    method = RISE(case.forward)
    state = torch.get_rng_state()
    maps = [
        method.attribute(case.inputs, additional_forward_args=case.additional, n_masks=8, seed=seed)
        for seed in (0, 0, 1)
    ]
    assert torch.equal(state, torch.get_rng_state())
    for index in (0, 1):
        assert torch.equal(maps[0][index], maps[1][index]) and not torch.equal(maps[0][index], maps[2][index])


class Glimpse(nn.Module):
    """Reads one rectangle of a picture."""

    def forward(self, pictures: Tensor) -> Tensor:
        return pictures[:, :, 4:8, 20:24].mean((1, 2, 3))


def test_points_at_the_only_place_that_matters():
    rise = RISE(Glimpse().eval(), layouts=[PatchLayout((4, 4))])
    found = rise.attribute(torch.ones(2, 3, 16, 32), n_masks=500, cells=5)
    for map_ in found.sum(1):
        row, column = divmod(int(map_.argmax()), 32)
        assert 3 <= row <= 8 and 18 <= column <= 25


def test_a_layer_of_ones_own_choice():
    torch.manual_seed(0)
    embed = nn.Embedding(20, 4).double().eval()
    weight = torch.randn(5, 4).double()
    ids = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])
    terms = (embed(ids) * weight).sum(-1).detach()
    method = RISE(lambda tokens: (embed(tokens) * weight).sum((1, 2)), [embed], [TextLayout()])
    found = method.attribute(ids, n_masks=20_000, internal_batch_size=None)
    expected = terms + 0.5 * (terms.sum(1, keepdim=True) - terms)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.2)


def test_token_ids_need_a_layer():
    with pytest.raises(ValueError, match=r"layers: inputs\[0\] holds token ids"):
        RISE(lambda ids: ids.sum(1).double()).attribute(torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_masks": 0}, "n_masks: expected a whole number of at least 1, got 0"),
        ({"cells": 0}, "cells: expected a whole number of at least 1"),
        ({"seed": -1}, "seed: expected a whole number of at least 0"),
        ({"probability": 1.0}, "probability: expected a number between 0 and 1, got 1.0"),
        ({"internal_batch_size": 0}, "internal_batch_size: expected a whole number of at least 1"),
    ],
)
def test_arguments_are_checked(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RISE(Glimpse().eval()).attribute(torch.ones(1, 3, 16, 32), **settings)
