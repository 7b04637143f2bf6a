"""Contributions of channels to a decision: exact, from pooled halves down to cells of the grid.

With pooled halves ``p, n`` and classifier ``W, b``, ``logit_k = sum_c (W_kc p_c - W_kc n_c) + b_k``. Each half is
itself a weighted sum over locations (:mod:`captum_m2ib.disent.pooling`), so that every logit is a sum over channels,
signs and cells, with nothing left over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.disent.head import ConceptHead


class Half(NamedTuple):
    r"""One half of a channel in one prediction.

    Args:

        channel (int): Index of the channel.
        sign (int): 1 for the positive half, -1 for the negative.
        contribution (float): What it adds to the target's logit.
        cell (tuple[int, int]): Row and column where it is strongest.
    """

    channel: int
    sign: int
    contribution: float
    cell: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Contributions:
    r"""What each half of each channel contributes to a target's logit.

    Attributes:

        logits (Tensor): (N, n_classes).
        target (Tensor): The class explained, int64 (N,).
        positive (Tensor): Contributions of positive halves, (N, D).
        negative (Tensor): Contributions of negative halves, (N, D).
        bias (Tensor): Bias of the target, (N,); positive, negative and bias sum to what is explained: the target's
            logit, or with ``contrast`` how far it is above the mean logit.
        maps (Tensor): Channel maps, (N, D, h, w).
        cells (Tensor): The same contributions by cell, where the pooling took them, (N, h, w).
        spread (Tensor): The same contributions by cell, each half's spread in proportion to its map, (N, h, w).
    """

    logits: Tensor
    target: Tensor
    positive: Tensor
    negative: Tensor
    bias: Tensor
    maps: Tensor
    cells: Tensor
    spread: Tensor

    def top(self, count: int = 5) -> list[list[Half]]:
        r"""Per example the halves that contribute most, by absolute value, largest first.

        Args:

            count (int, optional): At most so many; halves that contribute nothing are left out. Default: 5

        Returns:
            list[list[Half]]: per example.
        """
        both = torch.cat([self.positive, self.negative], 1)
        channels, columns = self.positive.shape[1], self.maps.shape[-1]
        found = []
        for row, values in enumerate(both):
            chosen = values.abs().topk(min(count, 2 * channels)).indices.tolist()
            halves = []
            for index in (index for index in chosen if values[index] != 0):
                channel, sign = index % channels, 1 if index < channels else -1
                cell = divmod(int((sign * self.maps[row, channel]).argmax()), columns)
                halves.append(Half(channel, sign, float(values[index]), cell))
            found.append(halves)
        return found

    def halves_holding(self, share: float = 0.9) -> Tensor:
        r"""Per example how few halves hold a share of the absolute contributions.

        Args:

            share (float, optional): The share, above 0 and up to 1. Default: 0.9

        Returns:
            Tensor: int64, (N,).

        Raises:
            ValueError: if ``share`` is out of range.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share: expected a number above 0 and up to 1, got {share!r}.")
        sizes = torch.cat([self.positive, self.negative], 1).double().abs().sort(1, descending=True).values
        held, total = sizes.cumsum(1), sizes.sum(1, keepdim=True)
        # Rounding of the sum must not ask for one half more.
        return ((held < share * total * (1 - 1e-12)).sum(1) + 1) * (total.squeeze(1) > 0)


def contributions(head: ConceptHead, features: Tensor, target: Any = None, contrast: bool = False) -> Contributions:
    r"""Break logits into contributions.

    Args:

        head (ConceptHead): A head in any mode; it is read as in prediction.
        features (Tensor): (N, D, h, w).
        target (int, Tensor or list, optional): Class per example. Default: None (the predicted class)
        contrast (bool, optional): Explain how far the target's logit is above the mean of all logits, which is all
            that a softmax sees, instead of the logit: what speaks for every class alike cancels. Default: False

    Returns:
        Contributions: detached.

    Raises:
        ValueError: if a target is not a class of the head, or there is not one per example.
    """
    with torch.no_grad():
        maps = head.maps(features)
        weights = head.location_weights(maps)
        size = maps.shape[-2:]
        halves = (F.relu(maps).flatten(2), F.relu(-maps).flatten(2))
        pooled = [(weight * half).sum(-1) for weight, half in zip(weights, halves, strict=True)]
        logits = head.classify(*pooled)
        chosen = check_target(target, logits)
        weight, bias = head.class_weight, head.class_bias
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        if contrast:
            weight, bias = weight - weight.mean(0), bias - bias.mean()
        weight = weight[chosen]
        positive, negative = weight * pooled[0], -weight * pooled[1]
        exact = torch.einsum("nc,ncl->nl", weight, weights[0] * halves[0] - weights[1] * halves[1])
        shares = [half / half.sum(-1, keepdim=True).clamp(min=torch.finfo(half.dtype).tiny) for half in halves]
        dense = torch.einsum("nc,ncl->nl", positive, shares[0]) + torch.einsum("nc,ncl->nl", negative, shares[1])
        return Contributions(
            logits, chosen, positive, negative, bias[chosen], maps, exact.unflatten(1, size), dense.unflatten(1, size)
        )


def check_target(target: Any, logits: Tensor) -> Tensor:
    """The class to explain per example, (N,)."""
    count, n_classes = logits.shape
    if target is None:
        return logits.argmax(1)
    try:
        chosen = torch.as_tensor(target, device=logits.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"target: expected a class or one per example, got {target!r}.") from error
    integral = not chosen.is_floating_point() and chosen.dtype != torch.bool
    if not integral or chosen.numel() not in (1, count) or chosen.ndim > 1:
        raise ValueError(
            f"target: expected a class, or one per example ({count}), got {chosen.dtype} of shape "
            f"{tuple(chosen.shape)}."
        )
    if bool(((chosen < 0) | (chosen >= n_classes)).any()):
        raise ValueError(f"target: expected classes from 0 to {n_classes - 1}, got {chosen.tolist()}.")
    return chosen.long().reshape(-1).expand(count)


def heatmaps(maps: Tensor, halves: list[list[Half]]) -> list[Tensor]:
    r"""Per example the maps of some halves, each non-negative.

    Args:

        maps (Tensor): Channel maps, (N, D, h, w).
        halves (list): Per example its halves, as :meth:`Contributions.top` gives them.

    Returns:
        list[Tensor]: per example (len(halves), h, w).
    """
    empty = maps.new_zeros((0, *maps.shape[-2:]))
    return [
        torch.stack([F.relu(half.sign * maps[row, half.channel]) for half in chosen]) if chosen else empty
        for row, chosen in enumerate(halves)
    ]


def purity(maps: Tensor) -> Tensor:
    r"""How much of a location's vector one channel holds, where the channel is strongest.

    At ``l`` where half ``s`` of channel c is largest, ``max(s K_cl, 0) / ||K_:l||``: 1 if the location holds nothing
    but this channel (EPIC, arXiv 2505.12897, for the positive half).

    Args:

        maps (Tensor): Channel maps, (N, D, h, w).

    Returns:
        Tensor: (N, D, 2), positive and negative half, in [0, 1].
    """
    flat = maps.flatten(2)
    norms = flat.norm(dim=1, keepdim=True).clamp(min=1e-8).expand_as(flat)
    found = []
    for half in (F.relu(flat), F.relu(-flat)):
        where = half.argmax(-1, keepdim=True)
        found.append((half.gather(-1, where) / norms.gather(-1, where)).squeeze(-1))
    return torch.stack(found, -1)
