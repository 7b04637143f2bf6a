"""What a fitted head is worth on pictures, and how figures of several seeds are told."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from captum_m2ib.disent.explanations import contributions
from captum_m2ib.disent.features import FeatureSet
from captum_m2ib.disent.model import ConceptModel

_MEASURED_AT_ONCE = 64
_SHARE = 0.9
# Student's t at 0.975, by degrees of freedom from 1 on.
_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
_T += [2.120, 2.110, 2.101, 2.093]
MOST_SEEDS = len(_T) + 1


def top1(model: ConceptModel[Any], features: FeatureSet) -> float:
    r"""How often a head decides as the labels say.

    Args:

        model (ConceptModel): Fitted.
        features (FeatureSet): With labels.

    Returns:
        float: in [0, 1].
    """
    assert features.labels is not None
    return float((model.predict(features).argmax(1) == features.labels).double().mean())


def measure(model: ConceptModel[Any], features: FeatureSet) -> dict[str, float]:
    r"""What a head is worth on test pictures.

    Args:

        model (ConceptModel): Fitted.
        features (FeatureSet): Of test pictures, with labels.

    Returns:
        dict: ``top1``, in [0, 1]; ``halves``: how many halves of channels hold 90 % of the absolute contributions to
        the predicted class, on average; ``margin_halves``: the same for how far its logit is above the mean of all
        logits; ``residual``: the largest difference between a logit and the sum of its contributions, relative to the
        largest logit.
    """
    assert features.labels is not None
    right, halves, margin, residual, largest = 0.0, 0.0, 0.0, 0.0, 0.0
    place = model.head.scale.device
    for part, labels in zip(features.batches(_MEASURED_AT_ONCE), features.labels.split(_MEASURED_AT_ONCE), strict=True):
        found = contributions(model.head, part.to(place))
        logits = found.logits.gather(1, found.target[:, None]).squeeze(1)
        sums = (found.positive + found.negative).sum(1) + found.bias
        right += float((found.target.cpu() == labels).sum())
        halves += float(found.halves_holding(_SHARE).sum())
        margin += float(contributions(model.head, part.to(place), contrast=True).halves_holding(_SHARE).sum())
        residual = max(residual, float((sums - logits).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    count = len(features)
    return {
        "top1": right / count,
        "halves": halves / count,
        "margin_halves": margin / count,
        "residual": residual / max(largest, 1e-12),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    r"""Mean over seeds and half of its 95 % interval by Student's t.

    Args:

        values (sequence of float): One per seed.

    Returns:
        tuple[float, float]: mean and half width, NaN for one value.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, _T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def shown_interval(values: Sequence[float], digits: int) -> str:
    r"""Mean and half of the 95 % interval as text.

    Args:

        values (sequence of float): One per seed.
        digits (int): After the point.

    Returns:
        str: such as ``"70.2 ± 0.4"``; the mean alone for one seed.
    """
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")


def peak_gib() -> float | None:
    r"""The most memory that this process has held.

    Returns:
        float or None: GiB; None on Windows, which does not tell.
    """
    try:
        import resource
    except ImportError:
        return None
    # Kibibytes, but bytes on macOS.
    unit = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
