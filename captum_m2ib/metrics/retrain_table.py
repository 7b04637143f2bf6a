"""What remove and retrain measured: one value per fitted model, and means and differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from captum_m2ib.metrics._examples import NanPolicy, one_of, optional_module

INTACT = "intact"
RANDOM = "random"


@dataclass(frozen=True)
class RetrainCell:
    r"""What was measured on one fitted model.

    Attributes:

        method (str): Whose maps ranked the units.
        fraction (float): Share of the units that was replaced.
        seed (int): Of the fit.
        value (float): What was measured.
    """

    method: str
    fraction: float
    seed: int
    value: float


@dataclass(frozen=True)
class RetrainRow:
    r"""A mean over seeds with its 95 % interval, by Student's t.

    Attributes:

        method (str): Whose maps ranked the units.
        fraction (float): Share of the units that was replaced.
        mean (float): Over the seeds that have a value.
        low (float): Lower end of the interval; NaN for one seed.
        high (float): Upper end of the interval; NaN for one seed.
        seeds (int): Seeds in the mean.
        omitted (int): Seeds without a value.
    """

    method: str
    fraction: float
    mean: float
    low: float
    high: float
    seeds: int
    omitted: int


@dataclass(frozen=True)
class RetrainTable:
    r"""What a protocol measured.

    Attributes:

        protocol (str): ``"roar"``: values are what ``evaluate`` returned, ``"roar_plus"``: increases of the loss.
        cells (tuple[RetrainCell, ...]): One per method, fraction and seed; method ``"intact"`` at fraction 0 is the
            model fitted to intact examples, ``"random"`` the random ranking.
    """

    protocol: str
    cells: tuple[RetrainCell, ...]

    def summary(self, nan_policy: NanPolicy = "propagate") -> list[RetrainRow]:
        r"""Mean and interval over seeds, per method and fraction.

        Needs scipy (``captum_m2ib[metrics]``).

        Args:

            nan_policy (str, optional): What becomes of cells whose value is NaN: ``"propagate"`` makes their row NaN,
                ``"omit"`` leaves them out and counts them, ``"raise"`` is an error. Default: "propagate"

        Returns:
            list[RetrainRow]: in the order of the cells.

        Raises:
            ValueError: by the NaN policy.
            ImportError: if scipy is missing.
        """
        return _rows(self.cells, nan_policy)

    def against(self, reference: str = "random", nan_policy: NanPolicy = "propagate") -> list[RetrainRow]:
        r"""Mean difference from a reference, and its interval, over seeds.

        Both fits of a difference have the same seed, so what a seed does to all of them alike, as the order of the
        examples, drops out: this interval, not whether two intervals overlap, says whether a map beats a random
        ranking.

        Args:

            reference (str, optional): The method whose value at the same fraction and seed is subtracted.
                Default: "random"
            nan_policy (str, optional): As for :meth:`summary`. Default: "propagate"

        Returns:
            list[RetrainRow]: of the other methods but ``"intact"``, in the order of the cells.

        Raises:
            ValueError: if there are no cells of the reference, or by the NaN policy.
            ImportError: if scipy is missing.
        """
        base = {(cell.fraction, cell.seed): cell.value for cell in self.cells if cell.method == reference}
        if not base or reference == INTACT:
            known = sorted({cell.method for cell in self.cells} - {INTACT})
            raise ValueError(f"reference: expected one of {', '.join(known)}, got {reference!r}.")
        differences = [
            RetrainCell(cell.method, cell.fraction, cell.seed, cell.value - base[cell.fraction, cell.seed])
            for cell in self.cells
            if cell.method not in (reference, INTACT)
        ]
        return _rows(differences, nan_policy)

    def __str__(self) -> str:
        rows = self.summary()
        width = max(len(row.method) for row in rows)
        return "\n".join(
            f"{row.method:{width}}  {row.fraction:4.2f}  {row.mean:.4f} [{row.low:.4f}, {row.high:.4f}]" for row in rows
        )


def _rows(cells: Sequence[RetrainCell], nan_policy: NanPolicy) -> list[RetrainRow]:
    one_of("nan_policy", nan_policy, NanPolicy)
    groups: dict[tuple[str, float], list[float]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.fraction), []).append(cell.value)
    return [_row(*group, values, nan_policy) for group, values in groups.items()]


def _row(method: str, fraction: float, values: Sequence[float], nan_policy: NanPolicy) -> RetrainRow:
    known = [value for value in values if not math.isnan(value)]
    missing = len(values) - len(known)
    if missing and nan_policy == "raise":
        raise ValueError(f"cells: expected a value for every seed of {method!r} at {fraction:g}, {missing} are NaN.")
    if not known or (missing and nan_policy == "propagate"):
        return RetrainRow(method, fraction, math.nan, math.nan, math.nan, len(known), missing)
    given = torch.tensor(known, dtype=torch.float64)
    mean, reach = float(given.mean()), math.nan
    if len(known) > 1:
        student = optional_module("scipy.stats", "summary").t
        reach = float(student.ppf(0.975, len(known) - 1)) * float(given.std()) / math.sqrt(len(known))
    return RetrainRow(method, fraction, mean, mean - reach, mean + reach, len(known), missing)
