"""The files that hold an :class:`Explanation`: a figure, a page that needs no other file, and data that loads back.

Never pickles. A file appears complete or not at all.
"""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.encoders.timelines import VideoTimeline, ensure_timeline, to_plain
from captum_m2ib.explanations.embedding import encoded_picture, figure_bytes
from captum_m2ib.explanations.page import to_html
from captum_m2ib.explanations.shown import Drawing, Explained

_FORMAT, _VERSION = "captum_m2ib.explanation", 4
_READ = (1, 2, 3, 4)
_MAX_PIXELS = 128_000_000


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


def written_line(path: Path) -> str:
    """What a command says of a file that it wrote."""
    return f"{'picture' if path.suffix.lower() in FIGURES else 'written'}  {os.fspath(path)}"


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


def _to_page(explanation: Explained, drawing: Drawing) -> bytes:
    return to_html(explanation, drawing.original, style=drawing.style)


FIGURES = {".png": "png", ".pdf": "pdf", ".svg": "svg"}
"""Endings of figures' names, and what they are."""


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
        "timeline": to_plain(explanation.timeline),
    }


def _fields(header: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an Explanation that a header holds."""
    if header.get("format") != _FORMAT:
        raise ValueError(f"its format is {header.get('format')!r}, not {_FORMAT!r}")
    if header.get("version") not in _READ:
        known = ", ".join(map(str, _READ))
        raise ValueError(f"its version is {header.get('version')!r}; this release reads versions {known}")
    fields = {name: header[name] for name in ("caption", "tokens", "special", "score", "settings", "record")}
    # Version 1 knew no checks, version 2 neither other units than bits nor regions, version 3 no time.
    later = {name: header.get(name) for name in ("check", "region", "timeline")}
    return {**fields, **later, "unit": header.get("unit", "bits")}


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
        # Frames below one another.
        "image_png": encoded_picture(explanation.image.reshape(-1, *explanation.image.shape[-2:]), "PNG"),
    }
    return json.dumps(document).encode("ascii")


def _from_json(data: bytes) -> dict[str, Any]:
    document = json.loads(data)
    patch_bits = document["patch_bits"]
    fields = _fields(document)
    picture = _picture(base64.b64decode(document["image_png"], validate=True))
    timeline = None if fields["timeline"] is None else ensure_timeline(fields["timeline"])
    if isinstance(timeline, VideoTimeline):
        picture = picture.reshape(len(timeline.frames), -1, *picture.shape[1:])
    return {
        **fields,
        "image_bits": np.array(document["image_bits"], dtype=np.float32),
        "patch_bits": None if patch_bits is None else np.array(patch_bits, dtype=np.float32),
        "token_bits": np.array(document["token_bits"], dtype=np.float32),
        "image": picture,
    }


def _picture(png: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=("PNG",)) as picture:
        if picture.width * picture.height > _MAX_PIXELS:
            raise ValueError(f"its picture has {picture.width} x {picture.height} pixels, too many to open safely")
        return np.asarray(picture.convert("RGB"))


WRITERS: dict[str, Callable[[Explained, Drawing], bytes]] = {
    ".png": to_png,
    ".pdf": _to_pdf,
    ".svg": _to_svg,
    ".html": _to_page,
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
