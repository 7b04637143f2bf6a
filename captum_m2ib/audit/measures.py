"""What the table holds of a pair besides the attribution: maps, figures and the picture to look at."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from captum_m2ib.encoders.dual_encoder import DualEncoder, Pairs


def coarse(pixels: Sequence[Tensor]) -> list[Tensor]:
    """Maps of pixels, (h, w) each, as sums over the cells of a 16 x 16 grid."""
    import torch.nn.functional as F

    return [F.adaptive_avg_pool2d(bits[None], 16)[0] * (bits.numel() / 256) for bits in pixels]


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
