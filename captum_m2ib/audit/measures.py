"""What the table holds of a pair besides the attribution: maps, figures and the picture to look at."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder, Pairs


def patch_maps(encoder: DualEncoder, pairs: Pairs, units: Any, image_bits: Any) -> list[np.ndarray]:
    """Bits per patch, (gh, gw) for each pair; where the model has no patch grid, per cell of a 16 x 16 grid."""
    import torch.nn.functional as F

    from captum_m2ib.engine.layouts import PatchLayout, per_patch

    layout = encoder.layouts[0]
    if units is not None and isinstance(layout, PatchLayout) and units.shape[1:] == image_bits.shape[2:]:
        units = per_patch(layout, units)
    place = getattr(layout, "shapes_argument", None)
    if units.ndim == 2 and place is not None:
        # Packed patches: each picture has a grid of its own, then padding.
        grids = (*pairs.inputs, *pairs.additional_forward_args)[place].tolist()
        cells = [row[: height * width].view(height, width) for row, (height, width) in zip(units, grids, strict=True)]
    elif units.ndim == 3:
        cells = list(units)
    else:
        pixels = image_bits.sum(1)
        cells = list(F.adaptive_avg_pool2d(pixels, 16) * (pixels[0].numel() / 256))
    return [bits.float().cpu().numpy() for bits in cells]


def half_scores(encoder: DualEncoder, pairs: Pairs, image_bits: Any) -> Iterator[dict[str, float]]:
    """Scores of the half of the pixels that holds the most bits, and of the other; the rest is the mean colour."""
    import torch

    pixels, *rest = pairs.inputs
    bits = image_bits.sum(1, keepdim=True)
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
