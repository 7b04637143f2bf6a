r"""What a closed gate shows where an input itself is gated: the ground that the input's content lies on.

A closed gate should show what the model takes for nothing. On a white product photograph that is white and not the mean
colour, on an X-ray black, in a spectrogram silence: what fills most of the input. Each channel is cut into
:data:`BINS` equal bins between the input's own extremes; the ground is the mean of the positions in the fullest bin
over all channels together. Where even that holds fewer than :data:`LEAST_SHARE` of the positions, as among the many
values of a patch, nothing fills the input, and the ground is each channel's median.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 8
LEAST_SHARE = 1 / 32


def ground_of(inputs: Tensor, real: Tensor | None, channels: int) -> Tensor:
    r"""The ground of each input.

    Args:

        inputs (Tensor): (N, ...).
        real (Tensor or None): Boolean, broadcastable to ``inputs``; only positions where it is True count.
        channels (int): The dimension along which channels run.

    Returns:
        Tensor: of the inputs' number of dimensions, 1 long in all but the first and the channels'.
    """
    shape = [len(inputs), *[1] * (inputs.ndim - 1)]
    shape[channels] = inputs.shape[channels]
    values = inputs.movedim(channels, -1).flatten(1, -2)
    there = None if real is None else real.expand_as(inputs).movedim(channels, -1).flatten(1, -2)[..., 0]
    found = [_ground(one if there is None else one[there[row]]) for row, one in enumerate(values)]
    return torch.stack(found).view(shape)


def _ground(values: Tensor) -> Tensor:
    """Of the values at one input's positions, (positions, channels), those of its ground, (channels,)."""
    if not len(values):
        return values.new_zeros(values.shape[1])
    low, high = values.amin(0), values.amax(0)
    places = ((values - low) / (high - low).clamp(min=torch.finfo(values.dtype).tiny) * BINS).long().clamp(max=BINS - 1)
    bin_of, counts = _counted(places)
    # One position alone is no ground, however few there are.
    if int(counts.max()) < max(2, LEAST_SHARE * len(values)):
        return values.median(0).values
    return values[bin_of == counts.argmax()].mean(0)


def _counted(places: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the bins that hold anything each position, (positions, channels), is in, and how many are in each."""
    channels = places.shape[1]
    if BINS**channels >= 2**62:
        _, bin_of, counts = torch.unique(places, dim=0, return_inverse=True, return_counts=True)
        return bin_of, counts
    # One number for all channels: numbers are sorted some sixty times faster than rows.
    numbers = (places * BINS ** torch.arange(channels - 1, -1, -1, device=places.device)).sum(1)
    _, bin_of, counts = torch.unique(numbers, return_inverse=True, return_counts=True)
    return bin_of, counts
