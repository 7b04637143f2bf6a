"""Pictures and captions become model inputs, by the model's own processor, with what is needed to show them again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_m2ib.encoders.pictures import PictureLike, load_pictures
from captum_m2ib.encoders.regions import Region
from captum_m2ib.encoders.views import View, view_of


@dataclass(frozen=True)
class Pairs:
    r"""Model inputs for a batch of pairs, with what is needed to show them.

    Attributes:

        inputs (tuple[Tensor, Tensor]): ``pixel_values``, (N, C, H, W) or as packed patches (N, patches, values), and
            ``input_ids``, (N, L).
        additional_forward_args (tuple): ``attention_mask``, (N, L), where the tokenizer makes one, and what else the
            model reads, in the order of :attr:`DualEncoder.argument_names`.
        captions (tuple[str, ...]): The captions as given.
        tokens (tuple[tuple[str, ...], ...]): Per pair, the token at each of the L positions as a string.
        special (tuple[tuple[bool, ...], ...]): Per pair, which tokens the tokenizer added.
        pictures (tuple[numpy.ndarray, ...]): Per pair, what the model sees of the picture, padding included, uint8,
            (height, width, 3), at a resolution fit for looking at.
        regions (tuple[Region or None, ...]): Per pair, where that lies in the whole picture; None where the processor
            does not cut one box. Default: () (not known)
    """

    inputs: tuple[Tensor, Tensor]
    additional_forward_args: tuple[Any, ...]
    captions: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    special: tuple[tuple[bool, ...], ...]
    pictures: tuple[np.ndarray, ...]
    regions: tuple[Region | None, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> Pairs:
        r"""The same pairs with their tensors on another device.

        Args:

            device (torch.device or str): The device.

        Returns:
            Pairs: a copy; what is no tensor is shared.
        """
        return Pairs(
            (self.inputs[0].to(device), self.inputs[1].to(device)),
            tuple(a.to(device) if isinstance(a, Tensor) else a for a in self.additional_forward_args),
            self.captions,
            self.tokens,
            self.special,
            self.pictures,
            self.regions,
        )


class OpenClipProcessor:
    r"""open_clip's transform and tokenizer behind one name.

    Args:

        transform (Callable): The evaluation transform that comes with the model, (picture) -> (C, H, W).
        tokenizer (Callable): The tokenizer that comes with the model, (captions) -> (N, L).
    """

    def __init__(self, transform: Callable[..., Any], tokenizer: Callable[..., Any]) -> None:
        self.transform = transform
        self.tokenizer = tokenizer


def prepare_pairs(
    processor: Any,
    names: Sequence[str],
    images: PictureLike | Sequence[PictureLike],
    captions: str | Sequence[str],
    longest: int | None,
    padding: str,
    dtype: torch.dtype,
) -> Pairs:
    r"""Pairs of pictures and captions as a model's processor prepares them.

    Args:

        processor: A transformers processor, or an :class:`OpenClipProcessor`.
        names (sequence of str): What ``forward_func`` reads, in its order: first the two inputs.
        images (picture or sequence of pictures): A single picture is paired with every caption.
        captions (str or sequence of str): A single caption is paired with every picture.
        longest (int or None): How many tokens the model reads at most, where it says so.
        padding (str): How transformers tokenizers pad.
        dtype (torch.dtype): Type of the pixels.

    Returns:
        Pairs: on the CPU.
    """
    texts, pictures = _align(_captions(captions), load_pictures(images))
    if isinstance(processor, OpenClipProcessor):
        values, ids, tokens, special, views = _by_open_clip(processor, pictures, texts)
        found = {names[0]: values, names[1]: ids}
    else:
        found, tokens, special, views = _by_transformers(processor, pictures, texts, longest, padding, names)
    extras = [found.get(name) for name in names[2:]]
    while extras and extras[-1] is None:
        extras.pop()
    return Pairs(
        (found[names[0]].to(dtype), found[names[1]]),
        tuple(extras),
        tuple(texts),
        tokens,
        special,
        tuple(view.picture for view in views),
        tuple(view.region for view in views),
    )


def padding_of(processor: Any, otherwise: int | None) -> int | None:
    """The id that a processor's tokenizer pads captions with, or another where it does not say."""
    tokenizer = getattr(processor, "tokenizer", None)
    inner = getattr(tokenizer, "tokenizer", tokenizer) if isinstance(processor, OpenClipProcessor) else tokenizer
    found = getattr(inner, "pad_token_id", None)
    return found if isinstance(found, int) else otherwise


def _by_transformers(
    processor: Any, pictures: list[Any], texts: list[str], longest: int | None, padding: str, names: Sequence[str]
) -> Any:
    tokenizer = processor.tokenizer
    encoded = _tokenize(tokenizer, texts, longest, padding)
    read = _read_pictures(processor.image_processor, pictures)
    ids = encoded["input_ids"]
    specials = set(tokenizer.all_special_ids) - _unknown_tokens(tokenizer)
    found = {names[1]: ids, "attention_mask": encoded.get("attention_mask"), **read}
    views = _views(processor.image_processor, pictures, read)
    tokens = tuple(tuple(tokenizer.convert_ids_to_tokens(row)) for row in ids.tolist())
    return found, tokens, tuple(tuple(token in specials for token in row) for row in ids.tolist()), views


def _read_pictures(image_processor: Any, pictures: list[Any]) -> dict[str, Any]:
    return dict(image_processor(images=pictures, return_tensors="pt"))


def _views(image_processor: Any, pictures: list[Any], read: dict[str, Any]) -> list[View]:
    def process(picture: Any) -> Tensor:
        return _planes(_read_pictures(image_processor, [picture]), 0)

    return [view_of(one, _planes(read, i), process, image_processor) for i, one in enumerate(pictures)]


def _planes(read: dict[str, Any], index: int) -> Tensor:
    """One picture as the model receives it, (C, h, w); packed patches put side by side."""
    pixels: Tensor = read["pixel_values"][index]
    if "spatial_shapes" not in read:
        return pixels
    rows, columns = read["spatial_shapes"][index].tolist()
    side = math.isqrt(pixels.shape[-1] // 3)
    patches = pixels[: rows * columns].view(rows, columns, side, side, 3)
    return patches.permute(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)


def _by_open_clip(processor: OpenClipProcessor, pictures: list[Any], texts: list[str]) -> Any:
    values = torch.stack([processor.transform(picture) for picture in pictures])
    ids = processor.tokenizer(texts)
    spell, specials = _speller(processor.tokenizer)
    tokens = tuple(tuple(spell(token) for token in row) for row in ids.tolist())
    special = tuple(tuple(token in specials for token in row) for row in ids.tolist())
    transform = processor.transform
    views = [view_of(one, value, transform, transform) for one, value in zip(pictures, values, strict=True)]
    return values, ids, tokens, special, views


def _speller(tokenizer: Any) -> tuple[Callable[[int], str], set[int]]:
    """How a tokenizer of open_clip spells one token, and the ids of its special tokens."""
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if hasattr(inner, "convert_ids_to_tokens"):
        return inner.convert_ids_to_tokens, set(inner.all_special_ids)
    if hasattr(tokenizer, "decoder"):
        # Its padding has the id of a real token, "!".
        return lambda token: tokenizer.decoder.get(token, str(token)), set(tokenizer.all_special_ids)
    return str, set()


def _tokenize(tokenizer: Any, captions: list[str], longest: int | None, padding: str) -> Any:
    limit = min(longest or tokenizer.model_max_length, tokenizer.model_max_length)
    unknown = _unknown_tokens(tokenizer)
    for caption, ids in zip(captions, tokenizer(captions)["input_ids"], strict=True):
        if len(ids) > limit:
            warnings.warn(
                f"captions: the model reads {limit} tokens, {caption[:40]!r}... has {len(ids)}; the rest is cut.",
                UserWarning,
                stacklevel=5,
            )
        if unknown & set(ids):
            warnings.warn(
                f"captions: the model's tokenizer does not know every word of {caption[:40]!r}; unknown words all "
                "look the same to the model.",
                UserWarning,
                stacklevel=5,
            )
    return tokenizer(captions, padding=padding, truncation=True, max_length=limit, return_tensors="pt")


def _captions(captions: str | Sequence[str]) -> list[str]:
    given = [captions] if isinstance(captions, str) else list(captions)
    if not given:
        raise ValueError("captions: expected at least one caption, got none.")
    for index, caption in enumerate(given):
        if not isinstance(caption, str) or not caption.strip():
            got = "an empty one" if isinstance(caption, str) else type(caption).__name__
            raise ValueError(f"captions[{index}]: expected a caption with at least one word, got {got}.")
        if any("\ud800" <= character <= "\udfff" for character in caption):
            raise ValueError(f"captions[{index}]: expected text, got bytes that are not UTF-8; decode it first.")
    return given


def _align(captions: list[str], pictures: list[Any]) -> tuple[list[str], list[Any]]:
    count = max(len(captions), len(pictures))
    if len(captions) not in (1, count) or len(pictures) not in (1, count):
        raise ValueError(
            f"captions: expected one per picture or a single one for all, got {len(pictures)} pictures and "
            f"{len(captions)} captions."
        )
    return (
        captions * count if len(captions) == 1 else captions,
        pictures * count if len(pictures) == 1 else pictures,
    )


def _unknown_tokens(tokenizer: Any) -> set[int]:
    """Ids that stand for words the tokenizer does not know; CLIP's own knows every word and names its end token."""
    return {tokenizer.unk_token_id} - {None, tokenizer.eos_token_id, tokenizer.pad_token_id}
