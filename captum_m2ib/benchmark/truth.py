"""Maps of pictures against a truth that is a region of the original picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_m2ib.audit.decode import cover_of, seen_region
from captum_m2ib.engine.layouts import PackedLayout
from captum_m2ib.engine.units import packed_grid
from captum_m2ib.metrics import auroc, pointing_game, relevance_mass

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder
    from captum_m2ib.encoders.pairs import Pairs


def truth_of(encoder: DualEncoder, region: Any, caption: str, grid: Sequence[int]) -> Tensor:
    r"""A region of the original picture as the model sees it.

    Args:

        encoder (DualEncoder): With the processor that crops and resizes.
        region (PIL.Image.Image): As large as the picture, white inside.
        caption (str): The pair's caption.
        grid (sequence of int): Height and width of the map.

    Returns:
        Tensor: boolean, (1, height, width): cells of which at least half lies inside.
    """
    return torch.from_numpy(cover_of(seen_region(encoder, region, caption), grid) >= 0.5).unsqueeze(0)


def grids_of(encoder: DualEncoder, pairs: Pairs, maps: Tensor) -> list[Tensor]:
    """Each picture's map, (height, width): of pixels, or of the patches that a packed picture consists of."""
    layout = encoder.layouts[0]
    if isinstance(layout, PackedLayout):
        arguments = (*pairs.inputs, *pairs.additional_forward_args)
        return [packed_grid(layout, maps.sum(2), arguments, index).cpu() for index in range(len(maps))]
    return list(maps.sum(1).cpu())


def on_truth(maps: Tensor, masks: Tensor) -> dict[str, Tensor]:
    r"""Do maps fall on the truth?

    Args:

        maps (Tensor): (N, H, W) or (N, C, H, W).
        masks (Tensor): Boolean, (N, H, W).

    Returns:
        dict: ``image pointing``, ``image mass`` and ``image auroc``, (N,) each.
    """
    return {
        "image pointing": pointing_game(maps, masks),
        "image mass": relevance_mass(maps, masks),
        "image auroc": auroc(maps, masks),
    }


def lists_of(found: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Figures as plain numbers."""
    return {name: values.detach().double().cpu().tolist() for name, values in found.items()}
