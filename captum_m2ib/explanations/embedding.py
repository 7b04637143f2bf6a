"""What goes into a page that needs no other file: data, pictures and colours, and how a policy names its own script."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.explanations.visualization import heat_ramp

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def data_text(value: Any) -> str:
    r"""JSON in which no character can end the element that holds it.

    Args:

        value (Any): What JSON can hold; NaN and infinity are not among it.

    Returns:
        str: to be placed in ``<script type="application/json">``.

    Examples::

        >>> data_text(["</script>"])
        '["\\u003c/script\\u003e"]'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def source_of(text: str) -> str:
    """How a Content-Security-Policy names a style or script that stands in the page itself."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii")
    return f"'sha256-{digest}'"


def encoded_picture(image: NDArray[np.uint8], kind: str, **options: int) -> str:
    """The picture as a file of this kind, in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as a file; the same figure gives the same file, and letters of a PDF stay letters."""
    from matplotlib import rc_context

    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    buffer = io.BytesIO()
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "captum_m2ib"}):
        figure.savefig(buffer, format=kind, metadata=undated.get(kind))
    return buffer.getvalue()


def ramps(palette: str = "heat") -> dict[str, list[list[int]]]:
    """256 colours of heat as red, green, blue and opacity, and as many for values below zero."""
    sides = {"heat": heat_ramp(0.85, palette=palette), "cold": heat_ramp(0.85, below=True, palette=palette)}
    return {
        name: np.rint(255 * np.concatenate([colors, opacity[:, None]], axis=1)).astype(int).tolist()
        for name, (colors, opacity) in sides.items()
    }
