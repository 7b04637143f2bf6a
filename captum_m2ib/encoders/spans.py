"""Which tokens of a caption spell some of its words, whatever the tokenizer.

Tokens, without the marks by which tokenizers tell where words start, are written one behind the other, as is the
caption without its spaces; there the words are looked for, whole words first.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_MARKS = re.compile(r"^##|</w>$|[▁ĠĊ\s]")
_SPACE = re.compile(r"\s+")


def find_span(caption: str, tokens: Sequence[str], words: str) -> list[bool]:
    r"""The tokens that spell words of a caption.

    Args:

        caption (str): The caption.
        tokens (sequence of str): Its tokens as the tokenizer writes them, with whatever it puts around the caption.
        words (str): The words, as they follow one another in the caption; upper and lower case do not matter.

    Returns:
        list[bool]: per token, whether it spells part of them; of words that occur several times, everywhere.

    Raises:
        ValueError: if the caption does not hold the words, or its tokens do not spell it.

    Examples::

        >>> find_span("revenue of 2024", ["<s>", "▁reve", "nue", "▁of", "▁20", "24"], "2024")
        [False, False, False, False, True, True]
    """
    pieces = [_MARKS.sub("", token).casefold() for token in tokens]
    ends = [sum(map(len, pieces[: i + 1])) for i in range(len(pieces))]
    start = "".join(pieces).find(_packed(caption))
    places = _places(caption, words)
    if start < 0 or not places:
        reason = "the caption does not hold them" if not places else "its tokens do not spell the caption"
        raise ValueError(
            f"tokens: cannot tell which tokens spell {words!r} in {caption[:60]!r}, for {reason}; its tokens are "
            f"{', '.join(tokens)[:200]}. Give words of the caption, or a mask, (N, L)."
        )
    return [
        any(end - len(piece) < start + last and end > start + first for first, last in places)
        for piece, end in zip(pieces, ends, strict=True)
    ]


def _packed(text: str) -> str:
    return _SPACE.sub("", text).casefold()


def _places(caption: str, words: str) -> list[tuple[int, int]]:
    """Where words start and end in a caption without its spaces."""
    pattern = r"\s+".join(map(re.escape, words.split()))
    if not pattern:
        return []
    for around in (rf"(?<!\w){pattern}(?!\w)", pattern):
        found = list(re.finditer(around, caption, re.IGNORECASE))
        if found:
            break
    starts = [len(_packed(caption[: match.start()])) for match in found]
    return [(start, start + len(_packed(match.group()))) for start, match in zip(starts, found, strict=True)]
