"""The files that hold an :class:`Explanation`: a figure, a page that needs no other file, and data that loads back.

Never pickles. A file appears complete or not at all.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.encoders.regions import Region
from captum_m2ib.explanations.shown import Shown
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import (
    PALETTES,
    at_display_size,
    heat_colors,
    overlay,
    token_html,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from captum_m2ib.encoders.pictures import PictureLike

_FORMAT, _VERSION = "captum_m2ib.explanation", 3
_READ = (1, 2, 3)
_MAX_PIXELS = 128_000_000


class Explained(Shown, Protocol):
    """What there is to write: the fields of an :class:`captum_m2ib.Explanation`, its totals and its figure."""

    @property
    def score_name(self) -> str: ...
    @property
    def patch_bits(self) -> NDArray[np.float32] | None: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def record(self) -> dict[str, Any] | None: ...
    @property
    def check(self) -> dict[str, Any] | None: ...
    @property
    def image_total_bits(self) -> float: ...
    @property
    def token_total_bits(self) -> float: ...
    @property
    def region(self) -> Region | None: ...
    def shown(self, original: PictureLike | None = None) -> tuple[NDArray[np.uint8], NDArray[np.float32]]: ...
    def plot(self, original: PictureLike | None = None, *, style: str = "heat", share: float = 0.5) -> Figure: ...


def check_output(path: str | os.PathLike[str], kinds: Mapping[str, Any] | None = None) -> Path:
    """Whether a file of one of these kinds, by default an :class:`Explanation`'s, could be written there.

    Raises:
        ValueError: if the name ends in none of them, or is a directory's.
        FileNotFoundError: if the directory does not exist.
    """
    path = Path(path)
    one_of(WRITERS if kinds is None else kinds, path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a directory: name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the directory {str(path.parent)!r} does not exist: create it before saving there")
    return path


class Drawing(NamedTuple):
    """How a figure or a page is drawn: over which picture, and in which style."""

    original: PictureLike | None = None
    style: str = "heat"
    share: float = 0.5


_AS_USUAL = Drawing()


def to_png(explanation: Explained, drawing: Drawing = _AS_USUAL) -> bytes:
    return _drawn(explanation, drawing, "png")


def _to_pdf(explanation: Explained, drawing: Drawing) -> bytes:
    return _drawn(explanation, drawing, "pdf")


def _to_svg(explanation: Explained, drawing: Drawing) -> bytes:
    return _drawn(explanation, drawing, "svg")


def _drawn(explanation: Explained, drawing: Drawing, kind: str) -> bytes:
    figure = explanation.plot(drawing.original, style=drawing.style, share=drawing.share)
    return figure_bytes(figure, kind)


FIGURES = {".png": "png", ".pdf": "pdf", ".svg": "svg"}
"""Endings of figures' names, and what they are."""


def figure_bytes(figure: Figure, kind: str) -> bytes:
    """A figure as a file; the same figure gives the same file, and letters of a PDF stay letters."""
    from matplotlib import rc_context

    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}
    buffer = io.BytesIO()
    with rc_context({"pdf.fonttype": 42, "svg.hashsalt": "captum_m2ib"}):
        figure.savefig(buffer, format=kind, metadata=undated.get(kind))
    return buffer.getvalue()


def _header(explanation: Explained) -> dict[str, Any]:
    """The fields that are not arrays, and what the file is."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "caption": explanation.caption,
        "tokens": list(explanation.tokens),
        "special": list(explanation.special),
        "score": explanation.score,
        "settings": explanation.settings,
        "record": explanation.record,
        "check": explanation.check,
        "unit": explanation.unit,
        "region": explanation.region,
    }


def _fields(header: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an Explanation that a header holds."""
    if header.get("format") != _FORMAT:
        raise ValueError(f"its format is {header.get('format')!r}, not {_FORMAT!r}")
    if header.get("version") not in _READ:
        known = ", ".join(map(str, _READ))
        raise ValueError(f"its version is {header.get('version')!r}; this release reads versions {known}")
    fields = {name: header[name] for name in ("caption", "tokens", "special", "score", "settings", "record")}
    # Version 1 knew no checks, and version 2 neither other units than bits nor regions.
    return {**fields, "check": header.get("check"), "unit": header.get("unit", "bits"), "region": header.get("region")}


def _undrawn(drawing: Drawing, kind: str) -> None:
    if drawing.original is not None:
        raise ValueError(f"original: {kind} holds what the model saw and where; leave it out, or give it to plot().")
    if drawing.style != "heat":
        raise ValueError(f"style: {kind} holds numbers, which are drawn when they are looked at; leave it out.")


def _to_npz(explanation: Explained, drawing: Drawing) -> bytes:
    _undrawn(drawing, ".npz")
    arrays: dict[str, Any] = {name: getattr(explanation, name) for name in ("image", "image_bits", "token_bits")}
    if explanation.patch_bits is not None:
        arrays["patch_bits"] = explanation.patch_bits
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=np.array(json.dumps(_header(explanation))), **arrays)
    return buffer.getvalue()


def _from_npz(data: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(data), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in ("image", "image_bits", "token_bits")}
        arrays["patch_bits"] = stored.get("patch_bits")
        return {**_fields(json.loads(str(stored["header"]))), **arrays}


def _to_json(explanation: Explained, drawing: Drawing) -> bytes:
    _undrawn(drawing, ".json")
    patch_bits = explanation.patch_bits
    document = {
        **_header(explanation),
        "image_bits": explanation.image_bits.tolist(),
        "patch_bits": None if patch_bits is None else patch_bits.tolist(),
        "token_bits": explanation.token_bits.tolist(),
        "image_png": encoded_picture(explanation.image, "PNG"),
    }
    return json.dumps(document).encode("ascii")


def _from_json(data: bytes) -> dict[str, Any]:
    document = json.loads(data)
    patch_bits = document["patch_bits"]
    return {
        **_fields(document),
        "image_bits": np.array(document["image_bits"], dtype=np.float32),
        "patch_bits": None if patch_bits is None else np.array(patch_bits, dtype=np.float32),
        "token_bits": np.array(document["token_bits"], dtype=np.float32),
        "image": _picture(base64.b64decode(document["image_png"], validate=True)),
    }


def _picture(png: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
        if picture.width * picture.height > _MAX_PIXELS:
            raise ValueError(f"its picture has {picture.width} x {picture.height} pixels, too many to open safely")
        return np.asarray(picture.convert("RGB"))


def encoded_picture(image: NDArray[np.uint8], kind: str, **options: int) -> str:
    """The picture as a file of this kind, in base64."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind, **options)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:60rem;padding:1.25rem;background:#fff;color:#1b1b1f;
  font:1rem/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
h1{font-size:1.35rem;line-height:1.35;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1rem;margin:1.6rem 0 .5rem}
.totals{color:#5c5c66;margin:0 0 1rem}
.check{color:#5c5c66;margin:0 0 1rem;padding-left:1.2rem;font-size:.875rem}
.pictures{display:flex;flex-wrap:wrap;gap:1rem}
figure{flex:1 1 17rem;min-width:0;max-width:100%;margin:0}
figure img{display:block;width:100%;max-height:75vh;object-fit:contain;object-position:left top}
figcaption{color:#5c5c66;font-size:.875rem;margin-bottom:.25rem}
.bar{height:.8rem;margin-top:1rem;border:1px solid #b8b8c2;border-radius:3px}
.scale{display:flex;justify-content:space-between;gap:1rem;font-size:.875rem;color:#5c5c66}
details{margin-top:1rem}
summary{cursor:pointer}
pre{background:#f4f4f6;padding:.75rem;border-radius:5px;overflow-x:auto;font-size:.8125rem}
""".strip()


def _to_html(explanation: Explained, drawing: Drawing) -> bytes:
    if drawing.style not in PALETTES:
        known = ", ".join(PALETTES)
        raise ValueError(f"style: a page is drawn as one of {known}, got {drawing.style!r}; save a figure.")
    wording = WORDINGS[explanation.unit]
    picture, values = explanation.shown(drawing.original)
    heat, scale = wording.per_pixels(values.astype(np.float64))
    is_signed = wording.is_signed(heat)
    shown = at_display_size(picture)
    heated = overlay(shown, heat, signed=is_signed, palette=drawing.style)
    pictures = (("picture", shown), (wording.title(heat), heated))
    figures = "\n".join(
        f'<figure><figcaption>{name}</figcaption><img alt="{name}" src="data:image/jpeg;base64,'
        f'{encoded_picture(panel, "JPEG", quality=90, subsampling=0)}"></figure>'
        for name, panel in pictures
    )
    colors = heat_colors(24, signed=is_signed, palette=drawing.style)
    stops = ",".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * color)) for color in colors)
    most = float(np.abs(heat).max() if is_signed else max(heat.max(), 0.0))
    least = f"−{most:.3g}" if is_signed else "0"
    details = [("settings", explanation.settings)]
    if explanation.record is not None:
        details.append(("record of the optimisation", explanation.record))
    if explanation.check is not None:
        details.append(("figures of the check", explanation.check))
    check = "".join(f"<li>{html.escape(line)}</li>\n" for line in explanation.notes)
    check = check and f'<ul class="check">\n{check}</ul>\n'
    details_html = "\n".join(
        f"<details><summary>{name}</summary><pre>{html.escape(json.dumps(value, indent=2))}</pre></details>"
        for name, value in details
    )
    caption = html.escape(explanation.caption) or "(empty caption)"
    tokens = token_html(explanation.tokens, explanation.token_bits, explanation.special, unit=explanation.unit)
    totals = [f"{html.escape(explanation.score_name)} {explanation.score:.3f}"]
    if wording.has_totals:
        both = (("image", explanation.image_total_bits), ("text", explanation.token_total_bits))
        totals += [f"{name} {html.escape(wording.amount(total))}" for name, total in both]
    body = f"""<h1><bdi>{caption}</bdi></h1>
<p class="totals">{" · ".join(totals)}</p>
{check}<div class="pictures">
{figures}
</div>
<div class="bar" style="background:linear-gradient(to right,{stops})"></div>
<div class="scale"><span>{least}</span><span>{scale}</span><span>{most:.3g}</span></div>
<h2>tokens, {wording.name} below each</h2>
<div>
{tokens}
</div>
{details_html}"""
    return html_page(caption, body)


def html_page(title: str, body: str) -> bytes:
    """A page that asks for nothing but its own pictures and styles; both texts are HTML."""
    page = f"""<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="light">
<title>{title}</title>
<style>
{_STYLE}
</style>
</head>
<body>
{body}
</body>
</html>
"""
    return page.encode("utf-8", "replace")


WRITERS: dict[str, Callable[[Explained, Drawing], bytes]] = {
    ".png": to_png,
    ".pdf": _to_pdf,
    ".svg": _to_svg,
    ".html": _to_html,
    ".npz": _to_npz,
    ".json": _to_json,
}
READERS: dict[str, Callable[[bytes], dict[str, Any]]] = {".npz": _from_npz, ".json": _from_json}


def one_of(handlers: Mapping[str, Any], path: Path) -> Any:
    handler = handlers.get(path.suffix.lower())
    if handler is None:
        raise ValueError(f"the file name must end in one of {', '.join(handlers)}, got {path.name!r}")
    return handler


def replace_file(path: Path, data: bytes) -> None:
    """Put data at path in one step: readers see the old file or the whole new one."""
    # Not tempfile: its files are private to the user, whatever the umask says about new files.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
