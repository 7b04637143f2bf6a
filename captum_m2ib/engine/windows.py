"""Gradients of convolutions whose windows do not overlap, such as those that cut a picture into patches.

Such a convolution is a linear map of each window. On a CPU, torch's backward pass through it takes many times as long
as the product that it is, and a picture's own gates need it at every step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib.engine.interception import Handler, is_untouched


def call(proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Run a module; where it cuts its input into windows, what it returns has the same gradient at less cost."""
    if not _cuts(module, args, kwargs):
        return proceed(module, *args, **kwargs)
    given: Tensor = args[0]
    return _Cut.apply(given, module.weight, lambda plain: proceed(module, plain))


def _cuts(module: nn.Module, args: Any, kwargs: Any) -> bool:
    if not isinstance(module, nn.Conv2d) or not is_untouched(module, nn.Conv2d):
        return False
    if kwargs or len(args) != 1 or not isinstance(args[0], Tensor):
        return False
    given = args[0]
    return (
        given.requires_grad
        and torch.is_grad_enabled()
        and given.ndim == 4
        and given.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and type(module.weight) is nn.Parameter
        and module.weight.dtype == given.dtype
        and not module.weight.requires_grad
        and tuple(module.kernel_size) == tuple(module.stride)
        and module.padding in (0, (0, 0), "valid")
        and tuple(module.dilation) == (1, 1)
        and module.groups == 1
    )


class _Cut(torch.autograd.Function):
    """What a convolution makes of its input, with the gradient as one product."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, convolve: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = given.shape
        return convolve(given.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        _, channels, high, wide = weight.shape
        down, across = gradient.shape[2:]
        windows = gradient.movedim(1, -1) @ weight.flatten(1)
        pixels = windows.unflatten(-1, (channels, high, wide)).permute(0, 3, 1, 4, 2, 5)
        # For one row, torch's backward pass of a batch norm is wrong where channels lie next to each other.
        covered = pixels.reshape(len(gradient), channels, down * high, across * wide).contiguous()
        # What is left over at the far borders is in no window.
        left = (0, ctx.shape[3] - covered.shape[3], 0, ctx.shape[2] - covered.shape[2])
        return F.pad(covered, left), None, None
