"""The rows that a pass is run on, made of the caller's pairs, and the scores that it returns for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# What a function raises that is given what it cannot work on.
FAILURES = (RuntimeError, ValueError, IndexError, KeyError, TypeError)

EACH_BY_ITSELF = (
    "let it score each pair by itself, and wrap what pairs share, as captum_m2ib.Shared(tensor) among "
    "additional_forward_args."
)


@dataclass(frozen=True, eq=False)
class Shared:
    r"""An additional argument that all pairs have in common, whatever its first dimension.

    Tensors whose first dimension is N are taken as one entry per pair, as everywhere in Captum. Wrapped in this, a
    tensor reaches ``forward_func`` as it is, however many rows a pass has.

    Args:

        value (Any): The argument.

    Examples::

        >>> classes = torch.randn(2, 64)  # two classes, and by chance two pictures
        >>> def logit(pixel_values, classes):
        ...     return pixel_values.flatten(1)[:, :64] @ classes[0]
        >>> method = MultiModalInfoBottleneck(logit, layers=(None,))
        >>> method.attribute(torch.randn(2, 3, 8, 8), additional_forward_args=(Shared(classes),)).shape
        torch.Size([2, 3, 8, 8])
    """

    value: Any


def unwrap(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments as a function takes them."""
    return tuple(one.value if isinstance(one, Shared) else one for one in arguments)


def slice_pairs(argument: Any, pairs: int, start: int, count: int) -> Any:
    """What an argument holds for some of the pairs; what is shared stays as it is."""
    return argument[start : start + count] if is_batch(argument, pairs) else argument


def as_given(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the caller's own call, fit to take part in autograd."""
    return tuple(_plain(one) for one in arguments)


def append_first(arguments: tuple[Any, ...], pairs: int) -> tuple[Any, ...]:
    """Append a copy of the first pair to every batch."""
    return tuple(
        torch.cat([one.detach(), one.detach()[:1]]) if is_batch(one, pairs) else _plain(one) for one in arguments
    )


def repeat_pairs(arguments: tuple[Any, ...], pairs: int, draws: int) -> tuple[Any, ...]:
    """Repeat the pairs of every batch, the draws of one pair next to each other."""
    return tuple(one.detach().repeat_interleave(draws, 0) if is_batch(one, pairs) else _plain(one) for one in arguments)


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


def is_batch(argument: Any, pairs: int) -> bool:
    """Whether an argument is taken as one entry for each of so many pairs."""
    return isinstance(argument, Tensor) and argument.ndim > 0 and argument.shape[0] == pairs


def say_shared(index: int, argument: Tensor) -> str:
    """What to do about an argument that all pairs use, and that has one row for each by chance."""
    return (
        f"forward_func: its argument {index} (counted from 0), a tensor of shape {tuple(argument.shape)}, is used by "
        f"all pairs together, but has {len(argument)} rows as if there was one for each pair; say that it is shared, "
        "as captum_m2ib.Shared(tensor) in its place among additional_forward_args."
    )


def _plain(argument: Any) -> Any:
    argument = argument.value if isinstance(argument, Shared) else argument
    # Tensors made in inference mode cannot take part in autograd; a copy made outside it can.
    if isinstance(argument, Tensor):
        return argument.detach().clone() if argument.is_inference() else argument.detach()
    return argument
