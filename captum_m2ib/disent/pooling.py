"""Pooling of channel maps, positive and negative halves apart: pure functions on tensors.

Every pooling here is a weighted sum over locations, ``p_c = sum_l a_cl relu(K_cl)`` and ``n_c = sum_l b_cl
relu(-K_cl)``, so that what a channel says can be traced to the locations that said it without remainder. InfoDisent's
sparse pooling (arXiv 2409.10329) puts the whole weight on one location, ``p_c = max relu(K_c)`` and
``n_c = max relu(-K_c)``; its value of a channel is ``v_c = p_c - n_c``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.disent._checks import check_choice

POOLINGS = ("max", "top_k", "mean")
ESTIMATORS = ("gumbel", "gumbel_soft", "max")


def location_weights(scores: Tensor, pooling: str = "max", top_k: int = 3) -> Tensor:
    r"""Weights of the locations when explaining or predicting.

    Args:

        scores (Tensor): One half of the channel maps, (N, D, L).
        pooling (str, optional): ``"max"``: all on the highest location; ``"top_k"``: equal on the k highest;
            ``"mean"``: equal on all. Default: ``"max"``
        top_k (int, optional): k, at most L are used. Default: 3

    Returns:
        Tensor: Non-negative, summing to 1 over locations, (N, D, L).

    Raises:
        ValueError: if ``pooling`` is unknown.
    """
    if pooling == "mean":
        return torch.full_like(scores, 1 / scores.shape[-1])
    check_choice("pooling", pooling, POOLINGS)
    count = 1 if pooling == "max" else min(top_k, scores.shape[-1])
    chosen = scores.topk(count, dim=-1).indices if count > 1 else scores.argmax(-1, keepdim=True)
    return torch.zeros_like(scores).scatter_(-1, chosen, 1 / count)


def sample_location_weights(
    scores: Tensor,
    estimator: str = "gumbel",
    temperature: float = 1.0,
    noise: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Weights of the locations when training the sparse pooling: a location drawn with Gumbel noise.

    Args:

        scores (Tensor): One half of the channel maps, (N, D, L).
        estimator (str, optional): ``"gumbel"``: one location is drawn and the gradient is the softmax's
            (straight-through Gumbel-softmax); ``"gumbel_soft"``: the softmax itself; ``"max"``: the highest location,
            whose gradient is a subgradient of the maximum. Default: ``"gumbel"``
        temperature (float, optional): Temperature of the softmax; it never changes which location is drawn.
            Default: 1.0
        noise (float, optional): Scale of the noise: a location is drawn with probability softmax(scores / noise).
            Default: 1.0
        generator (torch.Generator, optional): Where the noise comes from. Default: None (the global one)

    Returns:
        Tensor: Non-negative, summing to 1 over locations, (N, D, L).

    Raises:
        ValueError: if ``estimator`` is unknown.
    """
    if estimator == "max":
        return location_weights(scores)
    check_choice("estimator", estimator, ESTIMATORS)
    # Twice as fast as drawing exponentials; the clamp keeps the one zero in 2^24 draws from becoming infinite.
    uniform = torch.rand(scores.shape, generator=generator, dtype=scores.dtype, device=scores.device)
    gumbel = -(-uniform.clamp(min=torch.finfo(scores.dtype).tiny).log()).log()
    soft = F.softmax((scores + noise * gumbel) / temperature, dim=-1)
    if estimator == "gumbel_soft":
        return soft
    return location_weights(soft.detach()) + (soft - soft.detach())


def pool_halves(maps: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    r"""Pool both halves of the channel maps.

    Args:

        maps (Tensor): (N, D, L).
        positive (Tensor): Weights of the locations for the positive half, (N, D, L).
        negative (Tensor): The same for the negative half.

    Returns:
        tuple[Tensor, Tensor]: p and n, both non-negative, (N, D).
    """
    return (positive * F.relu(maps)).sum(-1), (negative * F.relu(-maps)).sum(-1)
