"""What one pair's explanation holds, how it is looked at, and how it is kept on disk.

An :class:`Explanation` is plain data: NumPy arrays, text and numbers, with no reference to a model. Files are
a figure (``.png``, ``.pdf``, ``.svg``), a self-contained page (``.html``) or data that loads back exactly
(``.npz``, ``.json``); never pickles.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.encoders.regions import Region
from captum_m2ib.encoders.timelines import Timeline, VideoTimeline, ensure_timeline, kind_of
from captum_m2ib.explanations.checking import ensure_check, told
from captum_m2ib.explanations.files import READERS, WRITERS, check_output, one_of, replace_file, to_png
from captum_m2ib.explanations.lettering import format_score
from captum_m2ib.explanations.shown import Drawing
from captum_m2ib.explanations.timed_figure import timed_figure
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import pair_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from captum_m2ib.encoders.pictures import PictureLike

__all__ = ["Explanation"]

# Figures and pages draw pictures at about this size.
_LARGEST_SIDE = 720

_PARTS = {"image": "pixels", "sound": "bins and steps of time", "video": "frames and pixels"}


@dataclass(frozen=True, eq=False, repr=False)
class Explanation:
    r"""What each part of one pair contributes to the model's score, in bits unless ``unit`` says otherwise.

    A pair is a picture, a sound or a video, and a caption; what is said of the image below holds for all three. Of a
    sound paired with a video each has an explanation of its own (:func:`captum_m2ib.explain_media`), without tokens.

    Arrays are copied and made read-only; ``settings`` and ``record`` are copied as JSON: tuples become lists.

    Args:

        image (numpy.ndarray): What the model saw of the picture, padding included, uint8, (H, W, 3), at any resolution.
        caption (str): The caption as it was given.
        tokens (tuple[str, ...]): Display tokens, without padding, the model's special tokens included.
        special (tuple[bool, ...]): For each token, whether it is special (start, end, ...) rather than part of the
            caption.
        score (float): The model's similarity for the pair.
        image_bits (numpy.ndarray): Bits per pixel position of the model's input, float32, (h, w); sums to the image's
            total.
        patch_bits (numpy.ndarray or None): The same per patch, float32, (gh, gw), or None where the model has no patch
            grid.
        token_bits (numpy.ndarray): Bits per token, float32, (tokens,).
        settings (dict): What the explanation was computed with.
        record (dict, optional): The optimisation's course, such as score and information per step. Default: None
        check (dict, optional): Whether the maps name what the score rests on: of ``"image"`` and of ``"text"`` the
            figures of :mod:`captum_m2ib.engine.check` (``score``, ``closed``, ``range``, ``kept``, ``lost_top``,
            ``lost_random``) and a ``verdict``, ``"holds"``, ``"weak"`` or ``"fails"``; and the worse of the two as the
            pair's ``verdict``. ``kept`` is None for a method that has no gates. Default: None (not checked)
        unit (str, optional): What the values are in: ``"bits"``; ``"score"``, units of the score that sum to about
            what it gains over a baseline; or ``"relative"``, numbers that only compare within one map. The last two may
            be below zero. Default: "bits"
        region (Region, optional): Where ``image`` lies in the whole picture: left, top, right and bottom in its pixels,
            its width and its height. It reaches beyond the picture where the model saw padding. Default: None (not
            known, as where a processor does not cut one box)
        timeline (SoundTimeline or VideoTimeline, optional): Of a sound, what the columns (seconds) and rows
            (frequencies, from the highest) of ``image_bits`` are, whose picture is a spectrogram or a wave. Of a video,
            which frames these are, and when: ``image`` is (frames, H, W, 3) and ``image_bits`` (frames, h, w). Default:
            None (a picture)

    Raises:
        ValueError: for shapes or lengths that do not fit, values with NaN or infinity, an unknown unit, a region that
            is none, or settings or a record that JSON cannot hold.

    Examples::

        >>> explanation = explain(encoder, images[0], captions[0], n_steps=2)[0]
        >>> [token for token, bits in explanation.top_tokens(1)]
        ['white']
        >>> explanation.patch_bits.shape, explanation.image_bits.shape
        ((8, 8), (64, 64))
    """

    USUAL_SCORE: ClassVar[str] = "cosine similarity"

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
    check: dict[str, Any] | None = None
    unit: str = "bits"
    region: Region | None = None
    timeline: Timeline | None = None

    def __post_init__(self) -> None:
        image, timeline = np.array(self.image), None if self.timeline is None else ensure_timeline(self.timeline)
        frames = (len(timeline.frames),) if isinstance(timeline, VideoTimeline) else ()
        if image.dtype != np.uint8 or image.shape != (*frames, *image.shape[-3:-1], 3) or image.size == 0:
            expected = f"({', '.join([*map(str, frames), 'H', 'W', '3'])})"
            raise ValueError(f"image must be uint8 of shape {expected}, got {image.dtype} of shape {image.shape}")
        tokens, special = tuple(map(str, self.tokens)), tuple(map(bool, self.special))
        can_be_empty = timeline is not None and not tokens
        token_bits = _frozen_floats(self.token_bits, "token_bits", ndim=1, can_be_empty=can_be_empty)
        if not len(tokens) == len(special) == len(token_bits):
            raise ValueError(
                "tokens, special and token_bits must have one length, "
                f"got {len(tokens)}, {len(special)} and {len(token_bits)}"
            )
        if not np.isfinite(self.score):
            raise ValueError(f"score must be finite, got {self.score}")
        if self.unit not in WORDINGS:
            raise ValueError(f"unit must be one of {', '.join(WORDINGS)}, got {self.unit!r}")
        image.setflags(write=False)
        ndim = 2 + len(frames)
        values = {
            "image": image,
            "tokens": tokens,
            "special": special,
            "score": float(self.score),
            "image_bits": _frozen_floats(self.image_bits, "image_bits", ndim=ndim),
            "patch_bits": None if self.patch_bits is None else _frozen_floats(self.patch_bits, "patch_bits", ndim=ndim),
            "token_bits": token_bits,
            "settings": _json_copy(self.settings, "settings"),
            "record": None if self.record is None else _json_copy(self.record, "record"),
            "check": None if self.check is None else ensure_check(self.check),
            "region": None if self.region is None else Region.ensure(self.region),
            "timeline": timeline,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def score_name(self) -> str:
        """What the score is, as figures and pages call it."""
        name, tokens = self.settings.get("score", self.USUAL_SCORE), self.settings.get("tokens")
        return str(name) if tokens is None else f"{name} of “{tokens}”"

    def __repr__(self) -> str:
        caption = self.caption if len(self.caption) <= 60 else self.caption[:59] + "…"
        sizes = " x ".join(map(str, self.image_bits.shape))
        check = "" if self.check is None else f", check: {self.check['verdict']}"
        wording = WORDINGS[self.unit]
        image, text = (
            wording.amount(total) if wording.has_totals else wording.name
            for total in (self.image_total_bits, self.token_total_bits)
        )
        beside = f", text: {text} over {len(self.tokens)} tokens" if self.tokens else ""
        return (
            f"Explanation({caption!r}, score={self.score:.4g}, {self.kind}: {image} over {sizes} {_PARTS[self.kind]}"
            f"{beside}{check})"
        )

    @property
    def kind(self) -> str:
        """What is explained beside the caption: ``"image"``, ``"sound"`` or ``"video"``."""
        return kind_of(self.timeline)

    @property
    def time_bits(self) -> NDArray[np.float32]:
        """Of a sound the bits of each step of time, of a video those of each frame; ``timeline`` says when these are.

        Raises:
            ValueError: if it is a picture, which has no time.
        """
        if self.timeline is None:
            raise ValueError("time_bits: a picture has no time; image_bits says where its bits are.")
        is_video = isinstance(self.timeline, VideoTimeline)
        summed: NDArray[np.float32] = self.image_bits.sum((1, 2) if is_video else 0)
        return summed

    @property
    def image_total_bits(self) -> float:
        """The bits that the whole image contributes, or whatever the unit is."""
        return float(self.image_bits.sum(dtype=np.float64))

    @property
    def token_total_bits(self) -> float:
        """The bits that the whole text contributes, special tokens included, or whatever the unit is."""
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

    @property
    def check_lines(self) -> list[str]:
        """The check in words, one line per modality; none where it was left out."""
        return [] if self.check is None else told(self.check, self.kind, self.settings.get("beside", "text"))

    @property
    def notes(self) -> list[str]:
        """What a figure says beside its numbers: the caption that is compared, what was taken of a sound, the check."""
        rival = self.settings.get("instead_of")
        told = [] if rival is None else [f"instead of “{rival}” ({format_score(self.settings['rival_score'])})"]
        taken = [f"{self.kind}: {self.timeline.taken}"] if self.timeline is not None and self.timeline.taken else []
        return [*told, *taken, *(f"check: {line}" for line in self.check_lines)]

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return to_png(self)

    def bits_over(self, original: PictureLike) -> NDArray[np.float32]:
        r"""The map laid over the whole picture, of which the model may have seen a part only.

        Args:

            original (picture): The whole picture that was explained, or the same in another size: a path, a PIL image,
                bytes or a uint8 array.

        Returns:
            numpy.ndarray: float32, (height, width) of the whole picture; 0 where the model did not look. Its sum is
            ``image_total_bits`` but for what lies on padding.

        Raises:
            ValueError: if the place is not known, or the picture is of other proportions.

        Examples::

            >>> explanation = explain(encoder, images[0], captions[0], n_steps=2)[0]
            >>> bool((explanation.bits_over(images[0]) >= 0).all())
            True
        """
        return self._laid_over(_loaded(original))

    def shown(self, original: PictureLike | None = None) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        r"""A picture and the map that lies on it.

        Args:

            original (picture, optional): The whole picture, as for :meth:`bits_over`. Default: None (what the model
                saw)

        Returns:
            tuple: uint8, (H, W, 3), and float32, (h, w).

        Raises:
            ValueError: as for :meth:`bits_over`.
        """
        if original is None:
            return self.image, self.image_bits
        picture = _loaded(original)
        picture.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
        return np.asarray(picture), self._laid_over(picture)

    def plot(self, original: PictureLike | None = None, *, style: str = "heat", share: float = 0.5) -> Figure:
        r"""The explanation as a figure; see :func:`captum_m2ib.explanations.visualization.pair_figure`.

        Args:

            original (picture, optional): The whole picture, to lay the map over it instead of over what the model saw,
                which is framed where it is a part; as for :meth:`bits_over`. Default: None
            style (str, optional): ``"heat"``; ``"safe"``, which survives a grey print and colour blindness; or
                ``"contour"``, a line round the smallest area that holds a share of the map. Default: "heat"
            share (float, optional): That share. Default: 0.5

        Returns:
            matplotlib.figure.Figure: outside pyplot; save it with ``figure.savefig(path)``.

        Raises:
            ValueError: as for :meth:`bits_over`, if ``style`` is unknown or ``share`` is out of range, or for a contour
                or a whole picture where there is no picture but a sound or a video.
        """
        if self.timeline is not None:
            self._refuse(original)
            return timed_figure(self, self.timeline, self.score_name, style)
        picture, bits = self.shown(original)
        crop = None
        if original is not None and self.region is not None:
            sides = (self.region.width, self.region.height) * 2
            shares = [edge / side for edge, side in zip(self.region.inside, sides, strict=True)]
            crop = shares if shares != [0, 0, 1, 1] else None
        return pair_figure(
            picture,
            bits,
            self.tokens,
            self.token_bits,
            score=self.score,
            score_name=self.score_name,
            caption=self.caption,
            special=self.special,
            notes=self.notes,
            unit=self.unit,
            image_total=self.image_total_bits,
            style=style,
            share=share,
            crop=crop,
        )

    def save(
        self,
        path: str | os.PathLike[str],
        original: PictureLike | None = None,
        *,
        style: str = "heat",
        share: float = 0.5,
    ) -> Path:
        r"""Write the explanation to a file; the name's ending says how.

        ``.png``, ``.pdf`` and ``.svg``: the figure. ``.html``: one page that needs no other file. ``.npz`` and
        ``.json``: data that :meth:`load` reads back exactly. The file appears complete or not at all, and replaces an
        older one.

        Args:

            path (str or PathLike): The file, in a directory that exists.
            original (picture, optional): For a figure or a page the whole picture, as for :meth:`plot`. Default: None
            style (str, optional): For a figure as for :meth:`plot`; a page is drawn as ``"heat"`` or ``"safe"``.
                Default: "heat"
            share (float, optional): As for :meth:`plot`. Default: 0.5

        Returns:
            Path: the path that was written.

        Raises:
            ValueError: if the name ends in anything else, such a file has no such style, or as for :meth:`plot`.
            FileNotFoundError: if the directory does not exist.
        """
        path = check_output(path)
        write = one_of(WRITERS, path)
        replace_file(path, write(self, Drawing(original, style, share)))
        return path

    def _refuse(self, original: PictureLike | None) -> None:
        if original is not None:
            raise ValueError(f"original: a map is laid over a whole picture, and this is a {self.kind}; leave it out.")

    def _laid_over(self, picture: Image) -> NDArray[np.float32]:
        if self.region is None:
            raise ValueError(
                "original: where the map lies in the whole picture is not known: the model's processor does not cut "
                "one box, or the explanation comes from an older file; leave original out."
            )
        return self.region.scaled(*picture.size).lay(self.image_bits)

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
        read = one_of(READERS, path)
        data = path.read_bytes()
        try:
            return cls(**read(data))
        except Exception as error:
            raise ValueError(f"{str(path)!r} does not hold an explanation: {error}") from error


def _loaded(original: PictureLike) -> Image:
    from captum_m2ib.encoders.pictures import load_picture

    return load_picture(original, "original")


def _frozen_floats(values: Any, name: str, *, ndim: int, can_be_empty: bool = False) -> NDArray[np.float32]:
    """A read-only float32 copy, after a check of its dimensions and values."""
    array: NDArray[np.float32] = np.array(values, dtype=np.float32)
    if array.ndim != ndim or (array.size == 0 and not can_be_empty):
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
