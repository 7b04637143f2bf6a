"""A page in which a word shows its patches and a patch its words: one file, no network, nothing taken for markup."""

from __future__ import annotations

import html
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from captum_m2ib.explanations.embedding import data_text, encoded_picture
from captum_m2ib.explanations.lettering import format_score, visible
from captum_m2ib.explanations.reports import page_policy
from captum_m2ib.explanations.visualization import at_display_size, heat_colors
from captum_m2ib.games.figure import Played, told

_HERE = Path(__file__).parent
_COLOURS = 201


def interactions_page(shown: Played) -> bytes:
    r"""Write the page.

    Args:

        shown (Interactions): What there is to show.

    Returns:
        bytes: HTML in UTF-8.
    """
    style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    caption = html.escape(visible(shown.caption)) or "(empty caption)"
    score = html.escape(f"{shown.score_name} {format_score(shown.score)}")
    words = "\n".join(
        f'<button type="button" aria-pressed="false" data-word="{index}"><bdi>{html.escape(visible(token))}</bdi>'
        '<span class="value"></span></button>'
        for index, token in enumerate(shown.tokens)
    )
    page = Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        policy=page_policy(style, script),
        style=style,
        script=script,
        caption=caption,
        score=score,
        told=html.escape(told(shown)),
        words=words,
        picture=encoded_picture(at_display_size(shown.image), "JPEG", quality=90, subsampling=0),
        data=data_text(_data(shown)),
    )
    return page.encode("utf-8", "replace")


def _data(shown: Played) -> dict[str, Any]:
    """What the page's script shows."""
    fit = shown.fit
    return {
        "places": shown.places.tolist(),
        "picture": _rounded(fit.picture),
        "caption": _rounded(fit.caption),
        "across": _rounded(fit.across),
        "colours": ["rgb({:.0f},{:.0f},{:.0f})".format(*(255 * colour)) for colour in _heat(1.0)],
    }


def _heat(strength: float) -> Any:
    """Colours from minus the maximum to it."""
    return heat_colors(_COLOURS, strength=strength, signed=True)


def _rounded(values: Any) -> Any:
    """Numbers with six digits that count, as a page needs."""
    return np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])(values).tolist()
