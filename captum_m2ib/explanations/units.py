"""How a map's numbers are spoken of: bits, units of the score, or relative values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Wording:
    r"""The words and digits of one unit.

    Attributes:

        name (str): What one number is called, in the plural.
        found (str): Title of a picture under its map.
        empty (str): The same where the map is zero everywhere.
        has_totals (bool): Whether sums mean something.
    """

    name: str
    found: str
    empty: str
    has_totals: bool = True

    def title(self, heat: NDArray[Any]) -> str:
        """The title of a picture under a map."""
        is_empty = not heat.any() if self.name != "bits" else not heat.max() > 0
        return self.empty if is_empty else self.found

    def is_signed(self, heat: NDArray[Any]) -> bool:
        """Whether a map is drawn on both sides of zero; bits below zero could only be rounding."""
        return self.name != "bits" and bool((heat < 0).any())

    def per_pixels(self, values: NDArray[np.float64]) -> tuple[NDArray[np.float64], str]:
        r"""A map counted per 1, 100, 10,000 ... pixels, so that its maximum is readable.

        Args:

            values (numpy.ndarray): The map, per pixel.

        Returns:
            tuple: the map, as it is where sums mean nothing, and what its numbers are called.
        """
        if not self.has_totals:
            return values, self.name
        top, count = float(np.abs(values).max()), 1
        while 0 < top * count < 0.1 and count < 1_000_000:
            count *= 100
        return values * count, f"{self.name} per pixel" if count == 1 else f"{self.name} per {count:,} pixels"

    def number(self, value: float) -> str:
        r"""A number in a few characters.

        Args:

            value (float): The number.

        Returns:
            str: bits as :func:`format_bits` writes them, others with two digits that count.
        """
        if self.name == "bits":
            return format_bits(value)
        return "0" if value == 0 else f"{value:.2g}".replace("-", "−")

    def amount(self, value: float) -> str:
        """A number with its unit."""
        return f"{self.number(value)} {self.name}"


WORDINGS = {
    "bits": Wording("bits", "where its information is", "no information anywhere"),
    "score": Wording("units of the score", "what adds to the score", "nothing adds to the score"),
    "relative": Wording("relative values", "what the method marks", "the method marks nothing", has_totals=False),
}
"""Per unit its words."""


def format_bits(value: float) -> str:
    r"""A number of bits in at most about five characters.

    Args:

        value (float): The number, not negative.

    Returns:
        str: for example ``0``, ``<0.01``, ``0.42``, ``31.4`` or ``1280``.

    Examples::

        >>> format_bits(0.42), format_bits(31.42), format_bits(1280.3)
        ('0.42', '31.4', '1280')
    """
    size = abs(value)
    if size == 0:
        return "0"
    if size < 0.005:
        return "<0.01" if value > 0 else ">-0.01"
    return f"{value:.2f}" if size < 9.995 else f"{value:.1f}" if size < 99.95 else f"{value:.0f}"
