"""Pictures, sounds, videos, captions and masks of one row, from whatever a manifest or a data set hands over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from captum_m2ib.audit.rows import Row
from captum_m2ib.encoders.frames import Video, load_video
from captum_m2ib.encoders.pictures import load_picture
from captum_m2ib.encoders.sounds import load_sound

if TYPE_CHECKING:
    from PIL.Image import Image

    from captum_m2ib.encoders.dual_encoder import DualEncoder


class RowError(ValueError):
    """Why a row cannot be explained; ``kind`` says what is at fault."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def read_caption(caption: Any) -> str:
    """A caption with something in it, or the reason why not."""
    if caption is None:
        raise RowError("caption", "there is no caption")
    if not isinstance(caption, str):
        raise RowError("caption", f"expected text, got {type(caption).__name__}")
    if not caption.strip():
        raise RowError("caption", "the caption is empty")
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise RowError("caption", "the caption is not UTF-8")
    return caption


class Kind(NamedTuple):
    r"""What a model compares with captions.

    Attributes:

        name (str): What errors and tables call it.
        columns (tuple[str, ...]): What of a row may hold it, the first that is there wins.
        load (Callable): From whatever holds it, and what errors call it, to what :meth:`DualEncoder.prepare` takes.
    """

    name: str
    columns: tuple[str, ...]
    load: Callable[[Any, str], Any]


# A column of paths, such as file_name, is that of pictures whatever they lead to.
KINDS = {
    "image": Kind("image", ("image",), load_picture),
    "audio": Kind("sound", ("sound", "image"), load_sound),
    "video": Kind("video", ("video", "image"), load_video),
}
"""By the modality of an encoder's first side."""


def read_media(row: Mapping[str, Any], kind: Kind) -> Any:
    r"""What a row compares with its caption: a picture, a sound or a video.

    Args:

        row (mapping): What a manifest or a data set says of the pair.
        kind (Kind): What the model reads.

    Raises:
        RowError: if it is missing, unreadable or too large.
    """
    given = next((row[name] for name in kind.columns if row.get(name) is not None), None)
    found = _read(given, kind.name, kind.load)
    rate = row.get("frames_per_second")
    if kind.name != "video" or rate is None or found.seconds is not None:
        return found
    try:
        return Video(found.frames, float(rate))
    except (TypeError, ValueError) as error:
        raise RowError(kind.name, str(error)) from error


def read_picture(image: Any, kind: str = "image") -> Image:
    r"""A picture in mode RGB, upright; its size is checked before it is decoded.

    Args:

        image (path, bytes, mapping, PIL image, numpy.ndarray or RowError): The picture; a mapping holds ``bytes`` or
            ``path``; an error, which :func:`read_ahead` may have left here, is raised.
        kind (str, optional): What errors call it. Default: "image"

    Raises:
        RowError: if it is missing, is no picture, is truncated, or is too large.
    """
    picture: Image = _read(image, kind, load_picture)
    return picture


def _read(given: Any, name: str, load: Callable[[Any, str], Any]) -> Any:
    if isinstance(given, RowError):
        raise given
    if isinstance(given, Mapping) and "array" not in given:
        given = given["bytes"] if given.get("bytes") else given.get("path")
    if given is None or (isinstance(given, (str, bytes)) and not given):
        raise RowError(name, f"there is no {name}")
    try:
        return load(given, name)
    except ValueError as error:
        raise RowError(name, str(error).removeprefix(f"{name}: ")) from error


def read_ahead(row: Row, kind: Kind = KINDS["image"]) -> Row:
    r"""A row with its picture, sound or video and its mask read, or what is wrong with them in their place.

    Fit for any thread.

    Args:

        row (Row): As the manifest gives it.
        kind (Kind, optional): What the model reads. Default: that of pictures

    Returns:
        Row: the same row.
    """
    if row.problem:
        return row
    found = _or_error(lambda: read_media(vars(row), kind))
    mask = row.mask and _or_error(lambda: read_picture(row.mask, "mask"))
    return replace(row, **{kind.columns[0]: found}, mask=mask)


def _or_error(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RowError as error:
        return error


def read_region(size: tuple[int, int], boxes: Any, mask: Any) -> Image | None:
    r"""Boxes or a mask as a picture, white inside, as large as the pair's picture; None where there are none.

    Args:

        size (tuple): Width and height of the picture.
        boxes (sequence or None): ``[x0, y0, x1, y1]`` each, in pixels.
        mask (Any): A picture, not black inside.

    Raises:
        RowError: if the mask cannot be read or has another size, or the boxes lie outside of the picture.
    """
    from PIL import Image, ImageDraw

    if mask is not None:
        inside = np.asarray(read_picture(mask, "mask")).max(axis=2) > 0
        if inside.shape != size[::-1]:
            raise RowError("mask", f"expected {size[0]} x {size[1]} pixels, got {inside.shape[1]} x {inside.shape[0]}")
        return Image.fromarray((255 * inside).astype(np.uint8)).convert("RGB")
    if not boxes:
        return None
    region = Image.new("L", size)
    draw = ImageDraw.Draw(region)
    for x0, y0, x1, y1 in boxes:
        if x0 >= size[0] or y0 >= size[1] or x1 <= 0 or y1 <= 0:
            raise RowError("boxes", f"{[x0, y0, x1, y1]} lies outside of the picture's {size[0]} x {size[1]} pixels")
        # The far edge of a box is not inside it.
        draw.rectangle([round(x0), round(y0), max(round(x1) - 1, round(x0)), max(round(y1) - 1, round(y0))], fill=255)
    return region.convert("RGB")


def seen_region(encoder: DualEncoder, region: Image, caption: str) -> np.ndarray:
    """A region as the model sees it: prepared like the picture itself, and black where there is no picture."""
    pairs = encoder.prepare(region, caption)
    return pairs.pictures[0] if pairs.regions[0] is None else pairs.regions[0].crop(region.convert("RGB"))


def cover_of(region: np.ndarray, grid: Sequence[int]) -> np.ndarray:
    """Which share of each patch lies inside, (gh, gw), from a region as the model sees it."""
    from PIL import Image

    plane = Image.fromarray(region).convert("L").resize((grid[1], grid[0]), Image.Resampling.BOX)
    return np.asarray(plane, dtype=np.float64) / 255
