"""A picture, a sound or a video with its map as one flat picture, small enough to stand among others."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from captum_m2ib.explanations.shown import Explained
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import at_display_size, overlay

# A spectrogram is at least half as high as it is wide.
_LOWEST = 0.5


def still(shown: Explained) -> NDArray[np.uint8]:
    r"""A map over what it is of: of a video its frames in rows, from left to right; of a sound its spectrogram.

    Args:

        shown (Explained): An explanation.

    Returns:
        numpy.ndarray: Colours, (height, width, 3).
    """
    picture, heat = plane(shown.image, shown.kind), plane(shown.image_bits.astype(np.float64), shown.kind)
    drawn: NDArray[np.uint8] = overlay(at_display_size(picture), heat, signed=WORDINGS[shown.unit].is_signed(heat))
    return drawn


def plane(values: NDArray, kind: str) -> NDArray:
    r"""What is shown of a pair as one plane.

    Args:

        values (numpy.ndarray): A map, (height, width), or colours, (height, width, 3); of a video with the frames
            before them.
        kind (str): ``"image"``, ``"sound"`` or ``"video"``.

    Returns:
        numpy.ndarray: the same without frames; of a sound no lower than half of its width.

    Examples::

        >>> import numpy as np
        >>> plane(np.zeros((5, 4, 4, 3)), "video").shape  # five frames, three in a row
        (8, 12, 3)
        >>> plane(np.zeros((2, 8)), "sound").shape
        (4, 8)
    """
    if kind == "sound":
        return values.repeat(max(math.ceil(_LOWEST * values.shape[1] / values.shape[0]), 1), 0)
    if kind != "video":
        return values
    columns = math.ceil(math.sqrt(len(values)))
    missing = np.zeros_like(values[:1]).repeat(-len(values) % columns, 0)
    frames = np.concatenate([values, missing])
    rows = [np.concatenate(frames[start : start + columns], 1) for start in range(0, len(frames), columns)]
    return np.concatenate(rows, 0)
