"""What a model sees of a picture, and where that lies in the whole picture, for any processor.

Nothing is known of processors. Each is shown pictures of one colour, which tell how it turns colours into numbers, and
a picture of the same size whose colours tell the place: red runs from left to right, green from top to bottom, and blue
is full. Read back from what the processor returns, red and green say which part of the picture lies there, and where
blue is not full there is no picture but padding. Along each axis a place ``x`` of the model's pixels shows the place
``a + b x`` of the picture; what does not fit such lines (tiles, random crops) is shown as the model's own pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_m2ib.encoders.regions import Region

if TYPE_CHECKING:
    from PIL.Image import Image

Processed: TypeAlias = "Callable[[Image], Tensor]"
"""What a processor makes of one picture, (C, h, w)."""

# Colours are whole numbers out of 255, so that what is read back is off by half of one.
_EXACT = 1.5 / 255
# The share of the places that must lie on the lines; at edges and beside padding, resizing mixes.
_ON_LINES = 0.95
_MOST_KEPT = 4096


class View(NamedTuple):
    r"""What the model sees of a picture.

    Attributes:

        picture (numpy.ndarray): uint8, (height, width, 3), padding included, at a resolution fit for looking at.
        region (Region or None): Where it lies in the whole picture; None where the processor does not cut one box.
    """

    picture: NDArray[np.uint8]
    region: Region | None


def view_of(picture: Image, received: Tensor, process: Processed, owner: Any) -> View:
    r"""What the model sees of a picture, and where.

    Args:

        picture (PIL.Image.Image): The whole picture, RGB.
        received (Tensor): What the processor made of it, (C, h, w).
        process (Callable): The processor, picture by picture.
        owner (Any): What ``process`` belongs to. What was found out about it is kept as long as it lives and as its
            ``repr`` stays the same.

    Returns:
        View: the picture itself where the model's view is one box of it and perhaps padding; the model's own pixels
        where it is not.

    Examples::

        >>> import numpy as np, torch
        >>> from PIL import Image
        >>> def centre(picture):  # a processor that cuts out the middle
        ...     return torch.from_numpy(np.asarray(picture)[:, 10:30] / 255).permute(2, 0, 1)
        >>> whole = Image.fromarray(np.zeros((20, 40, 3), dtype=np.uint8))
        >>> region = view_of(whole, centre(whole), centre, centre).region
        >>> [round(edge) for edge in region[:4]]  # left, top, right, bottom
        [10, 0, 30, 20]
    """
    if received.ndim != 3:
        width, height = picture.size
        return View(Region(0.0, 0.0, width, height, width, height).crop(picture), None)
    known = _known(owner)
    colours = _kept(known, "colours", lambda: _Colours.of(process, picture.size))
    if colours is None:
        return View(_brightness(received), None)
    seen = colours.read(received)
    region = _kept(known, (picture.size, tuple(received.shape)), lambda: _region(colours, process, picture.size))
    pixels = _bytes(seen)
    return View(pixels if region is None else region.crop(picture, pixels), region)


class _Colours(NamedTuple):
    """How a processor turns colours into numbers: one matrix and what black becomes."""

    inverse: NDArray[Any]
    black: NDArray[Any]

    @classmethod
    def of(cls, process: Processed, size: tuple[int, int]) -> _Colours | None:
        """None where colours cannot be told apart, or the same picture is not processed alike each time."""
        from PIL import Image

        black, *pure = (
            _numbers(process(Image.new("RGB", size, colour)))
            for colour in ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
        )
        ramp = _ramp(size)
        if not np.array_equal(_numbers(process(ramp)), _numbers(process(ramp))):
            return None
        change = np.stack([one - black for one in pure], -1)
        if not np.isfinite(change).all():
            return None
        place = np.unravel_index(np.abs(change).sum((0, -1)).argmax(), black.shape[1:])
        matrix = change[(slice(None), *place)]
        if matrix.shape[0] < 3 or np.linalg.matrix_rank(matrix) < 3:
            return None
        return cls(np.linalg.pinv(matrix), black[(slice(None), *place)])

    def read(self, received: Tensor) -> NDArray[np.float64]:
        """Colours, (h, w, 3), from 0 to 1."""
        return (np.moveaxis(_numbers(received), 0, -1) - self.black) @ self.inverse.T


def _region(colours: _Colours, process: Processed, size: tuple[int, int]) -> Region | None:
    across, down, full = np.moveaxis(colours.read(process(_ramp(size))), -1, 0)
    # The last place's colour is white, and so may padding be.
    is_picture = (np.abs(full - 1) < _EXACT) & ~((across > 1 - _EXACT) & (down > 1 - _EXACT))
    horizontal = _line(across, is_picture, size[0])
    vertical = _line(down.T, is_picture.T, size[1])
    if horizontal is None or vertical is None:
        return None
    (left, right), (top, bottom) = horizontal, vertical
    return Region(left, top, right, bottom, *size)


def _line(places: NDArray[np.float64], is_picture: NDArray[np.bool_], length: int) -> tuple[float, float] | None:
    """Where the first column starts and the last one ends, of places that should depend on the column alone."""
    count = places.shape[1]
    # Between the middles of the picture's outer pixels its colours rise evenly.
    even = is_picture & (places > 1 / length) & (places < 1 - 1 / length)
    rows, columns = np.nonzero(even)
    if len(np.unique(columns)) < 2:
        return None
    slope, start = np.polyfit(columns + 0.5, places[rows, columns], 1)
    # Without smoothing between pixels, places are those of the pixels' middles.
    off = np.abs(start + slope * (np.arange(count) + 0.5) - places)[is_picture]
    if slope <= 0 or (off < 0.75 / length + 2 * _EXACT).mean() < _ON_LINES:
        return None
    edges = start * length, (start + slope * count) * length
    return _snapped(edges[0], slope * length, (0, length)), _snapped(edges[1], slope * length, (0, length))


def _snapped(edge: float, pixel: float, ends: Sequence[int]) -> float:
    """An edge, at the picture's own if less than a quarter of a model's pixel, or a third of its own, lies between."""
    return next((float(end) for end in ends if abs(edge - end) < max(pixel / 4, 1 / 3)), round(float(edge), 2))


def _ramp(size: tuple[int, int]) -> Image:
    """A picture whose colours tell the place."""
    from PIL import Image

    width, height = size
    ramp = np.full((height, width, 3), 255, dtype=np.uint8)
    ramp[..., 0] = np.rint((np.arange(width) + 0.5) / width * 255)
    ramp[..., 1] = np.rint((np.arange(height) + 0.5) / height * 255)[:, None]
    return Image.fromarray(ramp)


def _numbers(received: Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = torch.as_tensor(received).detach().cpu().double().numpy()
    return found


def _bytes(colours: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.rint(np.clip(colours, 0, 1) * 255).astype(np.uint8)


def _brightness(received: Tensor) -> NDArray[np.uint8]:
    """The model's own pixels as greys, from the least to the greatest."""
    grey = _numbers(received).mean(0)
    span = grey.max() - grey.min()
    grey = (grey - grey.min()) / span if span > 0 else np.full_like(grey, 0.5)
    return _bytes(np.repeat(np.nan_to_num(grey)[..., None], 3, axis=-1))


_KNOWN: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


def _known(owner: Any) -> dict[Any, Any]:
    """What was found out about a processor as it is now."""
    try:
        of_owner = _KNOWN.setdefault(owner, {})
    except TypeError:
        return {}
    settings = repr(owner)
    if of_owner.get("settings") != settings or len(of_owner) > _MOST_KEPT:
        of_owner.clear()
        of_owner["settings"] = settings
    return of_owner


def _kept(known: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    if key not in known:
        known[key] = make()
    return known[key]
