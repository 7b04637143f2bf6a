"""From values per example to one figure with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from captum_m2ib.metrics._examples import NanPolicy, at_least, one_of

_AT_ONCE = 4_000_000


@dataclass(frozen=True)
class Summary:
    r"""A mean over examples with a 95 % interval.

    Attributes:

        mean (float): Over the examples that have a value.
        low (float): Lower end of the interval.
        high (float): Upper end of the interval.
        count (int): Examples in the mean.
        omitted (int): Examples without a value.
    """

    mean: float
    low: float
    high: float
    count: int
    omitted: int

    def __str__(self) -> str:
        without = f" ({self.omitted} of {self.count + self.omitted} without a value)" if self.omitted else ""
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]{without}"


def summarise(
    values: Tensor | Sequence[float], nan_policy: NanPolicy = "omit", draws: int = 10_000, seed: int = 0
) -> Summary:
    r"""Mean of a metric over examples, with the percentile interval of the bootstrap (Efron, 1979).

    Args:

        values (Tensor or sequence of float): One value per example, (N,); NaN where an example has none.
        nan_policy (str, optional): ``"omit"`` leaves NaN out and counts it in ``omitted``; ``"propagate"`` makes the
                    mean NaN; ``"raise"`` is an error. Default: "omit"
        draws (int, optional): Resamples. Default: 10,000
        seed (int, optional): Of the resampling. Default: 0

    Returns:
        Summary: all NaN where no example has a value.

    Raises:
        ValueError: if there are no values, they are not one per example, or NaN is met and the policy is ``"raise"``.

    Examples::

        >>> found = summarise(torch.tensor([0.2, 0.4, 0.6]))
        >>> round(found.mean, 3)
        0.4
    """
    one_of("nan_policy", nan_policy, NanPolicy)
    at_least("draws", draws, 1)
    if not isinstance(values, Tensor):
        values = torch.tensor(list(values), dtype=torch.float64)
    given = values.detach().cpu().double()
    if given.ndim != 1 or not len(given):
        raise ValueError(f"values: expected one value per example, (N,), at least one, got shape {tuple(given.shape)}.")
    missing = int(given.isnan().sum())
    if missing and nan_policy == "raise":
        raise ValueError(f"values: expected no NaN, got {missing} among {len(given)} examples.")
    array = given[~given.isnan()].numpy()
    if not len(array) or (missing and nan_policy == "propagate"):
        return Summary(float("nan"), float("nan"), float("nan"), len(array), missing)
    rng = np.random.default_rng(seed)
    most = max(1, _AT_ONCE // len(array))
    means = [
        array[rng.integers(len(array), size=(min(most, draws - start), len(array)))].mean(1)
        for start in range(0, draws, most)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Summary(float(array.mean()), float(low), float(high), len(array), missing)
