"""Methods one below the other, captions beside each other, as a page that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Sequence

from captum_m2ib.explanations.comparison_figure import how_to_read, row_title
from captum_m2ib.explanations.embedding import encoded_picture
from captum_m2ib.explanations.lettering import format_score, visible
from captum_m2ib.explanations.page import html_page
from captum_m2ib.explanations.shown import Explained
from captum_m2ib.explanations.stills import still
from captum_m2ib.explanations.visualization import token_html


def comparison_page(rows: Sequence[tuple[str, float, Sequence[Explained]]]) -> bytes:
    r"""Write explanations of one picture, sound or video side by side.

    Args:

        rows (sequence): Per method its name, its seconds, and an explanation per caption.

    Returns:
        bytes: HTML in UTF-8.
    """
    captions = [html.escape(visible(one.caption)) or "(empty caption)" for one in rows[0][2]]
    parts = [
        f"<h1><bdi>{' · '.join(captions)}</bdi></h1>",
        f'<p class="totals">{html.escape(how_to_read(rows[0][2]))}</p>',
    ]
    for name, seconds, found in rows:
        parts.append(f"<h2>{html.escape(row_title(name, seconds, found[0].unit))}</h2>")
        parts.append('<div class="pictures">')
        parts += [_cell(one, caption) for one, caption in zip(found, captions, strict=True)]
        parts.append("</div>")
    return html_page(" · ".join(captions), "\n".join(parts))


def _cell(shown: Explained, caption: str) -> str:
    picture = encoded_picture(still(shown), "JPEG", quality=90, subsampling=0)
    notes = "".join(f"<li>{html.escape(visible(note))}</li>" for note in shown.notes)
    tokens = token_html(shown.tokens, shown.token_bits, shown.special, unit=shown.unit)
    return (
        f"<figure><figcaption>{format_score(shown.score)} <bdi>{caption}</bdi></figcaption>"
        f'<img alt="map" src="data:image/jpeg;base64,{picture}"><div>{tokens}</div>'
        + (f'<ul class="check">{notes}</ul>' if notes else "")
        + "</figure>"
    )
