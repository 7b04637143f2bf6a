"""Several methods, or several captions, on one picture, sound or video: made in turn, shown side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pairs import Media, load_media
from captum_m2ib.explanations.comparison_figure import comparison_figure
from captum_m2ib.explanations.comparison_page import comparison_page
from captum_m2ib.explanations.embedding import figure_bytes
from captum_m2ib.explanations.explain import explain
from captum_m2ib.explanations.explanation import Explanation
from captum_m2ib.explanations.files import FIGURES, check_output, one_of, replace_file
from captum_m2ib.explanations.methods import Method

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARED = {**FIGURES, ".html": "html"}
"""Endings of a comparison's files, and what they are."""

__all__ = ["COMPARED", "Comparison", "MethodRow", "compare"]


@dataclass(frozen=True)
class MethodRow:
    r"""What one method says.

    Attributes:

        name (str): The method's name, or its class's.
        explanations (tuple[Explanation, ...]): One per caption.
        seconds (float): How long they took, checks included.
    """

    name: str
    explanations: tuple[Explanation, ...]
    seconds: float


@dataclass(frozen=True)
class Comparison:
    r"""One picture, sound or video and one caption or more, explained by one method or more.

    Attributes:

        rows (tuple[MethodRow, ...]): One per method, in the order in which they were asked for.
    """

    rows: tuple[MethodRow, ...]

    def plot(self) -> Figure:
        r"""One figure: a row per method, a column per caption; each map in colours up to its own maximum.

        Returns:
            matplotlib.figure.Figure: outside pyplot.
        """
        return comparison_figure([(row.name, row.seconds, row.explanations) for row in self.rows])

    def save(self, path: str | os.PathLike[str]) -> Path:
        r"""Write the figure, or a page with the same; it appears complete or not at all.

        Args:

            path (str or PathLike): Ends in ``.png``, ``.pdf``, ``.svg`` or ``.html``.

        Returns:
            Path: the path that was written.

        Raises:
            ValueError: if the name ends in anything else.
            FileNotFoundError: if the directory does not exist.
        """
        path = check_output(path, COMPARED)
        kind = one_of(COMPARED, path)
        rows = [(row.name, row.seconds, row.explanations) for row in self.rows]
        replace_file(path, comparison_page(rows) if kind == "html" else figure_bytes(self.plot(), kind))
        return path


def compare(
    encoder: DualEncoder,
    image: Media,
    captions: str | Sequence[str],
    methods: Sequence[Method] = ("m2ib", "legrad", "grad-eclip"),
    *,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    **shared: Any,
) -> Comparison:
    r"""Explain one picture, sound or video with several methods, or for several captions, to look at them side by side.

    Args:

        encoder (DualEncoder): With a processor, as for :func:`captum_m2ib.explain`.
        image (picture, sound or video): As for :func:`captum_m2ib.explain`, a single one.
        captions (str or sequence of str): One or more.
        methods (sequence, optional): Each as for :func:`captum_m2ib.explain`. Default: ``("m2ib", "legrad",
            "grad-eclip")``
        settings (mapping, optional): Per name of a method further arguments of its ``attribute``. Default: None
        **shared: Further arguments of :func:`captum_m2ib.explain` for all of them, such as ``check``.

    Returns:
        Comparison: with a row per method.

    Raises:
        ValueError: as :func:`captum_m2ib.explain`, or if there is no method, or settings are of none of them.
        TypeError: as :func:`captum_m2ib.explain`.

    Examples::

        >>> found = compare(encoder, images[0], captions[0], ["legrad", "grad-eclip"])
        >>> [(row.name, row.explanations[0].unit) for row in found.rows]
        [('legrad', 'relative'), ('grad-eclip', 'relative')]
    """
    if isinstance(methods, str) or not methods:
        raise ValueError(f"methods: expected a list of at least one method, got {methods!r}.")
    names = [method if isinstance(method, str) else type(method).__name__ for method in methods]
    if unknown := sorted(set(settings or {}) - set(names)):
        raise ValueError(f"settings: {', '.join(unknown)} is not among the methods; they are {', '.join(names)}.")
    media = load_media(image, encoder.sides[0].modality)
    if len(media) != 1:
        raise ValueError(f"image: expected a single picture, sound or video, got {len(media)}; compare one by one.")
    rows = []
    for name, method in zip(names, methods, strict=True):
        began = time.perf_counter()
        found = explain(encoder, media, captions, method=method, **shared, **(settings or {}).get(name, {}))
        rows.append(MethodRow(name, tuple(found), time.perf_counter() - began))
    return Comparison(tuple(rows))
