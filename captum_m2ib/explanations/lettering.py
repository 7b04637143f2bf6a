"""Text as pictures hold it: what a token says, what a font can draw, and how much room that takes."""

from __future__ import annotations

import unicodedata
from functools import cache
from typing import Any

from captum_m2ib.encoders.spelling import byte_alphabet

INK, QUIET, EDGE = "#1b1b1f", "#5c5c66", "#b8b8c2"


def clean_token(token: str) -> str:
    r"""Turn a tokenizer's piece into what a reader expects to see.

    Marks of word boundaries (``</w>``, ``▁``, ``Ġ``, ``##``) are dropped, control tokens are named in
    brackets (``<|startoftext|>`` becomes ``[startoftext]``, ``</s>`` becomes ``[/s]``), byte-level pieces are
    decoded where they hold whole characters, and invisible characters are removed. A blank piece becomes
    ``␣``. The result is plain text; whoever puts it into HTML must escape it, as :func:`token_html` does.

    Examples::

        >>> clean_token("cat</w>"), clean_token("<|startoftext|>")
        ('cat', '[startoftext]')
    """
    if token.startswith("<|") and token.endswith("|>") and len(token) > 4:
        return f"[{visible(token[2:-2])}]"
    if token != "</w>" and token.startswith("<") and token.endswith(">") and token[1:-1].strip("/").isalnum():
        return f"[{visible(token[1:-1])}]"
    text = _decode_bytes(token.removesuffix("</w>"))
    if text.startswith("##") and len(text) > 2:
        text = text[2:]
    text = visible(text.replace("▁", " ").replace("\n", "⏎")).strip()
    return text or "␣"


def format_score(score: float) -> str:
    """A score with three digits."""
    return f"{score:.3f}".replace("-", "−")


def write(page: Any, x: float, y: float, text: str, *, size: float, color: str = INK, **style: Any) -> None:
    drawn, families = _drawable(text)
    style = {"ha": "left", "va": "center_baseline", **style}
    page.text(x, y, drawn, fontsize=size, color=color, family=families, parse_math=False, **style)


def elide(text: str, room: float, size: float) -> str:
    """The longest beginning of text, with an ellipsis if it is cut, that fits into room (inches)."""
    if text_width(text, size) <= room:
        return text
    fits, too_long = 0, len(text)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if text_width(text[:middle].rstrip() + "…", size) <= room:
            fits = middle
        else:
            too_long = middle
    return text[:fits].rstrip() + "…"


def text_width(text: str, size: float) -> float:
    """Inches that text takes when drawn at this font size."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    drawn, families = _drawable(text)
    dots, _, _ = RendererAgg(8, 8, 150).get_text_width_height_descent(
        drawn, FontProperties(family=families, size=size), False
    )
    return float(dots) / 150


_FIRST_FONT = "DejaVu Sans"  # comes with matplotlib
_OTHER_FONTS = (
    *(
        "Noto Sans",
        "Noto Sans CJK SC",
        "Noto Sans CJK JP",
        "Noto Sans CJK KR",
        "Noto Sans SC",
        "Noto Sans JP",
    ),
    *(
        "Noto Sans KR",
        "Source Han Sans SC",
        "WenQuanYi Zen Hei",
        "WenQuanYi Micro Hei",
        "Droid Sans Fallback",
    ),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Tamil", "Noto Sans Thai", "Nirmala UI"),
    *("Arial Unicode MS", "Noto Sans Symbols2", "Segoe UI Symbol", "Noto Emoji", "Symbola"),
)


def _drawable(text: str) -> tuple[str, list[str]]:
    """The text with ``□`` for what no installed font has, and the font families that together draw it."""
    families, missing = [_FIRST_FONT], set(text) - _glyphs(_FIRST_FONT)
    for family in _OTHER_FONTS if missing else ():
        found = missing & _glyphs(family)
        if found:
            families.append(family)
            missing -= found
        if not missing:
            break
    return "".join("□" if character in missing else character for character in text), families


@cache
def _glyphs(family: str) -> frozenset[str]:
    """The characters that an installed font family can draw; none if it is not installed."""
    from matplotlib.font_manager import fontManager, get_font

    if all(entry.name != family for entry in fontManager.ttflist):
        return frozenset()
    return frozenset(map(chr, get_font(fontManager.findfont(family)).get_charmap()))


def visible(text: str) -> str:
    """Text without what changes how other text is shown: controls, direction marks, lone surrogates."""
    kept = []
    for character in text:
        if character.isprintable():
            kept.append(character)
        elif character.isspace():
            kept.append(" ")
        elif unicodedata.category(character) != "Cf":
            kept.append("\N{REPLACEMENT CHARACTER}")
    return "".join(kept)


def _decode_bytes(token: str) -> str:
    """The text that a byte-level piece stands for; other pieces, and parts of a character, stay."""
    alphabet = byte_alphabet()
    try:
        return bytes(alphabet[character] for character in token).decode("utf-8")
    except (KeyError, UnicodeDecodeError):
        return token.removeprefix("Ġ")


def shown_text(text: object) -> str:
    """Text without controls and direction marks, on one line."""
    return " ".join(visible(str(text)).split())
