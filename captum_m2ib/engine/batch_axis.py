"""Where the pairs run in a tensor that a model made from a batch, found by evidence rather than by shape."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BatchAxis:
    """Where the pairs run in a tensor: a dimension, and how many consecutive entries of it belong to one pair."""

    dim: int
    per_pair: int = 1

    def split(self, tensor: Tensor) -> Tensor:
        """Bring the pairs to the front: (pairs, ...), with what a merged dimension held besides them kept in place."""
        unflat = tensor.unflatten(self.dim, (-1, self.per_pair)).movedim(self.dim, 0)
        return unflat.squeeze(self.dim + 1) if self.per_pair == 1 else unflat

    def merge(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`split`, for any number of pairs."""
        if self.per_pair == 1:
            return tensor.movedim(0, self.dim)
        return tensor.movedim(0, self.dim).flatten(self.dim, self.dim + 1)

    def first(self, tensor: Tensor, pairs: int) -> Tensor:
        """The part of the tensor that belongs to the first ``pairs`` pairs, as a copy."""
        return tensor.narrow(self.dim, 0, pairs * self.per_pair).clone()

    def repeat(self, tensor: Tensor, draws: int) -> Tensor:
        """Repeat every pair ``draws`` times, the draws of one pair next to each other, as a copy."""
        unflat = tensor.unflatten(self.dim, (-1, self.per_pair))
        return unflat.repeat_interleave(draws, self.dim).flatten(self.dim, self.dim + 1)


def find_batch_axis(tensor: Tensor, rows: int) -> BatchAxis | None:
    r"""Find the dimension along which a batch runs, given that its last pair is a copy of its first.

    A shape alone cannot tell a batch of one from a broadcast table, or eight pairs from eight heads; the planted
    copy can: only along the batch are the first and the last entry equal.

    Args:

        tensor (Tensor): Something computed from the batch.
        rows (int): Pairs in the batch, the copy included.

    Returns:
        BatchAxis or None: the axis; None if the tensor does not depend on the batch.
    """
    whole = [BatchAxis(dim) for dim, size in enumerate(tensor.shape) if size == rows]
    # Windows and heads are merged behind the batch, into the first dimension.
    first = tensor.shape[0] if tensor.ndim else 0
    merged = [BatchAxis(0, first // rows)] if first > rows and first % rows == 0 else []
    for axis in whole + merged:
        pairs = tensor.unflatten(axis.dim, (rows, axis.per_pair))
        if nearly_equal(pairs.select(axis.dim, 0), pairs.select(axis.dim, rows - 1)):
            return axis
    return None


def nearly_equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and type differ by no more than kernels round."""
    if a.dtype != b.dtype:
        return False
    # Most often to the bit, which is the quicker thing to see.
    if torch.equal(a, b):
        return True
    if not a.is_floating_point():
        return False
    # Kernels may round rows of one batch differently; the square root of the precision is far above that and far
    # below the difference between two unrelated entries.
    finite = torch.where(a.isfinite(), a.abs(), 0.0)
    tolerance = torch.finfo(a.dtype).eps ** 0.5 * float(finite.max()) if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True))
