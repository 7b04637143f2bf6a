"""Where what a model saw lies in the whole picture; plain numbers, for those who only read explanations."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.Image import Image

SHOWN_SIDE = 448
"""The longer side of a shown picture has at most so many pixels."""


class Region(NamedTuple):
    r"""Where a model's view lies in the whole picture, in pixels of the upright picture.

    It may reach beyond the picture: there, the model saw padding.

    Attributes:

        left, top, right, bottom (float): The view's edges, from the picture's top left corner.
        width, height (int): Size of the whole picture.
    """

    left: float
    top: float
    right: float
    bottom: float
    width: int
    height: int

    @classmethod
    def ensure(cls, value: Any) -> Region:
        r"""A region of what should be one.

        Args:

            value (Any): A region, or a sequence of its six numbers.

        Returns:
            Region: the same.

        Raises:
            ValueError: if it is none.
        """
        try:
            region = cls(*map(float, value[:4]), *map(int, value[4:]))  # type: ignore[call-arg, arg-type]
        except (TypeError, ValueError):
            raise ValueError(
                f"region: expected left, top, right, bottom, width and height, got {value!r:.80}"
            ) from None
        left, top, right, bottom = region.inside
        if not (all(map(math.isfinite, region)) and left < right and top < bottom):
            raise ValueError(f"region: expected a part of a picture of {value[4:]} pixels, got {value!r:.80}")
        return region

    @property
    def inside(self) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the part of the view that lies in the picture."""
        return max(self.left, 0.0), max(self.top, 0.0), min(self.right, self.width), min(self.bottom, self.height)

    def scaled(self, width: int, height: int) -> Region:
        r"""The same region of the picture in another size.

        Args:

            width, height (int): The picture's size.

        Returns:
            Region: in pixels of that size.

        Raises:
            ValueError: if the picture is of other proportions, so that it is another picture or another cut of it.
        """
        across, down = width / self.width, height / self.height
        # Whoever resized it rounded both sides.
        if abs(width - self.width * down) > max(1.0, down) and abs(height - self.height * across) > max(1.0, across):
            raise ValueError(
                f"original: expected the whole picture that was explained, {self.width} x {self.height} pixels or of "
                f"the same proportions, got {width} x {height}."
            )
        box = self.left * across, self.top * down, self.right * across, self.bottom * down
        return Region(*box, width, height)

    def lay(self, values: NDArray[Any]) -> NDArray[np.float32]:
        r"""A map of the view as one of the whole picture, of the same sum but for what lies on padding.

        Args:

            values (numpy.ndarray): The map of the view, (h, w), at any resolution.

        Returns:
            numpy.ndarray: float32, (height, width); 0 where the model did not look.
        """
        from PIL import Image

        rows, columns = values.shape
        across, down = columns / (self.right - self.left), rows / (self.bottom - self.top)
        # Where the picture is the smaller one, a pixel of it is the mean of several.
        fine = max(1, math.ceil(across)), max(1, math.ceil(down))
        size = self.width * fine[0], self.height * fine[1]
        affine = (across / fine[0], 0, -self.left * across, 0, down / fine[1], -self.top * down)
        # Bilinear values need neighbours, which those at the view's edges lack.
        padded = np.pad(np.asarray(values, dtype=np.float32), 1, mode="edge")
        affine = (*affine[:2], affine[2] + 1, *affine[3:5], affine[5] + 1)
        laid = Image.fromarray(padded).transform(size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
        means = np.asarray(laid).reshape(self.height, fine[1], self.width, fine[0]).mean((1, 3))
        left, top, right, bottom = self.inside
        covered = np.outer(_cover(self.height, top, bottom), _cover(self.width, left, right))
        found: NDArray[np.float32] = (means * covered * across * down).astype(np.float32)
        return found

    def crop(self, picture: Image, ground: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
        r"""The view of a picture.

        Args:

            picture (PIL.Image.Image): As large as the whole picture.
            ground (numpy.ndarray, optional): What lies beyond the picture, uint8, as the view shows it at any
                resolution. Default: None (black)

        Returns:
            numpy.ndarray: uint8, (height, width, 3), the longer side at most 448 pixels.
        """
        from PIL import Image

        left, top, right, bottom = self.inside
        ratio = min(1.0, SHOWN_SIDE / max(self.right - self.left, self.bottom - self.top))
        size = _whole((self.right - self.left) * ratio), _whole((self.bottom - self.top) * ratio)
        if (left, top, right, bottom) == tuple(self[:4]):
            return np.asarray(picture.resize(size, box=(left, top, right, bottom)))
        if ground is None:
            canvas = Image.new(picture.mode, size)
        else:
            canvas = Image.fromarray(ground).resize(size, Image.Resampling.NEAREST)
        starts = round((left - self.left) * ratio), round((top - self.top) * ratio)
        part = _whole((right - left) * ratio), _whole((bottom - top) * ratio)
        canvas.paste(picture.resize(part, box=(left, top, right, bottom)), starts)
        return np.asarray(canvas)


def _cover(length: int, start: float, end: float) -> NDArray[np.float64]:
    """Which share of each pixel along an axis lies between two places."""
    edges = np.clip(np.arange(length + 1), start, end)
    return np.diff(edges)


def _whole(length: float) -> int:
    return max(1, round(length))
