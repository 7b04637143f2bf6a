"""What one pair's explanation holds, how it is looked at, and how it is kept on disk.

An :class:`Explanation` is plain data: NumPy arrays, text and numbers, with no reference to a model. Files are
a figure (``.png``), a self-contained page (``.html``) or data that loads back exactly (``.npz``, ``.json``);
never pickles.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.visualization import (
    at_display_size,
    clean_token,
    format_bits,
    heat_colors,
    overlay,
    pair_figure,
    token_html,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from captum_m2ib.attr import LayerRecord, MultiModalInfoBottleneck
    from captum_m2ib.dual_encoder import DualEncoder
    from captum_m2ib.pictures import PictureLike

__all__ = ["Explanation", "explain"]

_FORMAT, _VERSION = "captum_m2ib.explanation", 1
_MAX_PIXELS = 128_000_000


def explain(
    encoder: DualEncoder,
    images: PictureLike | Sequence[PictureLike],
    captions: str | Sequence[str],
    *,
    method: MultiModalInfoBottleneck | None = None,
    internal_batch_size: int | None = 80,
    **settings: Any,
) -> list[Explanation]:
    r"""Explain pairs of pictures and captions: prepare, attribute, and gather what there is to show.

    Args:

        encoder (DualEncoder): With a processor, as :meth:`DualEncoder.from_pretrained` loads it.
        images (picture or sequence of pictures): Paths, PIL images or uint8 arrays (H, W, 3); a single one is paired
            with every caption.
        captions (str or sequence of str): One per image; a single one is paired with every image.
        method (MultiModalInfoBottleneck, optional): The attribution method. Default: None
            (``MultiModalInfoBottleneck(encoder)``)
        internal_batch_size (int, optional): Most rows (pairs times noise draws) in one forward pass; None for all at
            once. Default: 80
        **settings: Further arguments of :meth:`MultiModalInfoBottleneck.attribute`, such as ``beta`` or ``seed``.

    Returns:
        list[Explanation]: one per pair.

    Raises:
        ValueError: if a picture or caption cannot be used, or a setting is out of range.

    Warns:
        BypassWarning: if ``method`` was given layers, and information goes round the units of one; looked at on the
            first four pairs. The recommended layers and those of :meth:`MultiModalInfoBottleneck.published` are not
            looked at.

    Examples::

        >>> explain(encoder, images, captions, n_steps=5)[0].top_tokens(1)[0][0] in captions[0]
        True
    """
    from captum_m2ib.attr import MultiModalInfoBottleneck
    from captum_m2ib.bypass import has_chosen_layers, warn_of_bypass
    from captum_m2ib.layouts import PackedLayout, packed_grid

    method = MultiModalInfoBottleneck(encoder) if method is None else method
    pairs = encoder.prepare(images, captions)
    if has_chosen_layers(method):
        warn_of_bypass(method, pairs.inputs, pairs.additional_forward_args)
    (image_bits, token_bits), record = method.attribute_with_record(
        pairs.inputs,
        additional_forward_args=pairs.additional_forward_args,
        internal_batch_size=internal_batch_size,
        **settings,
    )
    image, text = record.modalities
    real = [row.nonzero().flatten().tolist() for row in encoder.real_tokens(pairs)]
    layout, arguments = method.layouts[0], (*pairs.inputs, *pairs.additional_forward_args)
    patches = None if image.units is None else list(image.units)
    pixels = [bits.sum(0) for bits in image_bits]
    if isinstance(layout, PackedLayout) and image.units is not None:
        patches = [packed_grid(layout, image.units, arguments, i) for i in range(len(pairs))]
        pixels = [_over_pixels(grid, layout.patch_size) for grid in patches]
    return [
        Explanation(
            image=pairs.pictures[i],
            caption=pairs.captions[i],
            tokens=tuple(clean_token(pairs.tokens[i][j]) for j in real[i]),
            special=tuple(pairs.special[i][j] for j in real[i]),
            score=float(image.score_before[i]),
            image_bits=pixels[i].float().cpu().numpy(),
            patch_bits=None if patches is None else patches[i].float().cpu().numpy(),
            token_bits=token_bits[i, real[i]].float().cpu().numpy(),
            settings={
                "method": type(method).__name__,
                "layers": [layer.name for layer in method.layers],
                "priors": [_prior_name(prior) for prior in method.priors],
                **asdict(record.settings),
            },
            record={"image": _course(image, i), "text": _course(text, i)},
        )
        for i in range(len(pairs))
    ]


def _over_pixels(grid: Tensor, patch: tuple[int, int]) -> Tensor:
    """A map of patches spread over the pixels of the picture that they were cut from."""
    from captum_m2ib.layouts import PatchLayout, to_input

    rows, columns = grid.shape
    picture = grid.new_zeros(1, 1, rows * patch[0], columns * patch[1])
    return to_input(PatchLayout(patch), grid[None], picture)[0, 0]


def _prior_name(prior: Any) -> str:
    return "N(0, variance)" if prior is None else prior if isinstance(prior, str) else "standardised"


def check_output(path: str | os.PathLike[str]) -> Path:
    """Whether :meth:`Explanation.save` could write there, asked before any work is done.

    Raises:
        ValueError: if the name ends in none of ``.png``, ``.html``, ``.npz`` and ``.json``, or is a directory's.
        FileNotFoundError: if the directory does not exist.
    """
    path = Path(path)
    _one_of(_WRITERS, path)
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a directory: name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the directory {str(path.parent)!r} does not exist: create it before saving there")
    return path


def _course(record: LayerRecord, index: int) -> dict[str, Any]:
    """One pair's optimisation as JSON."""
    return {
        "layer": record.layer,
        "score": record.score[:, index].tolist(),
        "information": record.information[:, index].tolist(),
        "bits": float(record.bits[index]),
        "score_before": float(record.score_before[index]),
        "score_after": float(record.score_after[index]),
    }


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    r"""How many bits each part of one image–text pair contributes to the model's score.

    Arrays are copied and made read-only; ``settings`` and ``record`` are copied as JSON: tuples become lists.

    Args:

        image (numpy.ndarray): The part of the picture that the model saw, uint8, (H, W, 3), at any resolution.
        caption (str): The caption as it was given.
        tokens (tuple[str, ...]): Display tokens, without padding, the model's special tokens included.
        special (tuple[bool, ...]): For each token, whether it is special (start, end, ...) rather than part of the
            caption.
        score (float): The model's similarity for the pair.
        image_bits (numpy.ndarray): Bits per pixel position of the model's input, float32, (h, w); sums to the image's
            total.
        patch_bits (numpy.ndarray or None): Bits per patch, float32, (gh, gw), or None where the model has no patch
            grid.
        token_bits (numpy.ndarray): Bits per token, float32, (tokens,).
        settings (dict): What the explanation was computed with.
        record (dict, optional): The optimisation's course, such as score and information per step. Default: None

    Raises:
        ValueError: for shapes or lengths that do not fit, values with NaN or infinity, or settings or a record that
            JSON cannot hold.

    Examples::

        >>> explanation = explain(encoder, images[0], captions[0], n_steps=2)[0]
        >>> [token for token, bits in explanation.top_tokens(1)]
        ['white']
        >>> explanation.patch_bits.shape, explanation.image_bits.shape
        ((8, 8), (64, 64))
    """

    image: NDArray[np.uint8]
    caption: str
    tokens: tuple[str, ...]
    special: tuple[bool, ...]
    score: float
    image_bits: NDArray[np.float32]
    patch_bits: NDArray[np.float32] | None
    token_bits: NDArray[np.float32]
    settings: dict[str, Any]
    record: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        image = np.array(self.image)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise ValueError(f"image must be uint8 of shape (H, W, 3), got {image.dtype} of shape {image.shape}")
        tokens, special = tuple(map(str, self.tokens)), tuple(map(bool, self.special))
        token_bits = _frozen_floats(self.token_bits, "token_bits", ndim=1)
        if not len(tokens) == len(special) == len(token_bits):
            raise ValueError(
                "tokens, special and token_bits must have one length, "
                f"got {len(tokens)}, {len(special)} and {len(token_bits)}"
            )
        if not np.isfinite(self.score):
            raise ValueError(f"score must be finite, got {self.score}")
        image.setflags(write=False)
        values = {
            "image": image,
            "tokens": tokens,
            "special": special,
            "score": float(self.score),
            "image_bits": _frozen_floats(self.image_bits, "image_bits", ndim=2),
            "patch_bits": None if self.patch_bits is None else _frozen_floats(self.patch_bits, "patch_bits", ndim=2),
            "token_bits": token_bits,
            "settings": _json_copy(self.settings, "settings"),
            "record": None if self.record is None else _json_copy(self.record, "record"),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        caption = self.caption if len(self.caption) <= 60 else self.caption[:59] + "…"
        rows, columns = self.image_bits.shape
        return (
            f"Explanation({caption!r}, score={self.score:.4g}, "
            f"image: {format_bits(self.image_total_bits)} bits over {rows} x {columns} pixels, "
            f"text: {format_bits(self.token_total_bits)} bits over {len(self.tokens)} tokens)"
        )

    @property
    def image_total_bits(self) -> float:
        """The bits that the whole image contributes."""
        return float(self.image_bits.sum(dtype=np.float64))

    @property
    def token_total_bits(self) -> float:
        """The bits that the whole text contributes, special tokens included."""
        return float(self.token_bits.sum(dtype=np.float64))

    def top_tokens(self, k: int = 5, *, include_special: bool = False) -> list[tuple[str, float]]:
        r"""The k tokens with the most bits, most first; equal ones in the caption's order.

        Args:

            k (int, optional): At most so many. Default: 5
            include_special (bool, optional): Whether start, end and the like count. Default: False

        Returns:
            list[tuple[str, float]]: token and bits.

        Raises:
            ValueError: if ``k`` is negative.
        """
        if k < 0:
            raise ValueError(f"k must not be negative, got {k}")
        rows = zip(self.tokens, self.token_bits.tolist(), self.special, strict=True)
        kept = [(token, bits) for token, bits, special in rows if include_special or not special]
        return sorted(kept, key=lambda row: -row[1])[:k]

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return _to_png(self)

    def plot(self) -> Figure:
        r"""The explanation as a figure; see :func:`captum_m2ib.visualization.pair_figure`.

        Returns:
            matplotlib.figure.Figure: outside pyplot; save it with ``figure.savefig(path)``.
        """
        return pair_figure(
            self.image,
            self.image_bits,
            self.tokens,
            self.token_bits,
            score=self.score,
            caption=self.caption,
            special=self.special,
            patch_bits=self.patch_bits,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        r"""Write the explanation to a file; the name's ending says how.

        ``.png``: the figure. ``.html``: one page that needs no other file. ``.npz`` and ``.json``: data that
        :meth:`load` reads back exactly. The file appears complete or not at all, and replaces an older one.

        Args:

            path (str or PathLike): The file, in a directory that exists.

        Returns:
            Path: the path that was written.

        Raises:
            ValueError: if the name ends in anything else.
            FileNotFoundError: if the directory does not exist.
        """
        path = check_output(path)
        write = _one_of(_WRITERS, path)
        _replace_file(path, write(self))
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Explanation:
        r"""Read what :meth:`save` wrote as ``.npz`` or ``.json``; every field is equal to the one saved.

        Args:

            path (str or PathLike): The file.

        Returns:
            Explanation: equal to the one that was saved.

        Raises:
            ValueError: if the name ends in anything else, or the file holds no explanation.
            FileNotFoundError: if there is no such file.
        """
        path = Path(path)
        read = _one_of(_READERS, path)
        data = path.read_bytes()
        try:
            return cls(**read(data))
        except Exception as error:
            raise ValueError(f"{str(path)!r} does not hold an explanation: {error}") from error


def _to_png(explanation: Explanation) -> bytes:
    buffer = io.BytesIO()
    explanation.plot().savefig(buffer, format="png")
    return buffer.getvalue()


def _header(explanation: Explanation) -> dict[str, Any]:
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
    }


def _fields(header: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an Explanation that a header holds."""
    if header.get("format") != _FORMAT:
        raise ValueError(f"its format is {header.get('format')!r}, not {_FORMAT!r}")
    if header.get("version") != _VERSION:
        raise ValueError(f"its version is {header.get('version')!r}; this release reads version {_VERSION}")
    return {name: header[name] for name in ("caption", "tokens", "special", "score", "settings", "record")}


def _to_npz(explanation: Explanation) -> bytes:
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


def _to_json(explanation: Explanation) -> bytes:
    patch_bits = explanation.patch_bits
    document = {
        **_header(explanation),
        "image_bits": explanation.image_bits.tolist(),
        "patch_bits": None if patch_bits is None else patch_bits.tolist(),
        "token_bits": explanation.token_bits.tolist(),
        "image_png": _encoded(explanation.image, "PNG"),
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


def _encoded(image: NDArray[np.uint8], kind: str, **options: int) -> str:
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


def _to_html(explanation: Explanation) -> bytes:
    if explanation.patch_bits is None:
        heat, unit = explanation.image_bits, "bits per pixel"
    else:
        rows, columns = explanation.patch_bits.shape
        heat, unit = explanation.patch_bits, f"bits per patch ({rows} × {columns} patches)"
    shown = at_display_size(explanation.image)
    pictures = (
        ("picture", shown),
        (
            "where its information is" if heat.max() > 0 else "no information anywhere",
            overlay(shown, heat),
        ),
    )
    figures = "\n".join(
        f'<figure><figcaption>{name}</figcaption><img alt="{name}" src="data:image/jpeg;base64,'
        f'{_encoded(picture, "JPEG", quality=90, subsampling=0)}"></figure>'
        for name, picture in pictures
    )
    stops = ",".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * color)) for color in heat_colors(24))
    details = [("settings", explanation.settings)]
    if explanation.record is not None:
        details.append(("record of the optimisation", explanation.record))
    details_html = "\n".join(
        f"<details><summary>{name}</summary><pre>{html.escape(json.dumps(value, indent=2))}</pre></details>"
        for name, value in details
    )
    caption = html.escape(explanation.caption) or "(empty caption)"
    tokens = token_html(explanation.tokens, explanation.token_bits, explanation.special)
    page = f"""<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="light">
<title>{caption}</title>
<style>
{_STYLE}
</style>
</head>
<body>
<h1><bdi>{caption}</bdi></h1>
<p class="totals">cosine similarity {explanation.score:.3f} · image {_bits(explanation.image_total_bits)} ·
text {_bits(explanation.token_total_bits)}</p>
<div class="pictures">
{figures}
</div>
<div class="bar" style="background:linear-gradient(to right,{stops})"></div>
<div class="scale"><span>0</span><span>{unit}</span><span>{max(float(heat.max()), 0.0):.3g}</span></div>
<h2>tokens, bits below each</h2>
<div>
{tokens}
</div>
{details_html}
</body>
</html>
"""
    return page.encode("utf-8", "replace")


def _bits(value: float) -> str:
    return html.escape(f"{format_bits(value)} bits")


_WRITERS: dict[str, Callable[[Explanation], bytes]] = {
    ".png": _to_png,
    ".html": _to_html,
    ".npz": _to_npz,
    ".json": _to_json,
}
_READERS: dict[str, Callable[[bytes], dict[str, Any]]] = {".npz": _from_npz, ".json": _from_json}


def _one_of(handlers: Mapping[str, Callable[..., Any]], path: Path) -> Callable[..., Any]:
    handler = handlers.get(path.suffix.lower())
    if handler is None:
        raise ValueError(f"the file name must end in one of {', '.join(handlers)}, got {path.name!r}")
    return handler


def _replace_file(path: Path, data: bytes) -> None:
    """Put data at path in one step: readers see the old file or the whole new one."""
    # Not tempfile: its files are private to the user, whatever the umask says about new files.
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _frozen_floats(values: Any, name: str, *, ndim: int) -> NDArray[np.float32]:
    """A read-only float32 copy, after a check of its dimensions and values."""
    array: NDArray[np.float32] = np.array(values, dtype=np.float32)
    if array.ndim != ndim or array.size == 0:
        raise ValueError(f"{name} must have {ndim} dimension(s) and not be empty, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    array.setflags(write=False)
    return array


def _json_copy(value: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict, got {type(value).__name__}")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(dict(value), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold only what JSON can: {error}") from error
    return copied
