r"""Values that neighbours of like colour share: a bilateral filter of a picture (Tomasi and Manduchi, ICCV 1998).

What a caption names mostly ends where colours change, so gates had better be common to pixels that lie near each other
and look alike than to all that lie near. With pixels' places :math:`x`, colours :math:`c` in units of the picture's own
standard deviation in each channel, and Gaussians in both, the value of a pixel becomes the mean of all values, weighed
by ::

    exp(-|x - x'|^2 / (2 sigma^2)) * exp(-mean over channels((c - c')^2) / (2 colour^2)).

All pairs of pixels are too many. Each Gaussian is written as a sum over the cells that two pixels have in common: a
grid of places half a standard deviation apart or so, and the picture's own :data:`COLOURS`. That is a matrix of low
rank, positive and the same for any values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COLOURS = 8
"""How many colours a picture is taken apart into; with more of them maps hardly change."""

_MOST = 4096
_ROUNDS = 4
_LEAST = 1e-6


class Bilateral:
    r"""The filter of some pictures.

    Args:

        pictures (Tensor): (N, C, h, w).
        sigma (float): Standard deviation of places, in cells, above 0.
        colour (float): Standard deviation of colours, in standard deviations of the picture, above 0.
        real (Tensor, optional): Boolean, broadcastable to (N, 1, h, w): pixels that are neither padding nor in a margin
            that no tower sees. The others take no part, whatever they hold. Default: None (all are)
    """

    def __init__(self, pictures: Tensor, sigma: float, colour: float, real: Tensor | None = None) -> None:
        # As for a blur: steps that only go by a gradient's sign make much of rounding.
        self._dtype = pictures.dtype if pictures.device.type == "mps" else torch.float64
        wide = pictures.detach().to(self._dtype)
        self._down, self._across = (_cells(wide, axis, sigma) for axis in (2, 3))
        kept = torch.ones_like(wide[:, 0], dtype=torch.bool)
        kept = kept if real is None else kept & real[:, 0]
        # One by one, so that no picture depends on others.
        self._shares = [
            (_colour_shares(picture, some, colour) * some).to(pictures.dtype)
            for picture, some in zip(wide, kept, strict=True)
        ]
        ones = torch.ones_like(wide[0, :1])
        weights = (self._gathered(ones, shares) for shares in self._shares)
        # Where nothing takes part nothing is shared out either.
        self._weights = [weight.where(some, ones) for weight, some in zip(weights, kept, strict=True)]

    def __call__(self, values: Tensor) -> Tensor:
        r"""Values smoothed.

        Args:

            values (Tensor): (N, 1, h, w).

        Returns:
            Tensor: (N, 1, h, w); constant ones stay what they are, and those of pixels that are not real become 0.
        """
        wide = values.to(self._dtype)
        pairs = zip(wide, self._shares, self._weights, strict=True)
        return torch.stack([self._gathered(one, shares) / weight for one, shares, weight in pairs]).to(values.dtype)

    def _gathered(self, values: Tensor, shares: Tensor) -> Tensor:
        """The sum over cells of what each holds, for each pixel of a picture, (1, h, w)."""
        wide = shares.to(self._dtype)
        held = self._down.T @ (wide * values) @ self._across
        return (self._down @ held @ self._across.T * wide).sum(0, keepdim=True)


def _cells(pictures: Tensor, axis: int, sigma: float) -> Tensor:
    """What each pixel along an axis has in common with each cell, (pixels, cells)."""
    # The product of two Gaussians, summed over the cells between, is one that is wider by the root of 2.
    width, last = sigma / math.sqrt(2), pictures.shape[axis] - 1
    # Between any two pixels lies a cell where they are half a pixel apart; more would only cost.
    count = min(max(2, math.ceil(last / width) + 1), 2 * last + 1)
    cells = torch.linspace(0, last, count, dtype=pictures.dtype)
    pixels = torch.arange(last + 1, dtype=pictures.dtype)
    return torch.exp(-(pixels.unsqueeze(1) - cells).square() / (2 * width**2)).to(pictures.device)


def _colour_shares(picture: Tensor, real: Tensor, colour: float) -> Tensor:
    """How much of each pixel of one picture, (C, h, w), belongs to each of its colours, (colours, h, w), 1 in all."""
    real = real if bool(real.any()) else torch.ones_like(real)
    known = picture[:, real]
    # Of a channel of one value nothing is left but rounding.
    least = _LEAST * known.abs().amax(1, keepdim=True).clamp(min=torch.finfo(known.dtype).tiny)
    scale = known.std(1, correction=0, keepdim=True).maximum(least).unsqueeze(2)
    pixels = (picture / scale).movedim(0, 2)
    # Along both axes: every so many of all in a row would leave out whole columns.
    step = math.ceil(math.sqrt(len(known[0]) / _MOST))
    some = pixels[::step, ::step][real[::step, ::step]]
    some = some if len(some) else pixels[real]
    distances = _distances(pixels.flatten(0, 1), _colours_of(some)).square() / len(picture)
    # Half the variance, as with places.
    return torch.softmax(-distances / colour**2, 1).T.unflatten(1, picture.shape[1:])


def _colours_of(pixels: Tensor) -> Tensor:
    """The means of groups of pixels, (pixels, C), of like colour, (colours, C): k-means from pixels far apart."""
    found = pixels[(pixels - pixels.mean(0)).square().sum(1).argmin()].unsqueeze(0)
    for _ in range(COLOURS - 1):
        distances = _distances(pixels, found).amin(1)
        # A colour that is there twice would count for less with its own pixels, and for more with all others.
        if float(distances.max()) < _LEAST:
            break
        found = torch.cat([found, pixels[distances.argmax()].unsqueeze(0)])
    for _ in range(_ROUNDS):
        nearest = _distances(pixels, found).argmin(1)
        members = torch.nn.functional.one_hot(nearest, len(found)).to(pixels.dtype)
        counts = members.sum(0).unsqueeze(1)
        found = torch.where(counts > 0, members.T @ pixels / counts.clamp(min=1), found)
    return found


def _distances(pixels: Tensor, colours: Tensor) -> Tensor:
    return torch.cdist(pixels, colours, compute_mode="donot_use_mm_for_euclid_dist")
