"""A page in which a word shows its patches and a patch its words: one file, no network, nothing taken for markup."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from captum_m2ib.explanations.embedding import encoded_picture
from captum_m2ib.explanations.lettering import format_score, visible
from captum_m2ib.explanations.visualization import at_display_size, heat_colors
from captum_m2ib.games.figure import Shown, told

_HERE = Path(__file__).parent
_COLOURS = 201


def interactions_page(shown: Shown) -> bytes:
    r"""Write the page.

    Args:

        shown (Interactions): What there is to show.

    Returns:
        bytes: HTML in UTF-8.
    """
    style, script = ((_HERE / f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in (style, script)]
    caption = html.escape(visible(shown.caption)) or "(empty caption)"
    score = html.escape(f"{shown.score_name} {format_score(shown.score)}")
    words = "\n".join(
        f'<button type="button" aria-pressed="false" data-word="{index}"><bdi>{html.escape(visible(token))}</bdi>'
        '<span class="value"></span></button>'
        for index, token in enumerate(shown.tokens)
    )
    page = Template((_HERE / "page.html").read_text(encoding="utf-8")).substitute(
        policy=f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        caption=caption,
        score=score,
        told=html.escape(told(shown)),
        words=words,
        picture=encoded_picture(at_display_size(shown.image), "JPEG", quality=90, subsampling=0),
        data=_data(shown),
    )
    return page.encode("utf-8", "replace")


def _data(shown: Shown) -> str:
    """JSON in which no character can end the element that holds it."""
    fit = shown.fit
    value: dict[str, Any] = {
        "places": shown.places.tolist(),
        "picture": _rounded(fit.picture),
        "caption": _rounded(fit.caption),
        "across": _rounded(fit.across),
        "colours": ["rgb({:.0f},{:.0f},{:.0f})".format(*(255 * colour)) for colour in _heat(1.0)],
    }
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _heat(strength: float) -> Any:
    """Colours from minus the maximum to it."""
    return heat_colors(_COLOURS, strength=strength, signed=True)


def _rounded(values: Any) -> Any:
    """Numbers with six digits that count, as a page needs."""
    return np.vectorize(lambda value: float(f"{value:.6g}"), otypes=[float])(values).tolist()
