"""An explanation's check of itself: its figures as plain data, and in words that need no other page.

Figures are those of :mod:`captum_m2ib.engine.check`, one pair's at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from captum_m2ib.engine.verdict import HOLDING_KEPT, LEAST_SHARE, VERDICTS, worst

if TYPE_CHECKING:
    from captum_m2ib.engine.check import Check

MODALITIES = ("image", "text")
"""What is checked of a pair."""

_VERBS = {"holds": "holds", "weak": "is weak", "fails": "fails"}

FIGURES = ("score", "closed", "range", "kept", "lost_top", "lost_random")
"""What is measured of a modality, beside its verdict."""


def pair_checks(checks: Sequence[Check], has_gates: bool = True) -> list[dict[str, Any]]:
    r"""The checks of a batch, pair by pair.

    Args:

        checks (sequence of Check): The image's and the text's.
        has_gates (bool, optional): Whether the maps come from gates, so that what these keep can be said; else verdicts
            are those of the margins alone. Default: True

    Returns:
        list[dict]: per pair what :attr:`captum_m2ib.Explanation.check` holds.
    """
    columns = {name: _columns(check) for name, check in zip(MODALITIES, checks, strict=True)}
    if not has_gates:
        for column, check in zip(columns.values(), checks, strict=True):
            column["kept"] = [None] * len(check.score)
            column["verdict"] = check.verdicts(by_margin=True)
    found = []
    for i in range(len(checks[0].score)):
        pair = {name: {figure: values[i] for figure, values in column.items()} for name, column in columns.items()}
        found.append({**pair, "verdict": worst(pair[name]["verdict"] for name in MODALITIES)})
    return found


def _columns(check: Check) -> dict[str, list[Any]]:
    return {**{name: getattr(check, name).tolist() for name in FIGURES}, "verdict": check.verdicts()}


def ensure_check(value: Any) -> dict[str, Any]:
    r"""A copy of a check, once it is known to be one.

    Args:

        value (Any): Of :func:`pair_checks`, or read from a file.

    Returns:
        dict: with no other entries than a check has.

    Raises:
        ValueError: if a figure or verdict is missing, or is none.
    """
    if not isinstance(value, Mapping) or value.get("verdict") not in VERDICTS:
        raise ValueError(f"check: expected a dict with a verdict, one of {', '.join(VERDICTS)}, got {value!r:.80}")
    found: dict[str, Any] = {}
    for name in MODALITIES:
        part = value.get(name)
        if not isinstance(part, Mapping) or part.get("verdict") not in VERDICTS:
            raise ValueError(f"check: expected figures and a verdict of the {name}, got {part!r:.80}")
        found[name] = {"verdict": part["verdict"]}
        for figure in FIGURES:
            number = part.get(figure)
            if figure == "kept" and figure in part and number is None:
                found[name][figure] = None
                continue
            if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
                raise ValueError(f"check: expected a finite number as the {name}'s {figure}, got {number!r:.80}")
            found[name][figure] = float(number)
    return {**found, "verdict": value["verdict"]}


def told(check: Mapping[str, Any], kind: str = "image", beside: str = "text") -> list[str]:
    r"""A check in words, one line per modality.

    Args:

        check (mapping): Of :func:`pair_checks`.
        kind (str, optional): What the image is called. Default: "image"
        beside (str, optional): What the text is called. Default: "text"

    Returns:
        list[str]: verdicts and what they rest on.

    Examples::

        >>> told(explain(encoder, images[1], captions[1])[0].check)[0].split(": ")[0]
        'image map holds'
    """
    names = zip((kind, beside), MODALITIES, strict=True)
    return [f"{called} map {_VERBS[check[name]['verdict']]}: {_reason(check[name])}" for called, name in names]


def _reason(part: Mapping[str, Any]) -> str:
    if not part["score"] - part["closed"] > LEAST_SHARE * part["range"]:
        return "the score is about as high with everything hidden, so there is nothing to explain"
    lost = f"hiding what it marks takes {_percent(part['lost_top'])} of what the score can lose"
    reason = f"{lost}, random parts {_percent(part['lost_random'])}"
    kept = part["kept"]
    return f"{reason}; it keeps only {_percent(kept)}" if kept is not None and kept < HOLDING_KEPT else reason


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %".replace("-", "−")
