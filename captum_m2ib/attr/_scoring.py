"""The function that scores pairs: what a user may give for it, and what an attribution calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from captum_m2ib import _captum
from captum_m2ib.encoders.dual_encoder import DualEncoder, is_dual_encoder
from captum_m2ib.encoders.wrappers import unwrap
from captum_m2ib.engine.layers import Layer

Forward: TypeAlias = Callable[[tuple[Any, ...]], Any]


def as_forward_func(forward_func: Any) -> Any:
    """A dual encoder, raw or wrapped, becomes a DualEncoder; everything else that can be called stays as it is."""
    if isinstance(forward_func, nn.Module):
        inside = unwrap(forward_func)
        if isinstance(inside, DualEncoder):
            return inside
        if is_dual_encoder(inside):
            return DualEncoder(forward_func)
    if not callable(forward_func):
        raise TypeError(f"forward_func: expected a model or a callable, got {type(forward_func).__name__}.")
    return forward_func


def roots_of(forward_func: Any, layers: Sequence[Layer]) -> list[nn.Module]:
    """Modules that are known to be used."""
    owners = (forward_func, getattr(forward_func, "__self__", None), *(layer.module for layer in layers))
    return [owner for owner in owners if isinstance(owner, nn.Module)]


def scorer(
    forward_func: Callable[..., Any], inputs: tuple[Tensor, ...], additional: tuple[Any, ...], target: Any
) -> tuple[Forward, tuple[Any, ...]]:
    """The score as a function of one tuple of arguments, and that tuple; targets per pair travel as an argument."""
    if target is None:
        return (lambda arguments: forward_func(*arguments)), (*inputs, *additional)
    per_pair = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)
    count = len(inputs)

    def score(arguments: tuple[Any, ...]) -> Any:
        *rest, chosen = arguments
        if per_pair:
            chosen = [tuple(one) if isinstance(one, list) else one for one in chosen.tolist()]
        return _captum.run_forward(forward_func, tuple(rest[:count]), chosen, tuple(rest[count:]))

    return score, (*inputs, *additional, torch.as_tensor(target) if per_pair else target)
