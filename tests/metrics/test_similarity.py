"""How alike two maps are: right by hand, 1 for a map and itself, 0 on average for unrelated ones, NaN for constants."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from captum_m2ib.metrics import pearson, spearman, ssim

FIRST = torch.tensor([[4.0, 2, 0, 0], [2, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 6]])[None]
SECOND = torch.tensor([[2.0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 9]])[None]
each_similarity = pytest.mark.parametrize("similarity", [pearson, spearman, ssim], ids=lambda s: s.__name__)


def test_by_hand():
    # The ranks agree but for nothing: spearman is 1 although the values differ.
    assert float(spearman(FIRST, SECOND)) == pytest.approx(1)
    # Sums 16 and 14 over 16 units; products 8 + 3 * 2 + 54; squares 16 + 3 * 4 + 36 and 4 + 3 * 1 + 81.
    covariance = 68 - 16 * 14 / 16
    expected = covariance / math.sqrt((64 - 16 * 16 / 16) * (88 - 14 * 14 / 16))
    assert float(pearson(FIRST, SECOND)) == pytest.approx(expected)


def test_ssim_by_hand():
    # On 2 x 2 maps the window is one unit: no variance, c2 cancels, and only the values' own likeness is left.
    first, second = torch.tensor([[[0.0, 1.0], [0.5, 1.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    c1 = 0.01**2
    each = [1.0, 1.0, (2 * 0.5 + c1) / (0.25 + 1 + c1), c1 / (1 + c1)]
    assert float(ssim(first, second)) == pytest.approx(np.mean(each))
    # On 3 x 3 maps there is one place for the window: its weighted moments, computed one by one.
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 3, 3))
    a, b = ((x - x.min()) / (x.max() - x.min()) for x in (a, b))
    weight = np.exp(-np.array([1, 0, 1]) / (2 * 1.5**2))
    weight = np.outer(weight, weight) / weight.sum() ** 2
    ma, mb = (weight * a).sum(), (weight * b).sum()
    va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
    cov, c2 = (weight * (a - ma) * (b - mb)).sum(), 0.03**2
    expected = (2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))
    assert float(ssim(torch.from_numpy(a)[None], torch.from_numpy(b)[None])) == pytest.approx(expected)


@each_similarity
def test_a_map_and_itself(similarity):
    maps = torch.rand(5, 16, 20, generator=torch.Generator().manual_seed(0))
    found = similarity(maps, maps)
    assert found.shape == (5,) and found.dtype == torch.float64
    assert bool((found == 1).all()) if similarity is not ssim else bool((found > 1 - 1e-12).all())
    torch.testing.assert_close(similarity(maps, 3 * maps + 2), torch.ones(5, dtype=torch.float64))


@each_similarity
def test_unrelated_maps_are_alike_by_chance_only(similarity):
    first, second = torch.rand(2, 200, 16, 16, generator=torch.Generator().manual_seed(1))
    found = similarity(first, second)
    # The constants of structural similarity lift it by their share of the variances.
    lift = 0.03 if similarity is ssim else 0.0
    assert abs(float(found.mean())) < 4 * float(found.std()) / math.sqrt(200) + lift
    opposite = similarity(first, -first)
    assert bool((opposite < (-0.99 if similarity is not ssim else 0)).all())


@given(arrays(np.float64, (2, 1, 12), elements=st.integers(-4, 4).map(float)))
@settings(max_examples=60, deadline=None)
def test_correlations_agree_with_scipy(pair):
    first, second = torch.from_numpy(pair)
    constant = any(np.ptp(row) == 0 for row in pair)
    for ours, theirs in ((pearson, stats.pearsonr), (spearman, stats.spearmanr)):
        found = float(ours(first, second))
        if constant:
            assert math.isnan(found)
        else:
            assert found == pytest.approx(float(theirs(pair[0, 0], pair[1, 0]).statistic), abs=1e-12)


@each_similarity
@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, torch.nan, torch.inf])
def test_constant_and_broken_maps_have_no_similarity(similarity, value):
    maps = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(2))
    other = maps.clone()
    if math.isfinite(value):
        other[1] = value
    else:
        other[1, 2, 3] = value
    for found in (similarity(maps, other), similarity(other, maps)):
        assert float(found[0]) == pytest.approx(1) and math.isnan(float(found[1]))


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_the_scale_of_a_map_does_not_matter(scale):
    first, second = torch.rand(2, 3, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(pearson(first * scale, second), pearson(first, second))


def test_shapes():
    for similarity in (pearson, spearman, ssim):
        with pytest.raises(ValueError, match="second: expected maps of the same shape"):
            similarity(FIRST, SECOND[:, :3])
    with pytest.raises(ValueError, match=r"first: expected maps of shape \(N, H, W\)"):
        ssim(FIRST.flatten(1), SECOND.flatten(1))
