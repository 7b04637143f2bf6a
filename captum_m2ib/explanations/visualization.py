"""Pictures of explanations: heat over a picture, captions coloured by tokens, and both as one figure.

Everything takes plain NumPy arrays and draws without pyplot: no window, backend or global state is touched.
Bits are shown on their own scale from zero; nothing here changes an attribution.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from captum_m2ib.explanations.lettering import (
    EDGE,
    INK,
    QUIET,
    clean_token,
    elide,
    format_score,
    visible,
    write,
)
from captum_m2ib.explanations.sheet import ROOM, WIDTH, Sheet, Words
from captum_m2ib.explanations.units import WORDINGS, format_bits

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "at_display_size",
    "clean_token",
    "format_bits",
    "heat_colors",
    "heat_ramp",
    "overlay",
    "pair_figure",
    "token_colors",
    "token_html",
]

STYLES = ("heat", "safe", "contour")
"""How a map is drawn: heat, heat that survives a grey print and colour blindness, or a line round its top share."""

# Per palette, above and below zero, a colour map and where it starts.
PALETTES = {
    "heat": (("inferno", 0.38), ("BuGn_r", 0.1)),
    "safe": (("cividis", 0.4), ("Blues_r", 0.1)),
}

# Where the heat is zero, the picture shows through dimmed and half grey, so that the hottest places are the
# brightest on white and on black pictures alike.
_DIM, _GREY = 0.55, 0.5


def overlay(
    image: ArrayLike,
    bits: ArrayLike,
    *,
    maximum: float | None = None,
    percentile: float = 100.0,
    strength: float = 0.85,
    signed: bool = False,
    palette: str = "heat",
) -> NDArray[np.uint8]:
    r"""Lay a map of bits over a picture as heat.

    Args:

        image (array): The picture, uint8, (H, W, 3).
        bits (array): The map, (h, w); its first row is the picture's top. Any resolution: it is resized to the picture
            bilinearly.
        maximum (float, optional): The value drawn in the hottest colour. Default: None (the map's own, see
            ``percentile``)
        percentile (float, optional): Which percentile of the map is drawn in the hottest colour when ``maximum`` is not
            given; below 100, a few extreme values do not hide the rest. Default: 100.0
        strength (float, optional): The opacity of the hottest colour, in (0, 1]. Default: 0.85
        signed (bool, optional): Draw values below zero in green, on the same scale. Default: False (they count as zero)
        palette (str, optional): ``"heat"``, or ``"safe"``: a grey picture under yellow, with blue below zero, told
            apart without red and green; what lies above zero rises in lightness, so that it survives a grey print.
            Default: "heat"

    Returns:
        numpy.ndarray: uint8, (H, W, 3). A map that is zero everywhere gives the dimmed picture.

    Raises:
        ValueError: for a picture or a map of another shape, or a map with NaN or infinity.

    Examples::

        >>> picture = np.full((4, 6, 3), 128, dtype=np.uint8)
        >>> overlay(picture, [[0.0, 1.0]]).shape
        (4, 6, 3)
    """
    from PIL import Image

    picture, values = _checked_picture(image), _checked_map(bits)
    top = _hottest(np.abs(values) if signed else values, percentile) if maximum is None else float(maximum)
    size = (picture.shape[1], picture.shape[0])
    resized = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    level = np.clip(resized / top, -1.0 if signed else 0.0, 1.0) if top > 0 else np.zeros_like(resized)

    base = picture.astype(np.float32) / 255
    grey = 1.0 if palette == "safe" else _GREY
    base = _DIM * ((1 - grey) * base + grey * base.mean(axis=2, keepdims=True))
    return np.rint(_heated(base, level, strength, palette) * 255).astype(np.uint8)


def _heated(
    base: NDArray[np.float32], level: NDArray[Any], strength: float, palette: str = "heat"
) -> NDArray[np.float32]:
    """Colours, (..., 3), under heat of levels from -1 to 1."""
    colors, opacity = heat_ramp(strength, palette=palette)
    below, _ = heat_ramp(strength, below=True, palette=palette)
    index = np.rint(np.abs(level) * (len(colors) - 1)).astype(np.intp)
    chosen = np.where((level < 0)[..., None], below[index], colors[index])
    mixed: NDArray[np.float32] = base + opacity[index][..., None] * (chosen - base)
    return mixed


def heat_colors(
    n: int = 256, *, strength: float = 0.85, signed: bool = False, palette: str = "heat"
) -> NDArray[np.float32]:
    r"""The colours of :func:`overlay` from zero to the maximum on a mid-grey picture.

    Args:

        n (int, optional): How many colours. Default: 256
        strength (float, optional): As for :func:`overlay`. Default: 0.85
        signed (bool, optional): Start from minus the maximum instead of from zero. Default: False
        palette (str, optional): As for :func:`overlay`. Default: "heat"

    Returns:
        numpy.ndarray: float32, (n, 3), in [0, 1].

    Raises:
        ValueError: if ``strength`` is out of range.
    """
    grey = np.full((n, 3), _DIM * 0.5, dtype=np.float32)
    return _heated(grey, np.linspace(-1 if signed else 0, 1, n), strength, palette).astype(np.float32)


def at_display_size(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    r"""The picture at about the resolution it is drawn at, so that heat over a small one is smooth.

    Args:

        picture (numpy.ndarray): uint8, (H, W, 3).

    Returns:
        numpy.ndarray: uint8, its longer side 720 pixels.
    """
    from PIL import Image

    height, width = picture.shape[:2]
    scale = 720 / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    # A tiny picture is shown as the pixels it has; smoothing would draw halos around them.
    kernel = Image.Resampling.NEAREST if scale >= 4 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(picture).resize(size, kernel))


def token_colors(bits: ArrayLike, *, maximum: float | None = None) -> list[tuple[str, str]]:
    r"""For each token the colours of its background and its text.

    Backgrounds go from white to deep blue with the bits; texts are black or white, whichever contrasts more.

    Args:

        bits (array): One number per token, (tokens,); values below zero go to deep green on the same scale.
        maximum (float, optional): The value drawn in the deepest blue. Default: None (the largest magnitude)

    Returns:
        list[tuple[str, str]]: background and text, as ``#rrggbb``.

    Raises:
        ValueError: if bits hold NaN or infinity.

    Examples::

        >>> token_colors([0.0, 2.0])[0]
        ('#ffffff', '#000000')
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    values = _checked_row(bits)
    top = float(np.abs(values).max(initial=0.0)) if maximum is None else float(maximum)
    level = np.clip(values / top, -1.0, 1.0) if top > 0 else np.zeros_like(values)
    backgrounds = colormaps["Blues"](0.9 * np.abs(level))[:, :3]
    backgrounds[level < 0] = colormaps["Greens"](0.9 * -level[level < 0])[:, :3]
    backgrounds[level == 0] = 1.0
    return [(to_hex(color), "#000000" if _luminance(color) > 0.179 else "#ffffff") for color in backgrounds]


def token_html(
    tokens: Sequence[str], bits: ArrayLike, special: Sequence[bool] | None = None, *, unit: str = "bits"
) -> str:
    r"""The tokens as HTML: one ``<span>`` each, coloured by its bits, with the bits below it.

    Args:

        tokens (sequence of str): Display tokens (see :func:`clean_token`); each is escaped.
        bits (array): One number per token, (tokens,).
        special (sequence of bool, optional): Which tokens are the model's own (start, end, ...) rather than words; they
            get a dashed edge. Default: None (none of them)
        unit (str, optional): As for :class:`captum_m2ib.Explanation`. Default: "bits"

    Returns:
        str: a fragment with inline styles only, safe to place inside any page.

    Raises:
        ValueError: if the lengths differ, or bits hold NaN or infinity.

    Examples::

        >>> "&lt;b&gt;" in token_html(["<b>"], [1.0])
        True
    """
    values, flags = _checked_tokens(tokens, bits, special)
    wording = WORDINGS[unit]
    spans = []
    for token, value, flag, (background, ink) in zip(tokens, values, flags, token_colors(values), strict=True):
        style = (
            "display:inline-block;margin:2px;padding:3px 7px;border-radius:5px;text-align:center;"
            f"max-width:100%;overflow-wrap:anywhere;border:1px {'dashed' if flag else 'solid'} {EDGE};"
            f"background:{background};color:{ink}"
        )
        kind = ", special token" if flag else ""
        spans.append(
            f'<span style="{style}" title="{value:.6g} {wording.name}{kind}"><bdi>{html.escape(visible(token))}</bdi>'
            f'<span style="display:block;font-size:0.72em">{html.escape(wording.number(value))}</span></span>'
        )
    return "\n".join(spans)


def pair_figure(
    image: ArrayLike,
    image_bits: ArrayLike,
    tokens: Sequence[str],
    token_bits: ArrayLike,
    *,
    score: float,
    caption: str | None = None,
    special: Sequence[bool] | None = None,
    patch_bits: ArrayLike | None = None,
    score_name: str = "cosine similarity",
    notes: Sequence[str] = (),
    unit: str = "bits",
    image_total: float | None = None,
    style: str = "heat",
    share: float = 0.5,
    crop: Sequence[float] | None = None,
) -> Figure:
    r"""One figure for one pair: the picture, the picture under its heat, and the caption's tokens.

    Args:

        image (array): The picture, uint8, (H, W, 3).
        image_bits (array): Bits per pixel position of the model's input, (h, w); its sum is the image's total.
        tokens (sequence of str): Display tokens (see :func:`clean_token`).
        token_bits (array): One number per token, (tokens,).
        score (float): The model's similarity for the pair.
        caption (str, optional): The caption as it was given, shown above its tokens. Default: None (not shown)
        special (sequence of bool, optional): Which tokens are the model's own (start, end, ...) rather than words; they
            get a dashed edge. Default: None (none of them)
        patch_bits (array, optional): Bits per patch, (gh, gw). When given, heat and colour bar show these. Default:
            None
        score_name (str, optional): What the score is called in the title. Default: "cosine similarity"
        notes (sequence of str, optional): Lines below the title. Default: ()
        unit (str, optional): What the values are in, as for :class:`captum_m2ib.Explanation`; all but bits may be below
            zero. Default: "bits"
        image_total (float, optional): The image's total. Default: None (the sum of ``image_bits``)
        style (str, optional): ``"heat"``, ``"safe"`` or ``"contour"``. Default: "heat"
        share (float, optional): Of the style ``"contour"``, the share of the map inside the line. Default: 0.5
        crop (sequence of float, optional): What the model saw of the picture, framed: left, top, right and bottom as
            shares of its sides. Default: None (no frame)

    Returns:
        matplotlib.figure.Figure: outside pyplot; save it with ``figure.savefig(path)``. Characters that no installed
            font can draw appear as ``□``.

    Raises:
        ValueError: for shapes that do not fit, or values with NaN or infinity.
    """
    if style not in STYLES:
        raise ValueError(f"style: expected one of {', '.join(STYLES)}, got {style!r}")
    picture, pixels = _checked_picture(image), _checked_map(image_bits, "image_bits")
    values, flags = _checked_tokens(tokens, token_bits, special)
    wording = WORDINGS[unit]
    if patch_bits is None:
        heat, scale = wording.per_pixels(pixels)
    else:
        heat = _checked_map(patch_bits, "patch_bits")
        scale = f"{wording.name} per patch\n({heat.shape[0]} × {heat.shape[1]} patches)"
    is_signed = wording.is_signed(heat)

    gap, bar_width, bar_room = 0.3, 0.16, 0.85
    aspect = picture.shape[0] / picture.shape[1]
    panel_width = min((ROOM - 2 * gap - bar_width - bar_room) / 2, 4.6 / aspect)
    panel_height = panel_width * aspect
    bar_height = max(panel_height, 1.5)
    left = (WIDTH - (2 * panel_width + 2 * gap + bar_width + bar_room)) / 2
    words = Words(tokens, values.tolist(), flags, token_colors(values), wording, caption)
    total = float(pixels.sum()) if image_total is None else image_total
    sheet = Sheet(f"{score_name} {format_score(score)}", ("image", total), notes, words, bar_height)
    page, top = sheet.page, sheet.top

    shown = at_display_size(picture)
    first_top = top + (bar_height - panel_height) / 2
    if style == "contour":
        panels = (("picture", shown), (f"{share:.0%} of the map lie inside the line", shown))
    else:
        panels = (("picture", shown), (wording.title(heat), overlay(shown, heat, signed=is_signed, palette=style)))
    for column, (name, panel) in enumerate(panels):
        x = left + column * (panel_width + gap)
        write(page, x, first_top - 0.16, elide(name, panel_width, 10), size=10, color=QUIET)
        axes = sheet.axes_at(x, first_top, panel_width, panel_height)
        axes.imshow(panel, aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color=EDGE, linewidth=0.6)
        if crop is not None:
            _mark_crop(axes, crop, shown.shape)
        if column and style == "contour":
            _draw_contour(axes, heat, share, shown.shape)
    if style != "contour":
        bar = sheet.axes_at(left + 2 * (panel_width + gap), top, bar_width, bar_height)
        heat_bar(bar, heat, scale, is_signed, style)
    return sheet.figure


def top_share(values: ArrayLike, share: float) -> float:
    r"""The least value of the smallest area that holds a share of a map.

    Args:

        values (array): The map, of any shape; what lies below zero counts as zero.
        share (float): In (0, 1).

    Returns:
        float: places of at least this value hold at least the share; infinity for a map with nothing above zero.

    Raises:
        ValueError: if the share is out of range.

    Examples::

        >>> top_share([[1.0, 2.0], [3.0, 4.0]], 0.6)
        3.0
    """
    if not 0 < share < 1:
        raise ValueError(f"share: expected a number between 0 and 1, got {share}")
    falling = np.sort(np.asarray(values, dtype=np.float64).clip(min=0).ravel())[::-1]
    held = falling.cumsum()
    if not held[-1] > 0:
        return float("inf")
    return float(falling[min(np.searchsorted(held, share * held[-1]), len(falling) - 1)])


def _draw_contour(axes: Any, heat: NDArray[np.float64], share: float, shape: tuple[int, ...]) -> None:
    """The edge of the smallest area that holds a share of the map, in white on black, to be seen on any ground."""
    from PIL import Image

    size = (shape[1], shape[0])
    fine = np.asarray(Image.fromarray(heat.astype(np.float32)).resize(size, Image.Resampling.BILINEAR))
    level = top_share(fine, share)
    if not fine.min() < level < fine.max():
        return
    for color, width in (("black", 3.0), ("white", 1.4)):
        axes.contour(fine, levels=[level], colors=color, linewidths=width)


def _mark_crop(axes: Any, crop: Sequence[float], shape: tuple[int, ...]) -> None:
    """A dashed frame round what the model saw; ``crop`` in shares of the picture: left, top, right, bottom."""
    from matplotlib.patches import Rectangle

    left, top, right, bottom = (share * side for share, side in zip(crop, (shape[1], shape[0]) * 2, strict=True))
    corner = (left - 0.5, top - 0.5)
    for look in ({"edgecolor": "black"}, {"edgecolor": "white", "linestyle": (0, (4, 4))}):
        axes.add_patch(Rectangle(corner, right - left, bottom - top, fill=False, linewidth=1.4, **look))


def heat_bar(axes: Any, heat: NDArray[np.float64], scale: str, is_signed: bool, palette: str) -> None:
    r"""Draw the colours of a map, from zero to its greatest value, with numbers and what these are called.

    Args:

        axes (matplotlib.axes.Axes): Where, upright.
        heat (numpy.ndarray): The map.
        scale (str): What its numbers are called.
        is_signed (bool): Whether it is drawn on both sides of zero.
        palette (str): As for :func:`overlay`.
    """
    from matplotlib.ticker import MaxNLocator

    maximum = float(np.abs(heat).max() if is_signed else heat.max())
    top = maximum if maximum > 0 else 1.0
    extent = (0, 1, -top if is_signed else 0, top)
    axes.imshow(heat_colors(signed=is_signed, palette=palette)[:, None], origin="lower", aspect="auto", extent=extent)
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.yaxis.set_label_position("right")
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    if maximum <= 0:
        axes.set_yticks([0.0], ["0"])
    axes.tick_params(labelsize=9, colors=INK, width=0.6, length=3)
    axes.set_ylabel(scale, fontsize=9.5, color=INK, labelpad=6)
    axes.spines[:].set(color=EDGE, linewidth=0.6)


def heat_ramp(
    strength: float, *, below: bool = False, palette: str = "heat"
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    r"""Colours and opacities from no bits to the most; the colours' lightness rises throughout.

    Args:

        strength (float): The opacity of the hottest colour, in (0, 1].
        below (bool, optional): Those of values below zero, from zero to the least. Default: False
        palette (str, optional): As for :func:`overlay`. Default: "heat"

    Returns:
        tuple[numpy.ndarray, numpy.ndarray]: colours, (256, 3), and opacities, (256,), float32, in [0, 1].

    Raises:
        ValueError: if ``strength`` is out of range.
    """
    from matplotlib import colormaps

    if not 0 < strength <= 1:
        raise ValueError(f"strength must be in (0, 1], got {strength}")
    level = np.linspace(0, 1, 256)
    name, start = PALETTES[palette][below]
    colors = colormaps[name](start + 0.6 * level)[:, :3]
    return colors.astype(np.float32), (strength * level**0.6).astype(np.float32)


def _luminance(color: NDArray[np.float64]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2): black text contrasts more above 0.179, white below."""
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def _hottest(values: NDArray[np.float64], percentile: float) -> float:
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must be in (0, 100], got {percentile}")
    top = float(np.percentile(values, percentile))
    # A map with few hot spots can have a percentile of zero and still not be empty.
    return top if top > 0 else float(values.max())


def _checked_picture(image: ArrayLike) -> NDArray[np.uint8]:
    picture = np.asarray(image)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or picture.size == 0:
        raise ValueError(
            f"image must be a uint8 array of shape (H, W, 3), got {picture.dtype} of shape {picture.shape}; "
            "for a PIL picture pass numpy.asarray(picture.convert('RGB'))"
        )
    return np.ascontiguousarray(picture)


def _checked_map(bits: ArrayLike, name: str = "bits") -> NDArray[np.float64]:
    values = np.asarray(bits, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"{name} must be a map of shape (h, w), got shape {values.shape}; sum over channels first")
    return _finite(values, name)


def _checked_row(bits: ArrayLike) -> NDArray[np.float64]:
    values = np.asarray(bits, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"token bits must have shape (tokens,), got shape {values.shape}")
    return _finite(values, "token bits")


def _finite(values: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    wrong = int(np.count_nonzero(~np.isfinite(values)))
    if wrong:
        raise ValueError(f"{name} must be finite, got NaN or infinity in {wrong} of {values.size} values")
    return values


def _checked_tokens(
    tokens: Sequence[str], bits: ArrayLike, special: Sequence[bool] | None
) -> tuple[NDArray[np.float64], list[bool]]:
    values = _checked_row(bits)
    flags = [False] * len(tokens) if special is None else [bool(flag) for flag in special]
    if not len(tokens) == len(values) == len(flags):
        raise ValueError(
            f"tokens, bits and special must have one length, got {len(tokens)}, {len(values)} and {len(flags)}"
        )
    return values, flags
