"""What the table holds of a pair besides the attribution: maps, figures and the picture to look at."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from captum_m2ib.explanations.stills import plane

if TYPE_CHECKING:
    from torch import Tensor

    from captum_m2ib.encoders.dual_encoder import DualEncoder, Pairs


def coarse(pixels: Sequence[Tensor]) -> list[Tensor]:
    """Maps of pixels, (..., h, w) each, as sums over the cells of a 16 x 16 grid; a wave's, of one row, as it is."""

    def summed(bits: Tensor) -> Tensor:
        rows, columns = (_shares(length).to(bits) for length in bits.shape[-2:])
        return rows @ bits @ columns.T

    return [bits if bits.shape[-2] == 1 else summed(bits) for bits in pixels]


def _shares(length: int, cells: int = 16) -> Tensor:
    """Which share of each of so many positions lies in each of equal cells, (cells, length)."""
    import torch

    edges, starts = torch.linspace(0, length, cells + 1).unsqueeze(1), torch.arange(length)
    return (edges[1:].minimum(starts + 1) - edges[:-1].maximum(starts)).clamp(min=0)


def flat(grid: np.ndarray, kind: str) -> np.ndarray:
    """A map as a table holds it, (rows, columns): of a video its frames in rows, from left to right."""
    return plane(grid, kind) if kind == "video" else grid


def thumbnail(picture: np.ndarray, kind: str, frames: int, side: int) -> bytes:
    r"""What a model saw or heard as a small JPEG that its map covers.

    Args:

        picture (numpy.ndarray): Of :attr:`Pairs.pictures`.
        kind (str): ``"image"``, ``"sound"`` or ``"video"``.
        frames (int): Of a video, how many frames its map has; several that share one are shown by the first.
        side (int): The longer side, in pixels.

    Returns:
        bytes: the file.
    """
    if kind == "video":
        picture = picture[:: math.ceil(len(picture) / frames)]
    return jpeg(plane(picture, kind), side)


def half_scores(encoder: DualEncoder, pairs: Pairs, maps: Sequence[Tensor]) -> Iterator[dict[str, float]]:
    """Scores of the half of the pixels where the maps are highest, and of the other; the rest is the mean colour."""
    import torch

    pixels, *rest = pairs.inputs
    bits = torch.stack(list(maps)).unsqueeze(1)
    order = bits.flatten(1).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    best = (rank < order.shape[1] // 2).view_as(bits)
    mean = pixels.mean(dim=(2, 3), keepdim=True)
    with torch.no_grad():
        scores = [
            encoder(torch.where(kept, pixels, mean), *rest, *pairs.additional_forward_args).tolist()
            for kept in (best, ~best)
        ]
    for best_half, other_half in zip(*scores, strict=True):
        yield {"best_half_score": best_half, "other_half_score": other_half}


def cosine(first: np.ndarray, second: np.ndarray) -> float | None:
    """Cosine similarity of two maps; None where one of them is zero everywhere."""
    a, b = first.astype(np.float64).ravel(), second.astype(np.float64).ravel()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else None


def jpeg(picture: np.ndarray, side: int) -> bytes:
    from PIL import Image

    image = Image.fromarray(picture)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()
