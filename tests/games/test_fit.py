"""The least squares of a grid are the definitions: differences averaged over all coalitions, computed one by one."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from captum_m2ib.games.fit import Draws, Fit, draw, explained, fit
from captum_m2ib.games.play import _usual

PATCHES, WORDS = 4, 3


def game(masks: np.ndarray) -> float:
    """A score of three patches' and two words' embeddings, with everything that a cosine mixes up."""
    x, y = masks[:PATCHES].astype(float), masks[PATCHES:].astype(float)
    first = np.array([1 + x[0] * x[1], x[2] - 0.3 * x[3], 0.5 + x[0] * x[3] * x[2]])
    second = np.array([0.2 + y[0], 1 - y[1] * y[2], y[0] * y[2] - 0.7 * y[1]])
    return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))


def grid(pictures: np.ndarray, captions: np.ndarray) -> np.ndarray:
    return np.array([[game(np.concatenate([x, y])) for y in captions] for x in pictures])


def banzhaf(players: tuple[int, ...], p: float) -> float:
    """The weighted Banzhaf interaction of players, by its definition: 2^n coalitions, one after the other."""
    count = PATCHES + WORDS
    others = [i for i in range(count) if i not in players]
    total = 0.0
    for there in product((False, True), repeat=len(others)):
        chance = np.prod([p if one else 1 - p for one in there])
        for inside in product((False, True), repeat=len(players)):
            masks = np.zeros(count, dtype=bool)
            masks[others], masks[list(players)] = there, inside
            total += chance * (-1) ** (len(players) - sum(inside)) * game(masks)
    return total


@pytest.mark.parametrize("p", [0.5, 0.3, 0.8])
@pytest.mark.parametrize("within", [False, True])
def test_a_whole_grid_gives_weighted_banzhaf_interactions_exactly(p: float, within: bool):
    pictures, captions = draw(PATCHES, 16, p, 0), draw(WORDS, 8, p, 1)
    assert pictures.is_whole and captions.is_whole
    found = fit(grid(pictures.masks, captions.masks), pictures, captions, p, within)
    close = {"rtol": 0, "atol": 1e-12}
    np.testing.assert_allclose(found.mean, banzhaf((), p), **close)
    np.testing.assert_allclose(found.picture, [banzhaf((i,), p) for i in range(PATCHES)], **close)
    np.testing.assert_allclose(found.caption, [banzhaf((PATCHES + j,), p) for j in range(WORDS)], **close)
    expected = [[banzhaf((i, PATCHES + j), p) for i in range(PATCHES)] for j in range(WORDS)]
    np.testing.assert_allclose(found.across, expected, **close)
    assert (found.in_picture is not None) == within
    if found.in_picture is not None and found.in_caption is not None:
        for table, count, start in ((found.in_picture, PATCHES, 0), (found.in_caption, WORDS, PATCHES)):
            for i, j in product(range(count), repeat=2):
                value = 0.0 if i == j else banzhaf((start + i, start + j), p)
                np.testing.assert_allclose(table[i, j], value, **close)


def test_the_fit_is_the_least_squares_of_the_whole_game():
    pictures, captions = draw(PATCHES, 16, 0.3, 0), draw(WORDS, 8, 0.3, 1)
    values = grid(pictures.masks, captions.masks)
    found = fit(values, pictures, captions, 0.3)
    predicted = found.predict(pictures.masks, captions.masks)
    x = np.repeat(pictures.masks, len(captions.masks), 0).astype(float)
    y = np.tile(captions.masks, (len(pictures.masks), 1)).astype(float)
    across = (x[:, :, None] * y[:, None]).reshape(len(x), -1)
    table = np.concatenate([np.ones((len(x), 1)), x, y, across], 1)
    weights = np.sqrt(np.outer(pictures.weights, captions.weights).ravel())[:, None]
    solved = np.linalg.lstsq(table * weights, values.reshape(-1, 1) * weights, rcond=None)[0]
    np.testing.assert_allclose(predicted.ravel(), (table @ solved)[:, 0], atol=1e-12)
    assert 0.3 < explained(values, predicted, pictures, captions) < 1
    alone = Fit(0.3, found.mean, found.picture, found.caption, np.zeros_like(found.across))
    less = alone.predict(pictures.masks, captions.masks)
    assert explained(values, less, pictures, captions) < explained(values, predicted, pictures, captions)


def test_what_is_of_second_order_is_explained_to_the_last_bit_with_interactions_within():
    rng = np.random.default_rng(0)
    pictures, captions = draw(6, 60, 0.5, 0), draw(3, 8, 0.5, 1)
    assert not pictures.is_whole
    x, y = pictures.masks, captions.masks
    values = 0.3 + (x @ rng.normal(size=6))[:, None] + x @ rng.normal(size=(6, 3)) @ y.T
    values = values + (x[:, 1] * x[:, 4])[:, None] - 2 * (y[:, 0] * y[:, 2])[None]
    found = fit(values, pictures, captions, 0.5, within=True)
    np.testing.assert_allclose(found.predict(x, y), values, atol=1e-10)
    np.testing.assert_allclose(found.in_picture[1, 4], 1, atol=1e-10)  # type: ignore[index]
    np.testing.assert_allclose(found.in_caption[2, 0], -2, atol=1e-10)  # type: ignore[index]


def test_draws_have_the_asked_for_share_and_at_one_half_their_complements():
    for p in (0.2, 0.5, 0.9):
        drawn = draw(30, 4001, p, 3)
        assert drawn.masks.shape == (4001, 30) and not drawn.is_whole
        assert abs(drawn.masks.mean() - p) < 0.01
        np.testing.assert_array_equal(drawn.masks, draw(30, 4001, p, 3).masks)
    half = draw(30, 10, 0.5, 0).masks
    np.testing.assert_array_equal(half[1::2], ~half[::2])
    whole = draw(3, 8, 0.2, 0)
    assert len({tuple(row) for row in whole.masks.tolist()}) == 8
    np.testing.assert_allclose(whole.weights.sum(), 1)
    np.testing.assert_allclose(whole.weights @ whole.masks, 0.2)


def test_coalitions_without_complements_tell_twice_as_many_pairs_apart():
    captions = draw(2, 4, 0.5, 1)
    values = np.zeros((40, 4))
    assert fit(values, draw(7, 40, 0.5, 0, is_paired=False), captions, 0.5, within=True).in_picture is not None
    with pytest.raises(ValueError, match=r"tell 29 coefficients apart, got 40 that tell 2."):
        fit(values, draw(7, 40, 0.5, 0), captions, 0.5, within=True)


def test_coalitions_that_do_not_tell_coefficients_apart_are_refused():
    few, captions = draw(64, 20, 0.5, 0), draw(3, 8, 0.5, 0)
    with pytest.raises(ValueError, match=r"^budget: expected masked pictures that tell 65 coefficients apart, got 20"):
        fit(np.zeros((20, 8)), few, captions, 0.5)
    with pytest.raises(ValueError, match=r"^budget: expected masked captions that tell 11 coefficients apart, got 9"):
        fit(np.zeros((8, 9)), draw(3, 8, 0.5, 0), draw(10, 9, 0.5, 0), 0.5)


def test_pairs_within_a_side_have_half_as_many_coalitions_again_as_coefficients():
    assert _usual((64, 9), False) == (1024, 256)
    assert _usual((64, 9), True) == (3121, 256)
    assert _usual((4, 30), True) == (512, 699)


def test_a_constant_score_has_no_variance_to_explain():
    draws = Draws(np.eye(2, dtype=bool), np.array([0.5, 0.5]), False)
    assert np.isnan(explained(np.ones((2, 2)), np.ones((2, 2)), draws, draws))
