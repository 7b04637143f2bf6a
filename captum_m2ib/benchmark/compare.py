r"""Two methods on the same probes: the mean difference, with the interval of the bootstrap over what was drawn.

A figure is a matrix, one row per model and one column per probe; NaN where a probe has no value. Probes are resampled
for all models at once, because a probe that is hard for one model is hard for the next, and models are resampled as
well where there are several: with weights :math:`u` over models and :math:`w` over probes from a draw, its mean is
:math:`\sum_{mp} u_m w_p d_{mp} / \sum_{mp} u_m w_p` over the values that are there. For one model this is the ordinary
bootstrap (Efron, 1979).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from captum_m2ib.metrics import Summary

Floats = NDArray[np.float64]

DRAWS = 10_000
_QUANTILES = (0.025, 0.975)


@dataclass(frozen=True)
class Difference:
    r"""The mean of one method's values minus another's over the probes that both have a value for.

    Attributes:

        mean (float): The mean difference.
        low (float): Lower end of its 95 % interval.
        high (float): Upper end.
        count (int): Probes, over all models, with both values.
        agreeing (int): Models whose own mean difference has the sign of the mean.
        models (int): Models with a probe in the mean.
    """

    mean: float
    low: float
    high: float
    count: int
    agreeing: int
    models: int

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


@dataclass(frozen=True)
class Versus:
    r"""One figure of a method beside its best rival.

    Attributes:

        figure (str): What the figure is called.
        ours (Summary): The method's mean.
        rival (str): The best rival's name.
        theirs (Summary): Its mean.
        difference (Difference): Ours minus the rival's.
        ahead (bool): Whether ours is the better one, clear of zero or not.
    """

    figure: str
    ours: Summary
    rival: str
    theirs: Summary
    difference: Difference
    ahead: bool


def estimate(values: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Summary:
    r"""Mean over models and probes with its 95 % interval.

    Args:

        values (array-like): (models, probes) or (probes,); NaN where there is no value.
        draws (int, optional): Resamples. Default: 10,000
        seed (int, optional): Of the resampling. Default: 0

    Returns:
        Summary: all NaN where there is no value at all.

    Raises:
        ValueError: if the values are no matrix, or there are none.
    """
    table = _table("values", values)
    mean, low, high = _interval(table, draws, seed)
    there = int(np.isfinite(table).sum())
    return Summary(mean, low, high, there, table.size - there)


def paired(ours: ArrayLike, theirs: ArrayLike, draws: int = DRAWS, seed: int = 0) -> Difference:
    r"""Mean difference of two methods over the same probes and models.

    Args:

        ours (array-like): (models, probes) or (probes,).
        theirs (array-like): Of the same shape, the same probe in the same place.
        draws (int, optional): Resamples. Default: 10,000
        seed (int, optional): Of the resampling. Default: 0

    Returns:
        Difference: ours minus theirs; all NaN where no probe has both values.

    Raises:
        ValueError: if the shapes differ or there are no values.
    """
    first, second = _table("ours", ours), _table("theirs", theirs)
    if first.shape != second.shape:
        raise ValueError(f"theirs: expected the probes of ours, shape {first.shape}, got {second.shape}.")
    differences = first - second
    mean, low, high = _interval(differences, draws, seed)
    rows = [row[np.isfinite(row)].mean() for row in differences if np.isfinite(row).any()]
    agreeing = sum(bool(np.sign(row) == np.sign(mean)) for row in rows)
    return Difference(mean, low, high, int(np.isfinite(differences).sum()), agreeing, len(rows))


def best_rival(
    figures: Mapping[str, ArrayLike], ours: str, rivals: Sequence[str], better: int, name: str = ""
) -> Versus | None:
    r"""The rival whose mean is best, and how ours compares with it.

    Args:

        figures (mapping): Method to its values of one figure, (models, probes).
        ours (str): The method that is compared.
        rivals (sequence of str): The methods among which the best is sought; those without a value are left out.
        better (int): 1 if higher is better, -1 if lower is.
        name (str, optional): What the figure is called. Default: ""

    Returns:
        Versus or None: None if ours, or every rival, has no value.
    """
    if better not in (1, -1):
        raise ValueError(f"better: expected 1 where higher is better or -1 where lower is, got {better!r}.")
    means = {rival: _mean(figures[rival]) for rival in rivals if rival in figures and rival != ours}
    means = {rival: mean for rival, mean in means.items() if np.isfinite(mean)}
    if not means or ours not in figures or not np.isfinite(_mean(figures[ours])):
        return None
    rival = max(means, key=lambda method: better * means[method])
    difference = paired(figures[ours], figures[rival])
    ahead = better * difference.mean > 0
    return Versus(name, estimate(figures[ours]), rival, estimate(figures[rival]), difference, ahead)


def _table(name: str, values: ArrayLike) -> Floats:
    table = np.asarray(values, dtype=np.float64)
    table = table[None] if table.ndim == 1 else table
    if table.ndim != 2 or not table.size:
        raise ValueError(f"{name}: expected values per model and probe, (models, probes), got shape {table.shape}.")
    return np.where(np.isfinite(table), table, np.nan)


def _mean(values: ArrayLike) -> float:
    table = _table("values", values)
    there = np.isfinite(table)
    return float(table[there].mean()) if there.any() else float("nan")


def _interval(table: Floats, draws: int, seed: int) -> tuple[float, float, float]:
    """Mean, and the ends of its interval."""
    there = np.isfinite(table)
    if not there.any():
        return float("nan"), float("nan"), float("nan")
    by_probe = _counts(table.shape[1], draws, seed)
    # A single model is no sample of models.
    by_model = _counts(table.shape[0], draws, seed + 1) if table.shape[0] > 1 else np.ones((draws, 1))
    totals = ((by_model @ np.where(there, table, 0.0)) * by_probe).sum(1)
    numbers = ((by_model @ there.astype(np.float64)) * by_probe).sum(1)
    means = totals[numbers > 0] / numbers[numbers > 0]
    low, high = np.quantile(means, _QUANTILES)
    return float(table[there].mean()), float(low), float(high)


@lru_cache(maxsize=8)
def _counts(total: int, draws: int, seed: int) -> Floats:
    """How often each of so many items is drawn, per resample, (draws, total)."""
    picks = np.random.default_rng(seed).integers(total, size=(draws, total))
    flat = picks + total * np.arange(draws)[:, None]
    return np.bincount(flat.ravel(), minlength=draws * total).reshape(draws, total).astype(np.float64)
