"""The closed form against torch.distributions, and its behaviour where gates are nearly open or shut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from captum_m2ib.engine.information import NATS_PER_BIT, close_fully, information, mean_information, sample


def tensor(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


@settings(max_examples=300, deadline=None)
@given(
    alpha=st.floats(-40, 40),
    hidden=st.floats(-50, 50),
    mean=st.floats(-5, 5),
    std=st.floats(0.01, 20),
)
def test_closed_form_equals_the_divergence(alpha, hidden, mean, std):
    alpha, hidden, mean, std = map(tensor, (alpha, hidden, mean, std))
    gate, shut = torch.sigmoid(alpha), torch.sigmoid(-alpha)
    passed = Normal(gate * hidden + shut * mean, shut * std)
    expected = kl_divergence(passed, Normal(mean, std))
    # The reference subtracts numbers of order one, so it is exact to rounding of its terms only.
    scale = 1 + float(((hidden - mean) / std).square()) + abs(float(alpha))
    assert float(information(alpha, hidden, mean, std)) == pytest.approx(float(expected), rel=1e-9, abs=1e-14 * scale)


def test_defaults_are_the_standard_normal_prior():
    alpha, hidden = torch.linspace(-3, 3, 7, dtype=torch.float64), torch.linspace(-2, 2, 7, dtype=torch.float64)
    gate = torch.sigmoid(alpha)
    expected = kl_divergence(Normal(gate * hidden, 1 - gate), Normal(0.0, 1.0))
    torch.testing.assert_close(information(alpha, hidden), expected)
    assert math.isclose(NATS_PER_BIT, math.log(2))


@pytest.mark.parametrize(("alpha", "hidden", "mean", "std"), [(0.0, 2.0, 0.5, 1.5), (2.0, -1.0, 0.0, 0.7)])
def test_samples_follow_the_stated_distribution(alpha, hidden, mean, std):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, generator=generator, dtype=torch.float64)
    drawn = sample(tensor(alpha), tensor(hidden), noise, tensor(mean), tensor(std))
    gate = 1 / (1 + math.exp(-alpha))
    passed = Normal(tensor(gate * hidden + (1 - gate) * mean), tensor((1 - gate) * std))
    assert float(drawn.mean()) == pytest.approx(float(passed.mean), abs=0.01)
    assert float(drawn.std()) == pytest.approx(float(passed.stddev), rel=0.01)
    monte_carlo = (passed.log_prob(drawn) - Normal(tensor(mean), tensor(std)).log_prob(drawn)).mean()
    exact = information(tensor(alpha), tensor(hidden), tensor(mean), tensor(std))
    assert float(monte_carlo) == pytest.approx(float(exact), rel=0.02)


@settings(max_examples=200, deadline=None)
@given(alpha=st.floats(-100, 100), hidden=st.floats(-1000, 1000))
def test_information_is_never_negative(alpha, hidden):
    for dtype, slack in ((torch.float64, 1e-15), (torch.float32, 1e-6)):
        value = float(information(tensor(alpha, dtype), tensor(hidden, dtype)))
        assert value >= -slack and math.isfinite(value)


def test_a_shut_gate_carries_nothing_and_an_open_one_ever_more():
    alpha = torch.linspace(-25, 60, 241, dtype=torch.float64)
    value = information(alpha, tensor(0.7))
    assert float(value[0]) == pytest.approx(0, abs=1e-20)
    assert bool((value.diff() > 0).all())
    small = float(information(tensor(-15.0), tensor(0.0)))
    gate = 1 / (1 + math.exp(15))
    assert small == pytest.approx(gate**2, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [-1e4, -200.0, -40.0, 0.0, 40.0, 200.0, 1e4])
def test_gradients_are_finite_at_extreme_gates(dtype, alpha):
    logits = torch.full((5,), alpha, dtype=dtype, requires_grad=True)
    hidden = torch.linspace(-30, 30, 5).to(dtype)
    (information(logits, hidden, 0.5, 2.0).sum() + sample(logits, hidden, hidden, 0.5, 2.0).sum()).backward()
    assert bool(logits.grad.isfinite().all())


@settings(max_examples=60, deadline=None)
@given(alpha=st.floats(-30, 30), hidden=st.floats(-20, 20), std=st.floats(0.1, 5))
def test_gradient_of_the_information(alpha, hidden, std):
    logits = tensor(alpha).requires_grad_()
    (gradient,) = torch.autograd.grad(information(logits, tensor(hidden), 0.0, std), logits)
    gate = 1 / (1 + math.exp(-alpha))
    # d/dalpha of -log(1 - g) is g; of (1 - g)^2 / 2 it is -(1 - g)^2 g; of (g hn)^2 / 2 it is g^2 (1 - g) hn^2.
    exact = gate - (1 - gate) ** 2 * gate + gate**2 * (1 - gate) * (hidden / std) ** 2
    assert float(gradient) == pytest.approx(exact, rel=1e-6, abs=1e-12)


def test_long_optimisation_stays_finite():
    hidden = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    alpha = torch.full_like(hidden, 5.0, requires_grad=True)
    adam = torch.optim.Adam([alpha], lr=1.0)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    for _ in range(1000):
        adam.zero_grad()
        passed = sample(alpha, hidden, noise)
        (0.0 * information(alpha, hidden).mean() + (passed - hidden).square().sum()).backward()
        adam.step()
    assert bool(alpha.isfinite().all()) and bool(information(alpha, hidden).isfinite().all())


def test_sample_at_the_ends_of_the_gate():
    hidden, noise = torch.tensor([2.0]), torch.tensor([1.5])
    torch.testing.assert_close(sample(torch.tensor([90.0]), hidden, noise, 1.0, 3.0), hidden)
    torch.testing.assert_close(sample(torch.tensor([-90.0]), hidden, noise, 1.0, 3.0), torch.tensor([5.5]))
    halfway = sample(torch.tensor([0.0]), hidden, noise, 1.0, 3.0)
    torch.testing.assert_close(halfway, torch.tensor([0.5 * 2.0 + 0.5 * 5.5]))


def test_mean_over_real_elements_only():
    elements = torch.arange(12.0).view(2, 3, 2)
    torch.testing.assert_close(mean_information(elements), torch.tensor([2.5, 8.5]))
    real = torch.tensor([[True, True, False], [True, False, False]])[..., None]
    torch.testing.assert_close(mean_information(elements, real), torch.tensor([1.5, 6.5]))
    assert mean_information(elements, torch.zeros_like(real)).tolist() == [0.0, 0.0]


def test_padding_does_not_change_the_mean():
    elements = torch.rand(1, 4, 3)
    real = torch.ones(1, 4, 1, dtype=torch.bool)
    padded = torch.cat([elements, torch.full((1, 5, 3), 9.0)], 1)
    mask = torch.cat([real, torch.zeros(1, 5, 1, dtype=torch.bool)], 1)
    torch.testing.assert_close(mean_information(padded, mask), mean_information(elements, real))


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_gates_that_nothing_opened_shut(dtype, close):
    gates = torch.tensor([0.0, 1e-9, 0.03, 0.0439, 0.048, 0.056, 0.2, 0.525, 0.999, 1.0], dtype=torch.float64)
    idle = torch.logit(torch.tensor(0.04, dtype=dtype))
    found = torch.sigmoid(close_fully(torch.logit(gates).to(dtype), idle))
    expected = [0.0] * 4 + [0.048 * 0.25, 0.056 * 0.75, 0.2, 0.525, 0.999, 1.0]
    assert found.tolist() == pytest.approx(expected, abs=close) and found[:4].tolist() == [0.0] * 4
    other = torch.sigmoid(close_fully(torch.logit(gates).to(dtype), idle, shut=5.0, kept=21.25))
    assert other.tolist() == pytest.approx([0.0] * 7 + [0.525 * 0.5, 0.999, 1.0], abs=close)


def test_a_short_descent_shuts_nothing():
    alpha = torch.linspace(-9, 9, 1001, dtype=torch.float64)
    assert torch.equal(close_fully(alpha, torch.logit(torch.tensor(0.3).double())), alpha)
    gates = torch.tensor([0.1, 0.25, 0.9]).double()
    found = torch.sigmoid(close_fully(torch.logit(gates), torch.logit(torch.tensor(0.25).double())))
    assert found.tolist() == pytest.approx([0.05, 0.125, 0.9])


def test_each_gate_is_measured_by_its_own_idle_one():
    gates = torch.tensor([[0.05, 0.05], [0.5, 0.5]]).double()
    idle = torch.logit(torch.tensor([[0.02, 0.048]]).double())
    expected = [[0.05, 0.0], [0.5, 0.5]]
    torch.testing.assert_close(torch.sigmoid(close_fully(torch.logit(gates), idle)), torch.tensor(expected).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shutting_is_continuous_keeps_the_order_and_touches_no_open_gate(dtype):
    alpha = torch.linspace(-12, 12, 40001, dtype=dtype)
    idle = torch.logit(torch.tensor(0.05, dtype=dtype))
    found = close_fully(alpha, idle)
    gates, before = torch.sigmoid(found), torch.sigmoid(alpha)
    assert bool((gates.diff() >= 0).all()) and bool((gates <= before).all()) and not found.isnan().any()
    # From 0 to 0.075 over 0.02, and steepest at the end.
    between = (before > 0.055) & (before < 0.075)
    assert float(gates.diff().max()) < 5.1 * float(before[between].diff().max())
    shut, open_ = before < 0.05499, before > 0.07501
    assert (
        bool(shut.any()) and bool((found[shut] == -math.inf).all()) and bool(found[before > 0.05501].isfinite().all())
    )
    assert torch.equal(found[open_], alpha[open_])
    ends = torch.tensor([-math.inf, math.inf, -1e4, 1e4], dtype=dtype)
    assert close_fully(ends, idle).tolist() == [-math.inf, math.inf, -math.inf, 1e4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gate_that_is_shut_carries_nothing_and_shows_the_prior(dtype):
    hidden = torch.tensor([-1e4, -2.0, 0.0, 0.3, 50.0], dtype=dtype)
    noise = torch.tensor([0.0, 1.0, -1.5, 0.25, 2.0], dtype=dtype)
    shut = torch.full_like(hidden, -math.inf)
    for mean, std in ((0.0, 1.0), (0.5, 2.0), (torch.full_like(hidden, -3.0), torch.full_like(hidden, 0.5))):
        assert information(shut, hidden, mean, std).tolist() == [0.0] * 5
        assert torch.equal(sample(shut, hidden, noise, mean, std), mean + std * noise)
    opened = torch.full_like(hidden, math.inf)
    assert torch.equal(sample(opened, hidden, noise, 0.5, 2.0), hidden)
    assert torch.equal(close_fully(shut, torch.full((), -3.0, dtype=dtype)), shut)
