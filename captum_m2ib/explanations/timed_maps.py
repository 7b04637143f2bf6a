"""Maps of sounds and videos, in the shape of the model's input, as they are shown: over seconds, pitches, frames."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.encoders.pairs import Pairs
from captum_m2ib.encoders.timelines import VideoTimeline
from captum_m2ib.engine.layouts import Layout, PatchLayout


def over_time(
    layout: Layout | None, maps: Tensor, units: Tensor | None, pairs: Pairs
) -> tuple[list[Tensor], list[Tensor] | None]:
    r"""Per pair the map that is shown, and the same per patch.

    Args:

        layout (Layout or None): The tower's layout.
        maps (Tensor): In the input's shape.
        units (Tensor or None): Per unit of the tower, where the method tells.
        pairs (Pairs): As the encoder prepares them.

    Returns:
        tuple: of a video (frames, h, w); of a spectrogram (bins, columns), high above low; of a wave (1, steps). What
        lies on padding is left out.
    """
    found = []
    for index, timeline in enumerate(pairs.timelines):
        values = maps[index]
        if isinstance(timeline, VideoTimeline):
            found.append(values[: len(timeline.frames)].sum(1))
        elif values.ndim == 3:
            found.append(_upright(values.sum(0)))
        else:
            found.append(_steps(layout, values.sum(0), pairs, index))
    if units is None or not isinstance(layout, PatchLayout) or units.ndim == 2:
        return found, None
    if isinstance(pairs.timelines[0], VideoTimeline):
        return found, [
            each[: -(-len(timeline.frames) // layout.patch_size[0])]
            for each, timeline in zip(units, pairs.timelines, strict=True)
            if isinstance(timeline, VideoTimeline)
        ]
    return found, [_upright(each) for each in units]


def _upright(values: Tensor) -> Tensor:
    """From (time, frequency) to rows from the highest frequency to the lowest."""
    return values.transpose(0, 1).flip(0)


def _steps(layout: Layout | None, samples: Tensor, pairs: Pairs, index: int) -> Tensor:
    """A wave's map summed over the steps of its tower, (1, steps), without the padding behind it."""
    step, mask = 1, None
    if isinstance(layout, PatchLayout):
        step = layout.patch_size[0]
        arguments = (*pairs.inputs, *pairs.additional_forward_args)
        if layout.mask_argument is not None and layout.mask_argument < len(arguments):
            mask = arguments[layout.mask_argument]
    real = len(samples) if mask is None else int(mask[index].sum())
    padded = F.pad(samples[:real], (0, -real % step))
    return padded.unflatten(0, (-1, step)).sum(1)[None]
