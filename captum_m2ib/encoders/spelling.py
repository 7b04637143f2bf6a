"""What tokens spell: byte-level pieces become the characters that their bytes make, also over several tokens.

A byte-level tokenizer may cut a character into pieces that spell nothing alone: the two tokens of "猫" are shown as
"猫 1/2" and "猫 2/2", each with its own bits.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

_END_OF_WORD = "</w>"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# How the vocabularies of CLIP and its heirs write where a caption starts and ends.
_STARTS_AND_ENDS = ("<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>")


@cache
def byte_alphabet() -> dict[str, int]:
    """How byte-level tokenizers write bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    alphabet, spare = {}, 0x100
    for byte in range(256):
        if chr(byte).isprintable() and byte != 0x20:
            alphabet[chr(byte)] = byte
        else:
            alphabet[chr(spare)] = byte
            spare += 1
    return alphabet


class Speller:
    r"""How a tokenizer writes its tokens, and which of them it adds.

    Args:

        tokenizer: A tokenizer of transformers, one that holds such a tokenizer or a table of tokens (``decoder``), as
            open_clip's do, a function beside such a table, as OpenAI's ``clip.tokenize`` is, or anything with
            ``convert_ids_to_tokens`` or ``decode``. Tokens of others are shown as numbers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.vocabulary = vocabulary_of(tokenizer)
        known = getattr(self.vocabulary, "all_special_ids", None)
        words = getattr(self.vocabulary, "encoder", {})
        added = [words[name] for name in _STARTS_AND_ENDS if name in words] if known is None else known
        self.special: frozenset[int] = frozenset(added) - unknown_tokens(self.vocabulary)
        self._is_bytewise = _is_bytewise(self.vocabulary)

    def row(self, ids: Sequence[int]) -> tuple[str, ...]:
        """One caption's tokens as strings."""
        written = self._written(ids)
        values = [None if i in self.special else self._bytes(token) for i, token in zip(ids, written, strict=True)]
        start = 0
        while start < len(values):
            end, text = _character_end(values, start)
            if text is not None and not text.isascii():
                written[start:end] = _labels(text, written[start:end])
            start = end
        return tuple(written)

    def _written(self, ids: Sequence[int]) -> list[str]:
        if hasattr(self.vocabulary, "convert_ids_to_tokens"):
            return [str(token) for token in self.vocabulary.convert_ids_to_tokens(list(ids))]
        if hasattr(self.vocabulary, "decoder"):
            return [str(self.vocabulary.decoder.get(token, token)) for token in ids]
        if hasattr(self.vocabulary, "decode"):
            return [str(self.vocabulary.decode([token])) for token in ids]
        return [str(token) for token in ids]

    def _bytes(self, token: str) -> bytes | None:
        """The bytes that a piece stands for; None where it is text already."""
        found = _BYTE.fullmatch(token)
        if found:
            return bytes([int(found[1], 16)])
        letters = token.removesuffix(_END_OF_WORD)
        alphabet = byte_alphabet()
        if not self._is_bytewise or not letters or not set(letters) <= set(alphabet):
            return None
        return bytes(alphabet[letter] for letter in letters)


def unknown_tokens(tokenizer: Any) -> set[int]:
    """Ids that stand for words the tokenizer does not know; CLIP's own knows every word and names its end token."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    others = (None, getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "pad_token_id", None))
    return set() if unknown in others else {unknown}


def blank_token(encoder: Any) -> int:
    r"""The id that stands for no word: that of the unknown token, or else of padding.

    Args:

        encoder (DualEncoder): An encoder with a processor.

    Returns:
        int: The id; 0 where the tokenizer names neither.
    """
    tokenizer = getattr(encoder.processor, "tokenizer", encoder.processor)
    ids = (getattr(tokenizer, name, None) for name in ("unk_token_id", "pad_token_id"))
    ends = {getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id")}
    # CLIP's unknown token is its end token, at which the tower would pool.
    return next((int(one) for one in ids if isinstance(one, int) and one not in ends), 0)


def vocabulary_of(tokenizer: Any) -> Any:
    """The object that knows the tokens: the tokenizer, what it holds, or what stands beside a function."""
    if isinstance(tokenizer, partial):
        return vocabulary_of(tokenizer.func)
    inner = getattr(tokenizer, "tokenizer", None)
    # A function beside its table, as OpenAI's is, if it is one that looks there.
    uses = "_tokenizer" in getattr(getattr(tokenizer, "__code__", None), "co_names", ())
    beside = tokenizer.__globals__.get("_tokenizer") if uses else None
    for one in (tokenizer, inner, getattr(tokenizer, "__self__", None), beside):
        if hasattr(one, "convert_ids_to_tokens") or hasattr(one, "decoder"):
            return one
    return tokenizer


def _is_bytewise(vocabulary: Any) -> bool:
    """Whether a vocabulary has a letter for each byte."""
    letters = list(byte_alphabet())
    if hasattr(vocabulary, "convert_tokens_to_ids"):
        find: Callable[[str], Any] = vocabulary.convert_tokens_to_ids
        unknown = (None, getattr(vocabulary, "unk_token_id", None))
        return all(find(letter) not in unknown for letter in letters)
    return all(letter in getattr(vocabulary, "encoder", ()) for letter in letters)


def _character_end(values: Sequence[bytes | None], start: int) -> tuple[int, str | None]:
    """Up to where tokens together spell whole characters, and which; None for what spells none."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text = ""
    for end in range(start, len(values)):
        value = values[end]
        if value is None:
            break
        try:
            text += decoder.decode(value)
        except UnicodeDecodeError:
            break
        if not decoder.getstate()[0]:
            return end + 1, text
    return start + 1, None


def _labels(text: str, pieces: Sequence[str]) -> list[str]:
    """How the tokens of a text are written; marks of word boundaries stay as they were."""
    mark = "Ġ" if text.startswith(" ") else ""
    ends = [_END_OF_WORD if piece.endswith(_END_OF_WORD) else "" for piece in pieces]
    if len(pieces) == 1:
        return [mark + text.removeprefix(" ") + ends[0]]
    return [f"{text.strip()} {place}/{len(pieces)}{end}" for place, end in enumerate(ends, 1)]
