"""Pictures, sounds or videos and captions become model inputs, by the model's own processor, with what shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from captum_m2ib.encoders.frames import VideoLike, load_videos, read_videos
from captum_m2ib.encoders.pages import read_pages, reads_pages, with_tasks
from captum_m2ib.encoders.patches import side_by_side
from captum_m2ib.encoders.pictures import PictureLike, load_pictures
from captum_m2ib.encoders.processors import (
    parts_of,
    read_captions,
    read_picture,
    reader_of,
    warn_of_captions,
    warn_of_cut,
)
from captum_m2ib.encoders.regions import Region
from captum_m2ib.encoders.sounds import SoundLike, load_sounds, read_sounds
from captum_m2ib.encoders.spelling import Speller, vocabulary_of
from captum_m2ib.encoders.timelines import Timeline
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
        tiles (tuple[tuple[Region or None, ...], ...]): Per pair, where each of the tiles that its picture comes as lies
            in the whole picture. Default: () (pictures come in one piece)
        timelines (tuple[SoundTimeline or VideoTimeline, ...]): Per pair, where in time the sound or the frames lie, of
            which ``pictures`` then holds the spectrogram or the wave, (height, width, 3), or all frames, (frames,
            height, width, 3). Default: () (pictures have no time)
        partners (tuple[numpy.ndarray, ...]): Of sounds paired with videos, what ``pictures`` holds, of the second ones;
            captions are then empty. Default: ()
        partner_timelines (tuple[SoundTimeline or VideoTimeline, ...]): The same for ``timelines``. Default: ()
    """

    inputs: tuple[Tensor, Tensor]
    additional_forward_args: tuple[Any, ...]
    captions: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    special: tuple[tuple[bool, ...], ...]
    pictures: tuple[np.ndarray, ...]
    regions: tuple[Region | None, ...] = ()
    tiles: tuple[tuple[Region | None, ...], ...] = ()
    timelines: tuple[Timeline, ...] = ()
    partners: tuple[np.ndarray, ...] = ()
    partner_timelines: tuple[Timeline, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def to(self, device: torch.device | str) -> Pairs:
        r"""The same pairs with their tensors on another device.

        Args:

            device (torch.device or str): The device.

        Returns:
            Pairs: a copy; what is no tensor is shared.
        """
        return replace(
            self,
            inputs=(self.inputs[0].to(device), self.inputs[1].to(device)),
            additional_forward_args=tuple(
                a.to(device) if isinstance(a, Tensor) else a for a in self.additional_forward_args
            ),
        )

    def select(self, rows: slice) -> Pairs:
        r"""Some of the pairs.

        Args:

            rows (slice): Which.

        Returns:
            Pairs: these.
        """

        def of(given: Any) -> Any:
            return given[rows] if isinstance(given, (Tensor, tuple)) else given

        return replace(
            self,
            **{name: of(value) for name, value in vars(self).items()}
            | {
                "inputs": (self.inputs[0][rows], self.inputs[1][rows]),
                "additional_forward_args": tuple(map(of, self.additional_forward_args)),
            },
        )


def prepare_pairs(
    processor: Any,
    names: Sequence[str],
    images: Any,
    captions: str | Sequence[str],
    longest: int | None,
    padding: str,
    dtype: torch.dtype,
    modality: str = "image",
    frames: int | None = None,
) -> Pairs:
    r"""Pairs of pictures, sounds or videos and captions as a model's processor prepares them.

    Args:

        processor: A transformers processor, or a :class:`TransformAndTokenizer`.
        names (sequence of str): What ``forward_func`` reads, in its order: first the two inputs.
        images: What :func:`load_media` reads; a single picture, sound or video is paired with every caption.
        captions (str or sequence of str): A single caption is paired with every picture.
        longest (int or None): How many tokens the model reads at most, where it says so.
        padding (str): How transformers tokenizers pad.
        dtype (torch.dtype): Type of the pixels.
        modality (str, optional): ``"image"``, ``"audio"`` or ``"video"``. Default: ``"image"``
        frames (int, optional): How many frames the model reads, where its configuration says so. Default: None

    Returns:
        Pairs: on the CPU.

    Raises:
        ValueError: if the numbers of pictures and captions differ, or the processor does not prepare what is read.
    """
    reader, tokenizer = parts_of(processor, modality)
    texts, pictures = _align(_captions(captions), load_media(images, modality), modality)
    tiles: tuple[tuple[Region | None, ...], ...] = ()
    timelines: Sequence[Timeline] = ()
    pages = with_tasks(processor)
    if modality == "image" and reads_pages(pages):
        found, views, tiles = read_pages(pages, pictures)
        found.update(pages.process_queries(texts))
    elif "page_input_ids" in names:
        raise ValueError(
            "processor: this model reads pictures among the tokens of a prompt; expected a processor that writes it "
            f"(process_images, process_queries), got {type(processor).__name__}; load the model with "
            "DualEncoder.from_sentence_transformers."
        )
    else:
        if modality == "image":
            found, views = _read_pictures(processor, reader, pictures, names[0])
        else:
            found, views, timelines = _read_timed(reader, pictures, modality, names[0], frames)
        found[names[1]], found["attention_mask"] = _read_captions(tokenizer, texts, longest, padding)
    ids = found[names[1]]
    speller = Speller(tokenizer)
    tokens = tuple(speller.row(row) for row in ids.tolist())
    special = tuple(tuple(token in speller.special for token in row) for row in ids.tolist())
    return Pairs(
        (found[names[0]].to(dtype), found[names[1]]),
        _extras(found, names),
        tuple(texts),
        tokens,
        special,
        tuple(view.picture for view in views),
        tuple(view.region for view in views),
        tiles,
        tuple(timelines),
    )


def prepare_media(
    processor: Any,
    names: Sequence[str],
    given: tuple[Any, Any],
    modalities: tuple[str, str],
    dtype: torch.dtype,
) -> Pairs:
    r"""Pairs of sounds and videos, without captions.

    Args:

        processor: A transformers processor with what reads both.
        names (sequence of str): What ``forward_func`` reads, in its order: first the two inputs.
        given (tuple): What :func:`load_media` reads, of each modality; a single one is paired with every other.
        modalities (tuple[str, str]): ``"audio"`` and ``"video"``, in the model's order.
        dtype (torch.dtype): Type of the inputs.

    Returns:
        Pairs: on the CPU, with ``partners``.

    Raises:
        ValueError: if their numbers differ, one cannot be read, or the processor does not prepare what is read.
    """
    loaded = [load_media(media, modality) for media, modality in zip(given, modalities, strict=True)]
    count = max(map(len, loaded))
    if any(len(media) not in (1, count) for media in loaded):
        kinds = [_KINDS.get(modality, modality) for modality in modalities]
        raise ValueError(
            f"{kinds[1]}s: expected one per {kinds[0]} or a single one for all, got {len(loaded[0])} {kinds[0]}s and "
            f"{len(loaded[1])} {kinds[1]}s."
        )
    found: dict[str, Any] = {}
    views, timelines = [], []
    for media, modality, name in zip(loaded, modalities, names, strict=False):
        reader = reader_of(processor, modality)
        if reader is None:
            raise ValueError(
                f"processor: expected one with what reads {modality}, got {type(processor).__name__}; pass tensors."
            )
        read, shown, times = _read_timed(reader, media * (count // len(media)), modality, name, None)
        found.update(read)
        views.append(tuple(view.picture for view in shown))
        timelines.append(tuple(times))
    return Pairs(
        (found[names[0]].to(dtype), found[names[1]].to(dtype)),
        _extras(found, names),
        ("",) * count,
        ((),) * count,
        ((),) * count,
        views[0],
        timelines=timelines[0],
        partners=views[1],
        partner_timelines=timelines[1],
    )


def _extras(found: Mapping[str, Any], names: Sequence[str]) -> tuple[Any, ...]:
    """What is read beside the two inputs, without what is missing at the end."""
    extras = [found.get(name) for name in names[2:]]
    while extras and extras[-1] is None:
        extras.pop()
    return tuple(extras)


def _read_timed(
    reader: Any, media: list[Any], modality: str, name: str, frames: int | None
) -> tuple[dict[str, Any], list[View], Sequence[Timeline]]:
    return read_sounds(reader, media, name) if modality == "audio" else read_videos(reader, media, name, frames)


Media: TypeAlias = "PictureLike | SoundLike | VideoLike | Iterable[PictureLike | SoundLike | VideoLike]"

_KINDS = {"image": "picture", "audio": "sound"}
_LOADERS: dict[str, Callable[[Any], list[Any]]] = {"image": load_pictures, "audio": load_sounds, "video": load_videos}


def load_media(media: Media, modality: str) -> list[Any]:
    r"""Read what is compared with captions: one or several.

    Args:

        media (pictures, sounds or videos): As :meth:`DualEncoder.prepare` takes them.
        modality (str): Which: ``"image"``, ``"audio"`` or ``"video"``.

    Returns:
        list: pictures, :class:`Sound` or :class:`Video` objects.

    Raises:
        ValueError: if one cannot be read, or there is none.
    """
    return _LOADERS[modality](media)


def padding_of(processor: Any) -> int | None:
    """The id that a processor's tokenizer pads captions with, or None where it does not say."""
    found = getattr(vocabulary_of(getattr(processor, "tokenizer", None)), "pad_token_id", None)
    return found if isinstance(found, int) else None


def _read_pictures(processor: Any, reader: Any, pictures: list[Any], name: str) -> tuple[dict[str, Any], list[View]]:
    """What the model reads of the pictures, by its names, and what it sees of each."""
    if not hasattr(processor, "image_processor") and not hasattr(reader, "preprocess"):

        def read_one(picture: Any) -> Tensor:
            return read_picture(reader, picture)

        values = torch.stack([read_one(picture) for picture in pictures])
        return {name: values}, [view_of(*each, read_one, reader) for each in zip(pictures, values, strict=True)]

    def read_all(pictures: list[Any]) -> dict[str, Any]:
        return dict(reader(images=pictures, return_tensors="pt"))

    def planes(picture: Any) -> Tensor:
        return _planes(read_all([picture]), 0)

    read = read_all(pictures)
    views = [view_of(picture, _planes(read, index), planes, reader) for index, picture in enumerate(pictures)]
    return {name: read["pixel_values"], **read}, views


def _planes(read: dict[str, Any], index: int) -> Tensor:
    """One picture as the model receives it, (C, h, w); packed patches put side by side."""
    pixels: Tensor = read["pixel_values"][index]
    if "spatial_shapes" not in read:
        return pixels
    return side_by_side(pixels, *read["spatial_shapes"][index].tolist())


def _read_captions(tokenizer: Any, texts: list[str], longest: int | None, padding: str) -> tuple[Tensor, Tensor | None]:
    """Token ids, (N, L), and the mask where the tokenizer makes one."""
    if hasattr(tokenizer, "model_max_length"):
        encoded = _tokenize(tokenizer, texts, longest, padding)
        return encoded["input_ids"], encoded.get("attention_mask")
    ids, mask = read_captions(tokenizer, texts)
    vocabulary = vocabulary_of(tokenizer)
    for text in texts:
        count = _count(vocabulary, text)
        if count is not None and count > ids.shape[1]:
            warn_of_cut(text, count, f"the tokenizer makes {ids.shape[1]} tokens", stacklevel=5)
    return ids, mask


def _count(vocabulary: Any, text: str) -> int | None:
    """How many tokens a text has, start and end included, where the tokenizer can tell without cutting it."""
    if hasattr(vocabulary, "model_max_length"):
        return len(vocabulary(text)["input_ids"])
    return len(vocabulary.encode(text)) + 2 if hasattr(vocabulary, "decoder") else None


def _tokenize(tokenizer: Any, captions: list[str], longest: int | None, padding: str) -> Any:
    stated = tokenizer.model_max_length
    limit = min(longest or stated, stated)
    reason = f"the model reads {limit} tokens"
    # Positions of RoBERTa start behind padding: two of them are no room for tokens.
    if longest is not None and limit < longest - 2:
        reason = (
            f"the tokenizer says that the model reads {limit} tokens, the text tower has {longest} positions; set "
            f"processor.tokenizer.model_max_length = {longest} if it was trained on them. Until then {limit} are read"
        )
    warn_of_captions(tokenizer, captions, limit, reason, stacklevel=6)
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


def _align(captions: list[str], pictures: list[Any], modality: str) -> tuple[list[str], list[Any]]:
    count = max(len(captions), len(pictures))
    if len(captions) not in (1, count) or len(pictures) not in (1, count):
        kind = _KINDS.get(modality, modality)
        raise ValueError(
            f"captions: expected one per {kind} or a single one for all, got {len(pictures)} {kind}s and "
            f"{len(captions)} captions."
        )
    return (
        captions * count if len(captions) == 1 else captions,
        pictures * count if len(pictures) == 1 else pictures,
    )
