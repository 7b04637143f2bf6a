"""shapiq's regression on the game of a pair: what any of its games is given, without what this one is known to be.

Coalitions are drawn of all players at once, and every one takes a pass of the picture's tower. It fits interactions of
any two players, those of two patches as well.
"""

from __future__ import annotations

import warnings
from itertools import combinations

import numpy as np

from captum_m2ib.games import Fit, PairGame
from captum_m2ib.games.found import import_shapiq

# shapiq's faithful Banzhaf interactions are those of players that take part with this probability.
_P = 0.5


def regression(game: PairGame, coalitions: int, seed: int) -> Fit:
    r"""Faithful Banzhaf interactions by shapiq's ``RegressionFBII``.

    Args:

        game (PairGame): The game.
        coalitions (int): How many are drawn.
        seed (int): Of the draws.

    Returns:
        Fit: the same polynomial about the mean coalition.

    Raises:
        ImportError: if shapiq is not installed.
    """
    approximator = import_shapiq().RegressionFBII(n=game.n_players, max_order=2, random_state=seed)
    with warnings.catch_warnings():
        # Fewer coalitions than coefficients are among what is measured.
        warnings.simplefilter("ignore")
        found = approximator.approximate(budget=coalitions, game=game).dict_values
    alone = np.array([found.get((i,), 0.0) for i in range(game.n_players)])
    together = np.zeros((game.n_players, game.n_players))
    for first, second in combinations(range(game.n_players), 2):
        together[first, second] = together[second, first] = found.get((first, second), 0.0)
    return centred(found.get((), 0.0), alone, together, game.picture_players)


def centred(constant: float, alone: np.ndarray, together: np.ndarray, pictures: int) -> Fit:
    r"""A polynomial of players that are there (1) or not (0), written about the mean coalition.

    Args:

        constant (float): Its value where nobody is there.
        alone (numpy.ndarray): What each player adds, (players,).
        together (numpy.ndarray): What each two add, symmetric, zeros on the diagonal, (players, players).
        pictures (int): How many of the players, the first ones, are the picture's.

    Returns:
        Fit: the same function.

    Examples::

        >>> found = centred(1.0, np.array([2.0, 0.0]), np.array([[0.0, 4.0], [4.0, 0.0]]), 1)
        >>> found.mean, found.picture, found.caption, found.across
        (3.0, array([4.]), array([2.]), array([[4.]]))
    """
    values = alone + _P * together.sum(1)
    mean = constant + _P * alone.sum() + _P**2 * together.sum() / 2
    return Fit(
        _P,
        float(mean),
        values[:pictures],
        values[pictures:],
        together[pictures:, :pictures],
        together[:pictures, :pictures],
        together[pictures:, pictures:],
    )
