"""An orthogonal change of basis of the channels: the same ``U`` at each location, ``U^T U = I``.

``Zt[:, h, w] = U Z[:, h, w]``. Lengths and angles between locations stay as the backbone made them; only the axes by
which they are described turn. ``U`` starts at the identity, so that training begins with the backbone's own channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.parametrize import register_parametrization

from captum_m2ib.disent._checks import check_choice, check_count

TRANSFORMS = ("cayley", "matrix_exp", "householder", "none")


class _Polish(nn.Module):
    """One Newton-Schulz step towards the nearest orthogonal matrix: an error e becomes about e^2."""

    def forward(self, matrix: Tensor) -> Tensor:
        return 1.5 * matrix - 0.5 * (matrix @ (matrix.mT @ matrix))

    def right_inverse(self, matrix: Tensor) -> Tensor:
        return matrix


class ChannelTransform(nn.Module):
    r"""An orthogonal matrix over channels, through torch's parametrizations.

    Args:

        channels (int): D.
        kind (str, optional): How the matrix is parametrised. ``"cayley"``: ``(I - A/2)^-1 (I + A/2)`` of a skew
            ``A``, by far the cheapest for many channels. ``"matrix_exp"``: ``exp(A)``, which EPIC's code uses (arXiv
            2505.12897); its float32 error grows with D, so that one Newton-Schulz step follows it. ``"householder"``:
            a product of D reflections. ``"none"``: the identity, without parameters, for ablations.
            Default: ``"cayley"``

    Raises:
        ValueError: if ``kind`` is unknown or ``channels`` is below 1.
    """

    weight: Tensor

    def __init__(self, channels: int, kind: str = "cayley") -> None:
        super().__init__()
        check_choice("transform", kind, TRANSFORMS)
        check_count("channels", channels)
        self.channels, self.kind = channels, kind
        self._kept: tuple[Any, Tensor] | None = None
        if kind == "none":
            self.register_buffer("weight", torch.eye(channels), persistent=False)
            return
        self.weight = nn.Parameter(torch.eye(channels))
        orthogonal(self, "weight", orthogonal_map=kind)
        if kind == "matrix_exp":
            register_parametrization(self, "weight", _Polish())

    def forward(self, features: Tensor) -> Tensor:
        r"""Change the basis.

        Args:

            features (Tensor): (N, D, h, w).

        Returns:
            Tensor: (N, D, h, w).
        """
        if self.kind == "none":
            return features
        return torch.einsum("cd,ndhw->nchw", self.matrix(), features)

    def matrix(self) -> Tensor:
        r"""The matrix U; without autograd it is computed once and kept until a parameter changes.

        Returns:
            Tensor: (D, D), orthogonal.
        """
        if torch.is_grad_enabled() or self.kind == "none":
            return self.weight
        # With thousands of channels, building U takes longer than a pass of the backbone.
        held = [*self.parameters(), *self.buffers()]
        key = [(one.data_ptr(), one._version, one.dtype, float(one.double().sum())) for one in held]
        kept = self._kept
        if kept is None or kept[0] != key:
            kept = self._kept = (key, self.weight.detach())
        return kept[1]

    @torch.no_grad()
    def orthogonality_error(self) -> float:
        r"""Largest entry of ``|U^T U - I|``.

        Returns:
            float: computed in float64.
        """
        matrix = self.matrix().double()
        return float(
            (matrix.mT @ matrix - torch.eye(self.channels, dtype=matrix.dtype, device=matrix.device)).abs().max()
        )
