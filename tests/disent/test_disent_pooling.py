"""Pooling: closed forms on small maps, and Gumbel-softmax against what theory says it draws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_m2ib.disent.pooling import location_weights, pool_halves, sample_location_weights

MAP = torch.tensor([[[1.0, -4.0, 3.0, -2.0], [-1.0, -2.0, -3.0, -0.5], [0.5, 2.0, 1.0, 0.25]]])


def pooled(pooling: str, top_k: int = 2) -> tuple[list[float], list[float]]:
    halves = pool_halves(MAP, location_weights(MAP, pooling, top_k), location_weights(-MAP, pooling, top_k))
    return halves[0][0].tolist(), halves[1][0].tolist()


def test_max_keeps_the_extremes_of_either_sign():
    assert pooled("max") == ([3.0, 0.0, 2.0], [4.0, 3.0, 0.0])


def test_mean_and_top_k_by_hand():
    assert pooled("mean") == ([1.0, 0.0, 0.9375], [1.5, 1.625, 0.0])
    assert pooled("top_k") == ([2.0, 0.0, 1.5], [3.0, 2.5, 0.0])
    assert pooled("top_k", top_k=99) == pooled("mean")
    assert pooled("top_k", top_k=1) == pooled("max")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12))
def test_the_papers_identity(values):
    maps = torch.tensor(values)[None, None]
    positive, negative = pool_halves(maps, location_weights(maps), location_weights(-maps))
    extreme = max(0.0, max(values)) + min(0.0, min(values))
    assert float(positive - negative) == pytest.approx(extreme, abs=1e-5)


def test_gradient_of_max_reaches_two_locations_per_channel():
    maps = MAP.clone().requires_grad_()
    positive, negative = pool_halves(maps, location_weights(maps), location_weights(-maps))
    (positive - negative).sum().backward()
    expected = torch.tensor([[[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]])
    torch.testing.assert_close(maps.grad, expected)


@pytest.mark.parametrize("noise", [1.0, 0.5])
def test_hard_draws_follow_the_softmax_whatever_the_temperature(noise):
    scores = torch.tensor([0.3, 1.0, -0.5]).expand(40_000, 1, 3)
    for temperature in (0.1, 5.0):
        generator = torch.Generator().manual_seed(0)
        weights = sample_location_weights(scores, "gumbel", temperature, noise, generator)
        assert bool((weights.round(decimals=4).sum(-1) == 1).all())
        assert float(weights.max(-1).values.min()) > 0.999
        share = weights.mean((0, 1))
        torch.testing.assert_close(share, torch.softmax(scores[0, 0] / noise, 0), atol=0.01, rtol=0)


def test_straight_through_gradient_is_the_softmaxs():
    scores = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pull = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = []
    for estimator in ("gumbel", "gumbel_soft"):
        leaf = scores.clone().requires_grad_()
        drawn = sample_location_weights(leaf, estimator, 0.7, 1.0, torch.Generator().manual_seed(3))
        (drawn * pull).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_without_noise_the_estimator_is_the_maximum():
    weights = sample_location_weights(MAP, "gumbel", 1.0, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights, location_weights(MAP), atol=1e-6, rtol=0)
    assert torch.equal(sample_location_weights(MAP, "max"), location_weights(MAP))


def test_draws_come_from_the_generator_alone():
    before = torch.random.get_rng_state()
    draws = [sample_location_weights(MAP.expand(50, -1, -1), generator=torch.Generator().manual_seed(5)) for _ in "ab"]
    assert torch.equal(*draws)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: location_weights(MAP, "median"), "pooling"),
        (lambda: sample_location_weights(MAP, "relax"), "estimator"),
    ],
)
def test_refuses(call, name):
    with pytest.raises(ValueError, match=f"^{name}: expected one of"):
        call()
