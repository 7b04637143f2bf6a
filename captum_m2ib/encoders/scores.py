"""How two sides' outputs become a score: the cosine of two embeddings, or what a family says in its place.

A score reads the outputs of the first and of the second side and returns one number for each of their leading
dimensions, which broadcast: the same function scores aligned pairs, (N, ...) and (N, ...), and every first output with
every second one, (M, 1, ...) and (1, N, ...).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]


def cosine(first: Tensor, second: Tensor) -> Tensor:
    r"""Cosine similarity of embeddings.

    Args:

        first, second (Tensor): (..., dimensions).

    Returns:
        Tensor: (...), in float32 at least.

    Raises:
        ValueError: if the embeddings differ in width.
    """
    return F.cosine_similarity(*_comparable(first, second), dim=-1)


def dot(first: Tensor, second: Tensor) -> Tensor:
    r"""Dot product of embeddings, for models that do not bring theirs to one length.

    Args:

        first, second (Tensor): (..., dimensions).

    Returns:
        Tensor: (...), in float32 at least.

    Raises:
        ValueError: if the embeddings differ in width.

    Examples::

        >>> dot(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]))
        tensor([11.])
    """
    one, other = _comparable(first, second)
    return (one * other).sum(-1)


def best_match(first: Tensor, second: Tensor) -> Tensor:
    r"""The highest dot product of any of several embeddings with one.

    Args:

        first (Tensor): (..., embeddings, dimensions).
        second (Tensor): (..., dimensions).

    Returns:
        Tensor: (...), in float32 at least.

    Raises:
        ValueError: if the embeddings differ in width.

    Examples::

        >>> best_match(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[0.6, 0.8]]))
        tensor([0.8000])
    """
    return dot(first, second.unsqueeze(-2)).amax(-1)


def distance(p: float) -> Score:
    r"""A score that is the higher, the nearer embeddings are: minus their distance.

    Args:

        p (float): Of which norm: 2 for the Euclidean, 1 for the Manhattan distance.

    Returns:
        Callable: of embeddings, (..., dimensions), as :func:`dot` is.

    Examples::

        >>> distance(1.0)(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
        tensor([-5.])
    """

    def score(first: Tensor, second: Tensor) -> Tensor:
        one, other = _comparable(first, second)
        return -torch.linalg.vector_norm(one - other, ord=p, dim=-1)

    return score


def _comparable(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(
            f"model: expected both towers to return embeddings of one width, got {first.shape[-1]} and "
            f"{second.shape[-1]} dimensions; wrap the towers with their projections."
        )
    return _precise(first, second), _precise(second, first)


@dataclass(frozen=True)
class MaxSim:
    r"""Late interaction: the sum over the second side's tokens of each one's best match among the first side's.

    .. math:: s = \sum_j \max_i p_i \cdot q_j

    or, where ``is_mean``, the mean over them, with page tokens :math:`p_i` and query tokens :math:`q_j`. A token whose
    embedding is all zeros is padding: models of this kind leave padding so, and it neither matches nor counts. Khattab
    and Zaharia, "ColBERT", SIGIR 2020, https://arxiv.org/abs/2004.12832

    Examples::

        >>> page = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])  # two tokens, one of padding
        >>> query = torch.tensor([[[0.6, 0.8], [0.0, -1.0]]])
        >>> MaxSim().terms(page, query)
        tensor([[0.8000, 0.0000]])
        >>> MaxSim()(page, query)
        tensor([0.8000])
    """

    name: ClassVar[str] = "MaxSim"

    is_mean: bool = False

    def terms(self, page: Tensor, query: Tensor) -> Tensor:
        r"""What each token of the query adds.

        Args:

            page (Tensor): Token embeddings, (..., page tokens, dimensions).
            query (Tensor): Token embeddings, (..., query tokens, dimensions).

        Returns:
            Tensor: (..., query tokens), in float32 at least; 0 at padding.
        """
        counted = is_token(query)
        found = torch.where(counted, self.matches(page, query).amax(-1), 0.0)
        return found / counted.sum(-1, keepdim=True).clamp(min=1) if self.is_mean else found

    def matches(self, page: Tensor, query: Tensor) -> Tensor:
        r"""How well each token of the query matches each of the page.

        Args:

            page, query (Tensor): As for :meth:`terms`.

        Returns:
            Tensor: (..., query tokens, page tokens), in float32 at least; minus infinity at padding of the page.
        """
        found = _precise(query, page) @ _precise(page, query).transpose(-1, -2)
        return found.masked_fill(~is_token(page).unsqueeze(-2), -torch.inf)

    def __call__(self, page: Tensor, query: Tensor, scored: Tensor | None = None) -> Tensor:
        r"""The score.

        Args:

            page, query (Tensor): As for :meth:`terms`.
            scored (Tensor, optional): Which tokens of the query count, (..., query tokens). Default: None (all)

        Returns:
            Tensor: (...), in float32 at least.
        """
        counted = is_token(query) if scored is None else is_token(query) & scored.bool()
        return torch.where(counted, self.terms(page, query), 0.0).sum(-1)


def is_token(embeddings: Tensor) -> Tensor:
    """Which embeddings, (..., tokens, dimensions), are none of padding."""
    return (embeddings != 0).any(-1)


def _precise(one: Tensor, other: Tensor) -> Tensor:
    """The first of two tensors as both are multiplied."""
    # Half-precision scores differ by steps as large as what a token contributes.
    return one.to(torch.promote_types(torch.promote_types(one.dtype, other.dtype), torch.float32))
