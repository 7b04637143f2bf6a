"""Read pictures safely: their sizes are checked before they are decoded, and nothing is fetched."""

from __future__ import annotations

import io
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

PictureLike: TypeAlias = "Image | np.ndarray | bytes | str | os.PathLike[str]"

# Decoded to float, a picture of this many pixels takes about half a gigabyte; larger ones are refused unread.
MAXIMUM_PIXELS = 50_000_000
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_BYTES = (bytes, bytearray, memoryview)


def load_picture(picture: PictureLike, name: str = "image", most: int | None = None) -> Image:
    r"""Read a picture as RGB, its size checked before it is decoded; several threads may do so at once.

    Args:

        picture (path, bytes, PIL image or numpy.ndarray): A JPEG, PNG, WebP, BMP, GIF or TIFF file, or what is in one;
            or a uint8 array, (H, W, 3) or (H, W).
        name (str, optional): What errors call it. Default: "image"
        most (int, optional): A picture of more pixels is refused before it is decoded. Default: None (50 million)

    Returns:
        PIL.Image.Image: in mode RGB, upright as its EXIF orientation says; of greys of 16 bits the upper 8.

    Raises:
        ValueError: if the file is missing, is no such picture, is truncated, has more pixels than ``most``, or
            levels of 32 bits, whose range nobody knows.
    """
    from PIL import Image

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or not (picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (3, 4))):
            raise ValueError(
                f"{name}: expected a uint8 array of shape (H, W, 3), got {picture.dtype} of shape {picture.shape}."
            )
        return Image.fromarray(picture).convert("RGB")
    if isinstance(picture, Image.Image):
        return _upright(lambda: nullcontext(picture), name, "the given picture", most)
    if isinstance(picture, _BYTES):
        return _upright(lambda: _open(io.BytesIO(picture)), name, "the given bytes", most)
    if isinstance(picture, (str, os.PathLike)):
        path = checked_path(picture, name)
        return _upright(lambda: _open(path), name, path, most)
    raise ValueError(
        f"{name}: expected a path, a PIL image or a uint8 array, got {type(picture).__name__}; the bytes of a picture "
        "file are read, too."
    )


def _open(file: str | io.BytesIO) -> Image:
    from PIL import Image

    if threading.current_thread() is not threading.main_thread():
        # Filters of warnings belong to the process: set and restored here, they would undo those of the main thread.
        return Image.open(file, formats=_FORMATS)
    with warnings.catch_warnings():
        # The size is checked right after this, before anything is decoded.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(file, formats=_FORMATS)


def checked_path(path: str | os.PathLike[str], name: str, kind: str = "picture") -> str:
    """A path that leads to a file; a pipe or a device would never end."""
    given = os.fspath(path)
    # A path object of an address has lost one of its slashes.
    if "://" in given or given.startswith(("http:/", "https:/")):
        raise ValueError(
            f"{name}: {given[:200]} is an address, and nothing is fetched; download it first and give the file or its "
            "bytes."
        )
    if "\0" in given or not os.path.exists(given):
        raise ValueError(f"{name}: there is no file {given}; check the path.")
    if not os.path.isfile(given):
        raise ValueError(f"{name}: {given} is not a file; give the path of a {kind}.")
    return given


class _Refused(ValueError):
    """An error that says all there is to say about a picture."""


def _upright(opening: Callable[[], AbstractContextManager[Image]], name: str, called: str, most: int | None) -> Image:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with opening() as opened:
            check_size(opened.size, name, called, MAXIMUM_PIXELS if most is None else most)
            return _as_rgb(ImageOps.exif_transpose(opened), opened.format, name, called)
    except _Refused:
        raise
    except Image.DecompressionBombError:
        raise ValueError(f"{name}: {called} has too many pixels to decode safely; resize it first.") from None
    except UnidentifiedImageError:
        raise _unreadable(name, called, "no known format") from None
    except Exception as error:
        # A decoder raises whatever it stumbles over in a damaged file.
        raise _unreadable(name, called, (str(error).splitlines() or [type(error).__name__])[0]) from error


def _as_rgb(picture: Image, kind: str | None, name: str, called: str) -> Image:
    from PIL import Image

    # Before Pillow 11, PNG files of 16 bits came in mode I.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind == "PNG"):
        # The plain conversion would cut off at 255.
        return Image.fromarray((np.asarray(picture) // 256).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise _Refused(
            f"{name}: {called} has levels of 32 bits, whose range nobody knows (mode {picture.mode}); convert it to 8 "
            "bits first."
        )
    return picture.convert("RGB")


def _unreadable(name: str, called: str, reason: str) -> ValueError:
    return ValueError(
        f"{name}: cannot read {called} as a picture ({reason}); expected an intact {', '.join(_FORMATS)} file."
    )


def check_size(size: tuple[int, int], name: str, called: str, most: int) -> None:
    if size[0] * size[1] > most:
        raise _Refused(
            f"{name}: {called} has {size[0]} x {size[1]} pixels, more than the {most:,} allowed; resize it first."
        )


def load_pictures(images: Any) -> list[Image]:
    """Read one picture or several, naming in errors which one is at fault."""
    given = [images] if _is_single(images) else list(images)
    if not given:
        raise ValueError("images: expected at least one image, got none.")
    return [load_picture(image, f"images[{index}]") for index, image in enumerate(given)]


def _is_single(images: Any) -> bool:
    """Whether something is no batch of pictures: a picture, or nothing that can be gone through."""
    from PIL import Image

    if isinstance(images, np.ndarray):
        # Arrays of objects hold paths, as the column of a table does.
        return images.ndim != 4 and images.dtype != object
    return isinstance(images, (str, os.PathLike, Mapping, Image.Image, *_BYTES)) or not isinstance(images, Iterable)
