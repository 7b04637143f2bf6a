"""Which methods a benchmark runs: those that were named, of which the model has what they need."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from captum_m2ib.benchmark.methods import Method
    from captum_m2ib.encoders.dual_encoder import DualEncoder


def named(names: Sequence[str], known: Mapping[str, Method]) -> list[Method]:
    r"""Methods by their names, each once.

    Args:

        names (sequence of str): As given with ``--method``.
        known (mapping): Name to method.

    Returns:
        list[Method]: in the order given.

    Raises:
        ValueError: if a name is unknown.
    """
    if unknown := [name for name in dict.fromkeys(names) if name not in known]:
        raise ValueError(f"--method: expected some of {', '.join(known)}, got {', '.join(unknown)}.")
    return [known[name] for name in dict.fromkeys(names)]


def usable(chosen: Sequence[Method], encoder: DualEncoder) -> list[Method]:
    r"""The methods that this model has what they need for; the others are told of on stderr.

    Args:

        chosen (sequence of Method): The methods.
        encoder (DualEncoder): The model.

    Returns:
        list[Method]: at least one.

    Raises:
        ValueError: if none of them works.
    """
    found, reasons = [], []
    for method in chosen:
        try:
            method(encoder)
            found.append(method)
        except (ValueError, TypeError, RuntimeError) as error:
            reasons.append(f"{method.name}: {short(error)}")
    if not found:
        raise ValueError(f"--method: none of them works on this model ({'; '.join(reasons)}).")
    for reason in reasons:
        print(f"left out  {reason}", file=sys.stderr)
    return found


def short(reason: object) -> str:
    """A reason on one line of at most 500 characters that any file can hold."""
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text.encode("utf-8", "replace").decode("utf-8")[:500]
