"""Rows as pairs that are ready to be explained: what they hold is read, and the model's processor takes it.

A row that cannot be read, or of which no inputs can be made, says why; the others of its batch go on.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from captum_m2ib.audit.decode import (
    KINDS,
    Kind,
    RowError,
    cover_of,
    read_caption,
    read_media,
    read_region,
    seen_region,
)
from captum_m2ib.audit.results import failed, short
from captum_m2ib.audit.rows import read_boxes

if TYPE_CHECKING:
    from PIL.Image import Image

    from captum_m2ib.encoders.dual_encoder import DualEncoder, Pairs

_TOO_LONG = re.compile(r"captions: the model reads (\d+) tokens, .* has (\d+)", re.DOTALL)
_OF_MEDIA = re.compile(r"(images|sounds|videos|frames)\[")


@dataclass
class Ready:
    """A row that was read; ``result`` gathers what it will hold."""

    media: Any
    caption: str
    contrast: str | None
    region: Image | None
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Reader:
    r"""Reads rows for one model.

    Args:

        encoder (DualEncoder): The model, with its processor.
        contrast (str, optional): The caption that rows without their own are compared with.
        cut_captions (bool): Whether the beginning of a caption that is too long will do.
    """

    encoder: DualEncoder
    contrast: str | None
    cut_captions: bool

    @property
    def kind(self) -> Kind:
        """What the model compares with captions."""
        return KINDS[self.encoder.sides[0].modality]

    def read(self, row: Mapping[str, Any]) -> Ready:
        """A row as a pair that can be prepared, or :class:`RowError`."""
        if row.get("problem"):
            raise RowError("manifest", row["problem"])
        caption = read_caption(row["caption"])
        contrast = row.get("contrast")
        contrast = self.contrast if contrast is None else read_caption(contrast)
        media = read_media(row, self.kind)
        try:
            boxes = read_boxes(row.get("boxes"))
        except ValueError as error:
            raise RowError("boxes", str(error)) from None
        if self.kind.name == "image":
            return Ready(media, caption, contrast, read_region(media.size, boxes, row.get("mask")))
        told = f"boxes and masks lie in pictures, and this is a {self.kind.name}: they are not looked at"
        is_told = boxes is not None or row.get("mask") is not None
        return Ready(media, caption, contrast, None, {"warning": told} if is_told else {})

    def readable(self, ready: list[Ready]) -> tuple[list[Ready], Pairs | None]:
        """Those whose inputs the model's processor can make, and the inputs if they were made for all at once."""
        if not ready:
            return [], None
        pairs, warned, failure = self._try_inputs(ready)
        if not warned and failure is None:
            return ready, pairs
        if len(ready) > 1:
            return [pair for one in ready for pair in self.readable([one])[0]], None
        result = ready[0].result
        if failure is not None:
            is_medias = isinstance(failure, ValueError) and _OF_MEDIA.match(str(failure))
            result.update(failed(self.kind.name if is_medias else "model", failure))
            return [], None
        too_long = next((found for message in warned if (found := _TOO_LONG.match(message))), None)
        if too_long and not self.cut_captions:
            reason = f"the caption has {too_long[2]} tokens, more than the {too_long[1]} that the model reads"
            result.update(failed("caption", reason))
            return [], None
        told = [result["warning"]] if "warning" in result else []
        result["warning"] = short("; ".join([*told, *(message.removeprefix("captions: ") for message in warned)]))
        return ready, pairs

    def inputs(self, ready: Sequence[Ready], contrast: bool = False) -> Pairs:
        """The model's inputs for rows, with their captions or those that they are compared with."""
        captions = [pair.contrast or "" if contrast else pair.caption for pair in ready]
        return self.encoder.prepare([pair.media for pair in ready], captions)

    def _try_inputs(self, ready: list[Ready]) -> tuple[Pairs | None, list[str], Exception | None]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                pairs = self.inputs(ready)
            except Exception as error:
                # Whatever a processor raises for one row is that row's.
                return None, [], error
        messages = [str(warning.message) for warning in caught]
        return pairs, [message for message in messages if message.startswith("captions:")], None


def inside(encoder: DualEncoder, pair: Ready, bits: np.ndarray) -> dict[str, float | None]:
    """Which share of the map above zero, and of its area, lies inside the given boxes or mask."""
    if pair.region is None:
        return {}
    cover = cover_of(seen_region(encoder, pair.region, pair.caption), bits.shape)
    bits = bits.clip(min=0)
    total = bits.sum(dtype=np.float64)
    return {
        "inside_share": float((bits * cover).sum() / total) if total > 0 else None,
        "inside_area": float(cover.mean()),
    }
