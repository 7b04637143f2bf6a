"""Read pictures safely, and show the part of them that a model sees."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

PictureLike: TypeAlias = "Image | np.ndarray | str | os.PathLike[str]"

# Decoded to float, a picture of this many pixels takes about half a gigabyte; larger ones are refused unread.
MAXIMUM_PIXELS = 50_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
# From this side on ConvNeXt's processor resizes without cutting.
_NEVER_CROPPED = 384
_SHOWN_SIDE = 448


def load_picture(picture: PictureLike, name: str = "image") -> Image:
    r"""Read a picture as RGB, its size checked before it is decoded.

    Args:

        picture (path, PIL image or numpy.ndarray): A JPEG, PNG, WebP, BMP, GIF or TIFF file; or a uint8 array,
            (H, W, 3) or (H, W).
        name (str, optional): What errors call it. Default: "image"

    Returns:
        PIL.Image.Image: in mode RGB, upright as its EXIF orientation says.

    Raises:
        ValueError: if the file is missing, is no such picture, is truncated, or has over 50 million pixels.
    """
    from PIL import Image, ImageOps

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))):
            raise ValueError(
                f"{name}: expected a uint8 array of shape (H, W, 3), got {picture.dtype} of shape {picture.shape}."
            )
        return Image.fromarray(picture).convert("RGB")
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if not isinstance(picture, (str, os.PathLike)):
        raise ValueError(f"{name}: expected a path, a PIL image or a uint8 array, got {type(picture).__name__}.")
    try:
        with warnings.catch_warnings():
            # The size is checked right below, before anything is decoded.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(picture, formats=_FORMATS)
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no file {picture}; check the path.") from None
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: {picture} has too many pixels to decode safely; resize it first.") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise _unreadable(name, picture, error) from error
    with opened:
        _check_size(opened.size, name, picture)
        try:
            return ImageOps.exif_transpose(opened).convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise _unreadable(name, picture, error) from error


def _unreadable(name: str, picture: Any, error: Exception) -> ValueError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return ValueError(
        f"{name}: cannot read {picture} as a picture ({reason}); expected an intact {', '.join(_FORMATS)} file."
    )


def _check_size(size: tuple[int, int], name: str, picture: Any) -> None:
    if size[0] * size[1] > MAXIMUM_PIXELS:
        raise ValueError(
            f"{name}: {picture} has {size[0]} x {size[1]} pixels, more than the {MAXIMUM_PIXELS:,} allowed; resize "
            "it first."
        )


def load_pictures(images: Any) -> list[Image]:
    """Read one picture or a sequence of them, naming in errors which one is at fault."""
    is_batch = isinstance(images, np.ndarray) and images.ndim == 4
    single = isinstance(images, (str, os.PathLike)) or not isinstance(images, Sequence)
    given = [images] if single and not is_batch else list(images)
    if not given:
        raise ValueError("images: expected at least one image, got none.")
    return [load_picture(image, f"images[{index}]") for index, image in enumerate(given)]


def seen_part(picture: Image, processor: Any, size: Sequence[int]) -> np.ndarray:
    r"""The part of a picture that an image processor hands to the model, at a resolution fit for looking at.

    Args:

        picture (PIL.Image.Image): The whole picture.
        processor: A transformers image processor that resizes and perhaps crops the centre.
        size (sequence of int): Height and width of what the model receives, in pixels.

    Returns:
        numpy.ndarray: uint8, (height, width, 3), the longer side at most 448.
    """
    left, top, right, bottom = 0.0, 0.0, float(picture.width), float(picture.height)
    scale = _pixels_per_pixel(picture, processor)
    if scale is not None:
        width, height = min(size[1] * scale[0], right), min(size[0] * scale[1], bottom)
        left, top = (right - width) / 2, (bottom - height) / 2
        right, bottom = left + width, top + height
    return shown_part(picture, (left, top, right, bottom))


def _pixels_per_pixel(picture: Image, processor: Any) -> tuple[float, float] | None:
    """How many of the picture's pixels, across and down, make one of the model's where the centre is cut out."""
    size = getattr(processor, "size", None)
    edge, share = _entry(size, "shortest_edge"), getattr(processor, "crop_pct", None)
    if edge and share and edge < _NEVER_CROPPED:
        # ConvNeXt's processor enlarges first, and cuts the centre without being told to.
        return (min(picture.size) / int(edge / share),) * 2
    if share or not getattr(processor, "do_center_crop", False):
        return None
    if not getattr(processor, "do_resize", False):
        return 1.0, 1.0
    if edge:
        return (min(picture.size) / edge,) * 2
    width, height = _entry(size, "width"), _entry(size, "height")
    return (picture.width / width, picture.height / height) if width and height else (1.0, 1.0)


def shown_part(picture: Image, box: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """A box (left, top, right, bottom) of a picture, or all of it, with its longer side at most 448, uint8."""
    left, top, right, bottom = box or (0.0, 0.0, float(picture.width), float(picture.height))
    ratio = min(1.0, _SHOWN_SIDE / max(right - left, bottom - top))
    shown = max(1, round((right - left) * ratio)), max(1, round((bottom - top) * ratio))
    return np.asarray(picture.resize(shown, box=(left, top, right, bottom)))


def _entry(size: Any, name: str) -> int | None:
    value = size.get(name) if isinstance(size, Mapping) else getattr(size, name, None)
    return value if isinstance(value, int) else None
