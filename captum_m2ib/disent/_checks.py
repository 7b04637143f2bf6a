"""Checks of arguments, each with the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral
from typing import Any


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse what is not one of the known names."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}.")


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is not a whole number of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or int(value) < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}.")


def check_number(name: str, value: Any, low: float = 0.0, high: float = math.inf, above: bool = False) -> None:
    """Refuse what is not a number from ``low`` (or above it) to below ``high``."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value < high
    if not fits or (above and value == low):
        end = "" if high == math.inf else f" and below {high:g}"
        raise ValueError(
            f"{name}: expected a number {'above' if above else 'of at least'} {low:g}{end}, got {value!r}."
        )
