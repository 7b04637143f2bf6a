"""What a map's check may say, and from where on it says so; plain numbers, for those who only read checks."""

from __future__ import annotations

from collections.abc import Iterable

VERDICTS = ("holds", "weak", "fails")
"""From the best to the worst."""

HOLDING_MARGIN = 0.35
"""The least margin of a map that holds."""

FAILING_MARGIN = 0.2
"""A map of a smaller margin fails: it says no more than chance."""

HOLDING_KEPT = 0.5
"""The least share of the range that the gates of a map that holds keep."""

LEAST_SHARE = 0.1
"""Of the range, the least that closed gates must take of a score that has something to lose."""


def worst(found: Iterable[str]) -> str:
    r"""The verdict on a pair: its modalities' worst, for a wrong map beside a right one is still wrong.

    Args:

        found (iterable of str): Verdicts, at least one.

    Returns:
        str: one of them.

    Examples::

        >>> worst(["holds", "fails"])
        'fails'
    """
    return max(found, key=VERDICTS.index)
