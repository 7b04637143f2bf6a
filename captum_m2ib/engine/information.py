r"""The information bottleneck itself: pure functions on tensors, no model in sight.

A hidden state ``h`` is mixed with noise through a gate ``g = sigmoid(alpha)``, one per element::

    z = g * h + (1 - g) * (m + s * eps),   eps ~ N(0, 1),   prior r = N(m, s^2).

Given ``h``, ``z`` is normal with mean ``g * h + (1 - g) * m`` and standard deviation ``(1 - g) * s``. With
``hn = (h - m) / s`` the divergence from the prior is, per element and in nats, ::

    KL(p(z | h) || r) = -log(1 - g) + ((1 - g)^2 + (g * hn)^2) / 2 - 1 / 2.

``m = 0`` and ``s = sqrt(variance)`` give M2IB (arXiv 2312.17174); ``m`` and ``s`` estimated per channel over a
data set give the standardised bottleneck of IBA (Schulz et al., ICLR 2020).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NATS_PER_BIT = math.log(2.0)


def information(alpha: Tensor, hidden: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Tensor:
    r"""Information that the gated hidden state carries about the hidden state, in nats per element.

    Args:

        alpha (Tensor): Gate logits, any shape that broadcasts with ``hidden``.
        hidden (Tensor): The hidden state.
        mean (Tensor or float, optional): Mean of the prior, broadcastable. Default: 0.0
        std (Tensor or float, optional): Standard deviation of the prior, positive, broadcastable. Default: 1.0

    Returns:
        Tensor: ``KL(p(z | h) || r(z))``, non-negative up to rounding, of the broadcast shape.

    Examples::

        >>> information(torch.zeros(1), torch.ones(1)) / NATS_PER_BIT  # half open: bits of an element at one deviation
        tensor([0.6393])
    """
    gate = torch.sigmoid(alpha)
    standardised = (hidden - mean) / std
    # -log(1 - g) is softplus(alpha): finite for every alpha, where the log of a formed variance is not. The
    # remaining terms are written as -g + g^2 / 2 so that nothing of order one cancels when g is small.
    return F.softplus(alpha) - gate + gate.square() * (1.0 + standardised.square()) / 2.0


def sample(
    alpha: Tensor, hidden: Tensor, noise: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0
) -> Tensor:
    r"""Draw the bottleneck's output for given standard normal noise (all arguments broadcast).

    Args:

        alpha (Tensor): Gate logits.
        hidden (Tensor): The hidden state.
        noise (Tensor): Draws from N(0, 1).
        mean (Tensor or float, optional): Mean of the prior. Default: 0.0
        std (Tensor or float, optional): Standard deviation of the prior. Default: 1.0

    Returns:
        Tensor: ``z``, of the broadcast shape.
    """
    # 1 - g as sigmoid(-alpha) keeps its digits when the gate is nearly open.
    return torch.sigmoid(alpha) * hidden + torch.sigmoid(-alpha) * (mean + std * noise)


def close_fully(alpha: Tensor, idle: Tensor, shut: float = 1.1, kept: float = 1.5) -> Tensor:
    r"""Logits of gates that shut wherever they are hardly further open than gates that nothing needs.

    With ``i`` a gate that nothing needs, a gate ``g`` becomes ``g * min(1, max(0, (g / i - shut) / (kept - shut)))``:
    nothing jumps. A descent that was too short to close ``i`` to 0.2 tells less, and from 0.3 on nothing.

    Args:

        alpha (Tensor): Gate logits, any shape.
        idle (Tensor): Logits where the same descent left gates that no score asks for, broadcastable.
        shut (float, optional): Gates up to so many times the idle ones let nothing through. Default: 1.1
        kept (float, optional): Gates from so many times the idle ones on stay as they are. Default: 1.5

    Returns:
        Tensor: logits, of the same shape; negative infinity where nothing passes, which carries no information.

    Examples::

        >>> gates, idle = torch.logit(torch.tensor([0.04, 0.052, 0.06, 0.9])), torch.logit(torch.tensor(0.04))
        >>> torch.sigmoid(close_fully(gates, idle))
        tensor([0.0000, 0.0260, 0.0600, 0.9000])
    """
    gate, unneeded = torch.sigmoid(alpha), torch.sigmoid(idle)
    share = ((gate / unneeded - shut) / (kept - shut)).clamp(0, 1)
    share = torch.maximum(share, ((unneeded - 0.2) / 0.1).clamp(0, 1))
    return torch.where(share < 1, torch.logit(gate * share), alpha)


def mean_information(elements: Tensor, real: Tensor | None = None) -> Tensor:
    r"""Average the information of each pair over its real elements.

    Args:

        elements (Tensor): Information per element, (N, ...).
        real (Tensor, optional): Boolean, broadcastable to ``elements``; False where an element is padding.
            Default: None (all are real)

    Returns:
        Tensor: (N,).
    """
    if real is None:
        return elements.flatten(1).mean(1)
    real = real.expand_as(elements).flatten(1)
    return (elements.flatten(1) * real).sum(1) / real.sum(1).clamp(min=1)
