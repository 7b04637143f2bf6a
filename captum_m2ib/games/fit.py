r"""Weighted Banzhaf interactions by least squares on a grid: masked pictures one way, masked captions the other.

A player takes part with probability :math:`p`, whatever the others do. With :math:`x_i` in {0, 1} for the picture's
players and :math:`y_j` for the caption's, the score is fitted by

.. math:: v(x, y) \approx a + \sum_i b_i (x_i - p) + \sum_j c_j (y_j - p) + \sum_{ij} d_{ij} (x_i - p) (y_j - p),

whose terms do not correlate under this distribution. The coefficients of the best fit over all coalitions are
therefore differences: :math:`b_i` is the mean of what player i adds, its weighted Banzhaf value; :math:`d_{ij}` is the
mean of what i adds with j minus what it adds without, their weighted Banzhaf interaction. The regressors of the grid
are products of one of the picture's and one of the caption's, so that the least squares of all its scores are two
small ones: first along the pictures, then along the captions.

Baniecki et al., "Explaining Similarity in Vision-Language Encoders with Weighted Banzhaf Interactions", NeurIPS 2025,
https://arxiv.org/abs/2508.05430
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Masks = NDArray[np.bool_]


@dataclass(frozen=True)
class Draws:
    r"""Coalitions of one side's players.

    Attributes:

        masks (numpy.ndarray): Who takes part, boolean, (count, players).
        weights (numpy.ndarray): What each counts for, (count,); sums to 1.
        is_whole (bool): Whether every coalition is there.
    """

    masks: Masks
    weights: Floats
    is_whole: bool


@dataclass(frozen=True)
class Fit:
    r"""Coefficients of the fit, in units of the score.

    Attributes:

        p (float): With which probability a player takes part.
        mean (float): The score of the mean coalition.
        picture (numpy.ndarray): Weighted Banzhaf values, (picture's players,).
        caption (numpy.ndarray): (caption's players,).
        across (numpy.ndarray): Interactions, (caption's players, picture's players).
        in_picture (numpy.ndarray or None): Interactions of two of the picture's players, symmetric with zeros on the
            diagonal; None where they were not fitted.
        in_caption (numpy.ndarray or None): The same of the caption's players.
    """

    p: float
    mean: float
    picture: Floats
    caption: Floats
    across: Floats
    in_picture: Floats | None = None
    in_caption: Floats | None = None

    def predict(self, picture_masks: Masks, caption_masks: Masks) -> Floats:
        r"""What the fit says of each masked picture beside each masked caption.

        Args:

            picture_masks (numpy.ndarray): Boolean, (M, picture's players).
            caption_masks (numpy.ndarray): Boolean, (N, caption's players).

        Returns:
            numpy.ndarray: (M, N).
        """
        x, y = picture_masks - self.p, caption_masks - self.p
        found: Floats = self.mean + (x @ self.picture)[:, None] + (y @ self.caption)[None] + x @ self.across.T @ y.T
        if self.in_picture is not None and self.in_caption is not None:
            found = found + 0.5 * np.einsum("mi,ij,mj->m", x, self.in_picture, x)[:, None]
            found = found + 0.5 * np.einsum("ni,ij,nj->n", y, self.in_caption, y)[None]
        return found


def draw(players: int, count: int, p: float, seed: int, is_paired: bool = True) -> Draws:
    r"""Coalitions in which each player takes part with a probability; all of them where there are no more.

    Where that is one half, each drawn coalition is followed by its complement, so that what players do alone is not
    mixed up with what two of them do together. Of what two do together the complement says nothing new.

    Args:

        players (int): How many there are.
        count (int): How many coalitions, at most.
        p (float): With which probability a player takes part, between 0 and 1.
        seed (int): Of the draws.
        is_paired (bool, optional): Let complements follow. Default: True

    Returns:
        Draws: the coalitions.
    """
    if players < 63 and 2**players <= count:
        masks = (np.arange(2**players)[:, None] >> np.arange(players)) & 1 == 1
        sizes = masks.sum(1)
        return Draws(masks, p**sizes * (1 - p) ** (players - sizes), True)
    generator = np.random.default_rng(seed)
    masks = generator.random((count, players)) < p
    if p == 0.5 and is_paired:
        masks[1::2] = ~masks[: 2 * (count // 2) : 2]
    return Draws(masks, np.full(count, 1 / count), False)


def fit(values: Floats, pictures: Draws, captions: Draws, p: float, within: bool = False) -> Fit:
    r"""Fit the scores of a grid.

    Args:

        values (numpy.ndarray): The score of each masked picture beside each masked caption, (M, N).
        pictures, captions (Draws): Who took part.
        p (float): With which probability.
        within (bool, optional): Fit interactions of two players of the same side as well. Default: False

    Returns:
        Fit: the coefficients.

    Raises:
        ValueError: if the coalitions do not tell the coefficients apart, as where there are fewer of them.

    Examples::

        >>> both = draw(2, 4, 0.5, seed=0)
        >>> x, y = both.masks[:, None], both.masks[None]
        >>> found = fit(3.0 * x[..., 0] * y[..., 1] + x[..., 1], both, both, 0.5)
        >>> found.across[1, 0].round(6), found.picture.round(6), found.caption.round(6)
        (np.float64(3.0), array([1.5, 1. ]), array([0. , 1.5]))
    """
    along_pictures = _solve(pictures, values, p, within, "masked pictures")
    table = _solve(captions, along_pictures.T, p, within, "masked captions")
    of_picture, of_caption = pictures.masks.shape[1], captions.masks.shape[1]
    return Fit(
        p,
        float(table[0, 0]),
        table[0, 1 : 1 + of_picture],
        table[1 : 1 + of_caption, 0],
        table[1 : 1 + of_caption, 1 : 1 + of_picture],
        _square(table[0, 1 + of_picture :], of_picture) if within else None,
        _square(table[1 + of_caption :, 0], of_caption) if within else None,
    )


def explained(values: Floats, predicted: Floats, pictures: Draws, captions: Draws) -> float:
    r"""The share of the scores' variance that a fit explains.

    Args:

        values, predicted (numpy.ndarray): (M, N).
        pictures, captions (Draws): Who took part.

    Returns:
        float: at most 1; NaN where all scores are equal.
    """
    weights = pictures.weights[:, None] * captions.weights[None]
    spread = (weights * (values - (weights * values).sum()) ** 2).sum()
    left = (weights * (values - predicted) ** 2).sum()
    return float(1 - left / spread) if spread > 0 else float("nan")


def _solve(draws: Draws, values: Floats, p: float, within: bool, name: str) -> Floats:
    """Weighted least squares of values, (count, ...), on the players: (coefficients, ...)."""
    centred = draws.masks - p
    columns = [np.ones((len(centred), 1)), centred]
    if within:
        first, second = np.triu_indices(centred.shape[1], 1)
        columns.append(centred[:, first] * centred[:, second])
    table, scale = np.concatenate(columns, 1), np.sqrt(draws.weights)[:, None]
    found, _, rank, _ = np.linalg.lstsq(table * scale, values * scale, rcond=None)
    if rank < table.shape[1]:
        raise ValueError(
            f"budget: expected {name} that tell {table.shape[1]} coefficients apart, got {len(table)} that tell "
            f"{rank}; ask for more, or for fewer players (cell=, feature_mask=)."
        )
    return found


def _square(pairs: Floats, players: int) -> Floats:
    """A symmetric table of numbers that are given per pair."""
    table = np.zeros((players, players))
    table[np.triu_indices(players, 1)] = pairs
    return table + table.T
