"""What prepares pictures and captions: a processor of transformers, or two functions of one's own."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor

from captum_m2ib.encoders.spelling import unknown_tokens

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["CaptionFunction", "PictureFunction", "TransformAndTokenizer", "as_processor"]

_EXPECTED = (
    "expected a processor of transformers (with image_processor and tokenizer), or two functions: "
    "processor=(preprocess, tokenize), where preprocess(picture) returns pixels, (C, H, W), and tokenize(captions) "
    "token ids, (N, L)"
)

_OTHERS = (
    "expected a processor of transformers with {0} and tokenizer, or these two: processor=({0}, tokenizer), where a "
    "function of captions returns token ids, (N, L)"
)

# Where processors keep what reads an input, by its modality.
_READERS = {
    "image": ("image_processor", "transform"),
    "audio": ("feature_extractor", "transform"),
    "video": ("video_processor", "image_processor", "transform"),
}

Tokenized: TypeAlias = "Tensor | Mapping[str, Tensor] | tuple[Tensor, Tensor]"


class PictureFunction(Protocol):
    """From a picture, in RGB, to what an image tower reads, (C, H, W): torchvision's transforms, for example."""

    def __call__(self, picture: Image, /) -> Tensor: ...


class CaptionFunction(Protocol):
    r"""From captions to what a text tower reads: OpenAI's ``clip.tokenize``, open_clip's tokenizers, or your own.

    It returns token ids, (N, L), or a mapping with ``input_ids`` and, where the tower reads one, ``attention_mask``, or
    both in this order. One that also has ``convert_ids_to_tokens(ids)``, a mapping ``decoder`` from ids to tokens, or
    ``decode(ids)`` has its tokens shown as words; ``all_special_ids`` says which of them it adds, and ``pad_token_id``
    with which it pads.

    Examples::

        >>> class Letters:
        ...     pad_token_id = 0
        ...
        ...     def __call__(self, captions):
        ...         rows = [torch.tensor([ord(letter) for letter in caption]) for caption in captions]
        ...         return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        ...
        ...     def convert_ids_to_tokens(self, ids):
        ...         return [chr(token) for token in ids]
        >>> Letters()(["a cat", "a dog on it"]).shape
        torch.Size([2, 11])
    """

    def __call__(self, captions: list[str], /) -> Tokenized: ...


class TransformAndTokenizer:
    r"""Two functions as one processor.

    Args:

        transform (PictureFunction): From a picture to (C, H, W), or an image processor of transformers.
        tokenizer (CaptionFunction): From captions to (N, L), or a tokenizer of transformers.
    """

    def __init__(self, transform: PictureFunction, tokenizer: CaptionFunction) -> None:
        self.transform = transform
        self.tokenizer = tokenizer


def as_processor(processor: Any) -> Any:
    """Two functions become one processor; everything else stays as it is."""
    is_pair = isinstance(processor, (tuple, list)) and len(processor) == 2 and all(map(callable, processor))
    return TransformAndTokenizer(*processor) if is_pair else processor


def parts_of(processor: Any, modality: str = "image") -> tuple[Any, Any]:
    r"""What a processor prepares one input and captions with.

    Args:

        processor: A processor.
        modality (str, optional): What the input is: ``"image"``, ``"audio"`` or ``"video"``. Default: ``"image"``

    Returns:
        tuple: what reads pictures, sounds or videos, and what reads captions.

    Raises:
        ValueError: if it lacks one of them.
    """
    reader, tokenizer = reader_of(processor, modality), getattr(processor, "tokenizer", None)
    if reader is None or tokenizer is None:
        name = _READERS[modality][0]
        got = f"{type(processor).__name__} without {name if reader is None else 'tokenizer'}"
        expected = _EXPECTED if modality == "image" else _OTHERS.format(name)
        raise ValueError(f"processor: {expected}; got {got}.")
    return reader, tokenizer


def reader_of(processor: Any, modality: str) -> Any:
    """What a processor reads pictures, sounds or videos with, or None where it has nothing for them."""
    return next((part for name in _READERS[modality] if (part := getattr(processor, name, None)) is not None), None)


def read_picture(transform: PictureFunction, picture: Image) -> Tensor:
    """What a function makes of one picture, (C, H, W)."""
    found = transform(picture)
    if not isinstance(found, Tensor) or found.ndim != 3:
        got = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(
            f"processor: expected its function of pictures to return pixels, (C, H, W), for one picture, got {got}."
        )
    return found


def read_captions(tokenize: CaptionFunction, captions: Sequence[str]) -> tuple[Tensor, Tensor | None]:
    """What a function makes of captions: ids, (N, L), and the mask where it makes one."""
    try:
        found: Any = tokenize(list(captions))
    except RuntimeError as error:
        raise ValueError(
            f"captions: the processor's tokenizer refuses them ({error}); shorten them, or pass one that cuts, e.g. "
            "functools.partial(clip.tokenize, truncate=True)."
        ) from error
    if isinstance(found, Mapping):
        found = found.get("input_ids"), found.get("attention_mask")
    ids, mask = found if isinstance(found, tuple) and len(found) == 2 else (found, None)
    is_table = isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == len(captions) and not ids.is_floating_point()
    if not is_table or not (mask is None or (isinstance(mask, Tensor) and mask.shape == ids.shape)):
        got = [
            f"{one.dtype} of shape {tuple(one.shape)}" if isinstance(one, Tensor) else repr(one) for one in (ids, mask)
        ]
        raise ValueError(
            f"processor: expected its function of captions to return token ids, ({len(captions)}, L), and perhaps a "
            f"mask of the same shape, got {got[0]} and {got[1]}."
        )
    return torch.as_tensor(ids), mask


def warn_of_captions(tokenizer: Any, captions: Sequence[str], longest: int, reason: str, stacklevel: int) -> None:
    """Warn of captions of which a tokenizer of transformers will cut something, or does not know something."""
    unknown = unknown_tokens(tokenizer)
    for caption, ids in zip(captions, tokenizer(list(captions))["input_ids"], strict=True):
        if len(ids) > longest:
            warn_of_cut(caption, len(ids), reason, stacklevel + 1)
        if unknown & set(ids):
            warnings.warn(
                f"captions: the model's tokenizer does not know every word of {caption[:40]!r}; unknown words all "
                "look the same to the model.",
                UserWarning,
                stacklevel=stacklevel + 1,
            )


def warn_of_cut(caption: str, count: int, reason: str, stacklevel: int) -> None:
    """Warn of a caption of more tokens than are read."""
    warnings.warn(
        f"captions: {reason}, {caption[:40]!r}... has {count}; the rest is cut.", UserWarning, stacklevel=stacklevel + 1
    )
