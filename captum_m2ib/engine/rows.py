"""The rows that a pass is run on, made of the caller's pairs, and the scores that it returns for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def append_first(arguments: tuple[Any, ...], pairs: int) -> tuple[Any, ...]:
    """Append a copy of the first pair to every batch."""
    return tuple(
        torch.cat([one.detach(), one.detach()[:1]]) if _is_batch(one, pairs) else _plain(one) for one in arguments
    )


def repeat_pairs(arguments: tuple[Any, ...], pairs: int, draws: int) -> tuple[Any, ...]:
    """Repeat the pairs of every batch, the draws of one pair next to each other."""
    return tuple(
        one.detach().repeat_interleave(draws, 0) if _is_batch(one, pairs) else _plain(one) for one in arguments
    )


def check_score(score: Any, rows: int, pairs: int) -> Tensor:
    """The scores as a tensor of shape (rows,), or an error, in terms of the user's pairs, that says what to return."""
    if not isinstance(score, Tensor) or score.numel() != rows or score.shape[:1] != (rows,):
        got = type(score).__name__
        if isinstance(score, Tensor):
            got = f"a tensor of shape {tuple(pairs if size == rows else size for size in score.shape)}"
        raise ValueError(
            f"forward_func: expected one score per pair, a tensor of shape ({pairs},) for {pairs} pairs, got {got}; "
            "return the similarity of each aligned pair, not the matrix of all images with all texts."
        )
    if not score.is_floating_point():
        raise ValueError(f"forward_func: expected floating-point scores, got {score.dtype}.")
    return score.reshape(rows)


def _is_batch(argument: Any, pairs: int) -> bool:
    return isinstance(argument, Tensor) and argument.ndim > 0 and argument.shape[0] == pairs


def _plain(argument: Any) -> Any:
    # Tensors made in inference mode cannot take part in autograd; a copy made outside it can.
    if isinstance(argument, Tensor):
        return argument.detach().clone() if argument.is_inference() else argument.detach()
    return argument
