"""Check what ``attribute`` was given, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_m2ib import _captum
from captum_m2ib.engine.gates import Prior
from captum_m2ib.engine.layers import Layer
from captum_m2ib.engine.settings import Defaults

# The paper's, for its prior N(0, variance); 1 / (1 + exp(-5)) is where its gates start.
PUBLISHED = Defaults(beta=0.1, variance=1.0, lr=1.0, initial_gate=1 / (1 + math.exp(-5)), antithetic=False)
# What measured best on validation scenes for the standardised prior.
STANDARDISED = Defaults(beta=3.0, variance=1.0, lr=0.5, initial_gate=0.5, antithetic=True)
# The same where an input itself is gated.
AT_INPUT = Defaults(beta=0.3, variance=0.25, lr=0.5, initial_gate=0.8, antithetic=True)


def defaults_of(layers: Sequence[Layer], priors: Sequence[Prior]) -> list[Defaults]:
    """What holds at each layer where nothing is asked for."""
    return [
        AT_INPUT if layer.argument is not None else PUBLISHED if prior is None else STANDARDISED
        for layer, prior in zip(layers, priors, strict=True)
    ]


def format_inputs(inputs: Any, most: int | None) -> tuple[Tensor, ...]:
    if not isinstance(inputs, Tensor) and not (
        isinstance(inputs, tuple) and inputs and all(isinstance(tensor, Tensor) for tensor in inputs)
    ):
        raise ValueError(
            f"inputs: expected a tensor or a tuple of tensors, got {type(inputs).__name__}; prepare pictures and "
            "captions with DualEncoder.prepare first."
        )
    tensors: tuple[Tensor, ...] = _captum.format_tensor_into_tuples(inputs)
    if most is not None and len(tensors) > most:
        raise ValueError(
            f"inputs: expected at most {most} inputs, one per layer, got {len(tensors)}; pass what is not explained "
            "as additional_forward_args, or name one layer per input."
        )
    sizes = [tensor.shape[0] if tensor.ndim else 0 for tensor in tensors]
    if len(set(sizes)) > 1 or not sizes[0]:
        raise ValueError(f"inputs: expected the same number of examples in each, at least one, got {sizes}.")
    for index, tensor in enumerate(tensors):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"inputs[{index}]: expected finite numbers, got NaN or infinity; check the preprocessing.")
    return tensors


def format_additional(additional: Any, pairs: int) -> tuple[Any, ...]:
    arguments: tuple[Any, ...] = _captum.format_additional_forward_args(additional) or ()
    for index, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and argument.ndim and argument.shape[0] != pairs:
            raise ValueError(
                f"additional_forward_args[{index}]: expected one entry for each of the {pairs} pairs, got a tensor of "
                f"shape {tuple(argument.shape)}; repeat what the pairs share, or let forward_func hold it."
            )
    return arguments


def scorer(
    forward_func: Callable[..., Any], inputs: tuple[Tensor, ...], additional: tuple[Any, ...], target: Any
) -> tuple[Callable[[tuple[Any, ...]], Any], tuple[Any, ...]]:
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
