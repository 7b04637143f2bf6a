"""An explanation as one page: the map over its picture as strong as one likes, numbers under the pointer, and words.

It needs no other file, and lets nothing in but its own script. Without scripts it shows the map and all totals.
"""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from captum_m2ib.explanations.embedding import data_text, encoded_picture, figure_bytes, ramps, source_of
from captum_m2ib.explanations.shown import Explained
from captum_m2ib.explanations.timed_figure import panels_figure
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import PALETTES, at_display_size, heat_colors, overlay, token_html

if TYPE_CHECKING:
    from captum_m2ib.encoders.pictures import PictureLike
    from captum_m2ib.encoders.timelines import Timeline

_HERE = Path(__file__).parent
# A map without patches is read in at most so many parts along each side.
_PARTS = 16


def to_html(
    explanation: Explained,
    original: PictureLike | None = None,
    *,
    style: str = "heat",
    interactions: ArrayLike | None = None,
) -> bytes:
    r"""An explanation as a page.

    Args:

        explanation (Explanation): What is shown.
        original (picture, optional): The whole picture, as for :meth:`captum_m2ib.Explanation.plot`. Default: None
        style (str, optional): ``"heat"``, or ``"safe"`` for grey prints and colour blindness. Default: "heat"
        interactions (array, optional): Per token, how each patch acts together with it, (tokens, rows, columns), in
            units of the score: a click on a token then shows its patches. Default: None (tokens are not clickable)

    Returns:
        bytes: HTML in UTF-8.

    Raises:
        ValueError: as for :meth:`captum_m2ib.Explanation.bits_over`, if interactions are not of the tokens, or not
            finite, if either is given for a sound or a video, or for another style.

    Examples::

        >>> to_html(explain(encoder, images[0], captions[0], method="legrad")[0])[:15]
        b'<!DOCTYPE html>'
    """
    if style not in PALETTES:
        raise ValueError(f"style: a page is drawn as one of {', '.join(PALETTES)}, got {style!r}; save a figure.")
    timeline = explanation.timeline
    if timeline is None:
        maps = _maps(explanation, original, style)
        data = data_text({**_data(explanation, original, interactions), "colours": ramps(style)})
    elif original is None and interactions is None:
        maps, data = _timed(explanation, timeline, style), None
    else:
        raise ValueError(
            f"original, interactions: these are laid over a picture, and this is a {explanation.kind}; leave them out."
        )
    beside = explanation.settings.get("beside")
    empty = "(empty caption)" if beside is None else f"{explanation.kind}, compared with a {html.escape(str(beside))}"
    caption = html.escape(explanation.caption) or empty
    body = f"""<h1><bdi>{caption}</bdi></h1>
<p class="totals">{" · ".join(_totals(explanation))}</p>
{_notes(explanation)}{maps}
{_tokens(explanation, data is not None)}{_details(explanation)}"""
    return html_page(caption, body, data)


def _tokens(explanation: Explained, can_be_clicked: bool) -> str:
    if not explanation.tokens:
        return ""
    tokens = token_html(explanation.tokens, explanation.token_bits, explanation.special, unit=explanation.unit)
    how = ' <span class="quiet" id="how" hidden>· click one to see its patches</span>' if can_be_clicked else ""
    return f"""<h2>tokens, {WORDINGS[explanation.unit].name} below each{how}</h2>
<div id="tokens">
{tokens}
</div>
"""


def html_page(title: str, body: str, data: str | None = None) -> bytes:
    r"""A page that asks for nothing but its own pictures, style and script.

    Args:

        title (str): HTML without elements.
        body (str): HTML.
        data (str, optional): What the script of a map reads, as :func:`data_text` writes it. Default: None (no script)

    Returns:
        bytes: HTML in UTF-8.
    """
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policy, scripts = "default-src 'none'; img-src data:; style-src 'unsafe-inline'", ""
    if data is not None:
        policy += f"; script-src {source_of(script)}"
        scripts = f'\n<script type="application/json" id="data">{data}</script>\n<script>{script}</script>'
    page = f"""<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="color-scheme" content="light">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}{scripts}
</body>
</html>
"""
    return page.encode("utf-8", "replace")


def _maps(explanation: Explained, original: PictureLike | None, style: str) -> str:
    """A picture, the same under its map, and the map's colours."""
    wording = WORDINGS[explanation.unit]
    picture, values = explanation.shown(original)
    heat, scale = wording.per_pixels(values.astype(np.float64))
    is_signed = wording.is_signed(heat)
    shown = at_display_size(picture)
    title = wording.title(heat)
    first, second = (
        f"data:image/jpeg;base64,{encoded_picture(panel, 'JPEG', quality=90, subsampling=0)}"
        for panel in (shown, overlay(shown, heat, signed=is_signed, palette=style))
    )
    colors = heat_colors(24, signed=is_signed, palette=style)
    stops = ",".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * color)) for color in colors)
    most = float(np.abs(heat).max() if is_signed else max(heat.max(), 0.0))
    least = f"−{most:.3g}" if is_signed else "0"
    return f"""<div class="pictures">
<figure><figcaption>picture</figcaption><img id="picture" alt="picture" src="{first}"></figure>
<figure><figcaption id="title">{title}</figcaption>
<div class="view {style}" id="view" aria-label="map; arrow keys go through its parts">
<img alt="{title}" src="{second}"></div>
</figure>
</div>
<div class="tools" id="tools" hidden>
<label>map over picture <input type="range" id="strength" min="0" max="100" value="100"></label>
<output id="read" aria-live="polite">Point at the map to read its numbers.</output>
</div>
<div class="bar" id="bar" style="background:linear-gradient(to right,{stops})"></div>
<div class="scale" id="scale"><span>{least}</span><span>{scale}</span><span>{most:.3g}</span></div>"""


def _timed(explanation: Explained, timeline: Timeline, style: str) -> str:
    """A sound or the frames of a video with their map, as figures draw them."""
    drawn = base64.b64encode(figure_bytes(panels_figure(explanation, timeline, style), "png")).decode("ascii")
    return (
        f'<figure class="timed"><img alt="{explanation.kind} and its map" src="data:image/png;base64,{drawn}"></figure>'
    )


def _totals(explanation: Explained) -> list[str]:
    wording = WORDINGS[explanation.unit]
    totals = [f"{html.escape(explanation.score_name)} {explanation.score:.3f}"]
    if wording.has_totals:
        both = ((explanation.kind, explanation.image_total_bits), ("text", explanation.token_total_bits))
        shown = both if explanation.tokens else both[:1]
        totals += [f"{name} {html.escape(wording.amount(total))}" for name, total in shown]
    return totals


def _notes(explanation: Explained) -> str:
    lines = "".join(f"<li>{html.escape(line)}</li>\n" for line in explanation.notes)
    return lines and f'<ul class="check">\n{lines}</ul>\n'


def _details(explanation: Explained) -> str:
    details = [("settings", explanation.settings)]
    if explanation.record is not None:
        details.append(("record of the optimisation", explanation.record))
    if explanation.check is not None:
        details.append(("figures of the check", explanation.check))
    return "\n".join(
        f"<details><summary>{name}</summary><pre>{html.escape(json.dumps(value, indent=2))}</pre></details>"
        for name, value in details
    )


def _data(explanation: Explained, original: PictureLike | None, interactions: ArrayLike | None) -> dict[str, Any]:
    """What the page's script reads: numbers of the map's parts in words, and where these lie."""
    wording = WORDINGS[explanation.unit]
    patches = explanation.patch_bits
    cells = _parts(explanation.image_bits, wording.has_totals) if patches is None else patches
    box, region = [0.0, 0.0, 1.0, 1.0], explanation.region
    if original is not None and region is not None:
        sides = (region.width, region.height) * 2
        box = [edge / side for edge, side in zip(region[:4], sides, strict=True)]
    return {
        "cells": [[wording.amount(float(value)) for value in row] for row in cells],
        "part": "part" if patches is None else "patch",
        "box": box,
        "interactions": None if interactions is None else _checked(interactions, len(explanation.tokens), cells.shape),
    }


def _parts(values: NDArray[np.float32], has_totals: bool) -> NDArray[np.float32]:
    """A map of pixels in a few rows and columns: sums, or means where sums mean nothing."""
    edges = [np.arange(min(side, _PARTS)) * side // min(side, _PARTS) for side in values.shape]
    sums = np.add.reduceat(np.add.reduceat(values, edges[0], 0), edges[1], 1)
    if has_totals:
        return sums
    counts = [np.diff(edge, append=side) for edge, side in zip(edges, values.shape, strict=True)]
    found: NDArray[np.float32] = (sums / np.outer(*counts)).astype(np.float32)
    return found


def _checked(interactions: ArrayLike, tokens: int, grid: tuple[int, ...]) -> list[Any]:
    values = np.asarray(interactions, dtype=np.float64)
    if values.shape != (tokens, *grid) or not np.isfinite(values).all():
        raise ValueError(
            f"interactions: expected finite numbers of shape {(tokens, *grid)}, a map of patches per token, got shape "
            f"{values.shape}."
        )
    # Four digits are more than a page can show, and a third of the file.
    rounded: list[Any] = [[[float(f"{value:.4g}") for value in row] for row in token] for token in values]
    return rounded
