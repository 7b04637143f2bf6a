"""Check what ``attribute`` was given, before any work is done."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from captum_m2ib import _captum
from captum_m2ib.engine.gates import Prior, Settings
from captum_m2ib.engine.layers import Layer

PerModality = float | Sequence[float]


@dataclass(frozen=True)
class Defaults:
    """What an attribution uses where it is not told."""

    beta: float
    variance: float
    lr: float
    initial_gate: float
    antithetic: bool


# The paper's, for its prior N(0, variance); 1 / (1 + exp(-5)) is where its gates start.
PUBLISHED = Defaults(beta=0.1, variance=1.0, lr=1.0, initial_gate=1 / (1 + math.exp(-5)), antithetic=False)
# What measured best on validation scenes for the standardised prior.
STANDARDISED = Defaults(beta=3.0, variance=1.0, lr=0.5, initial_gate=0.5, antithetic=True)
# The same where an input itself is gated.
AT_INPUT = Defaults(beta=0.3, variance=0.25, lr=0.5, initial_gate=0.8, antithetic=True)


def make_settings(
    priors: Sequence[Prior],
    beta: PerModality | None,
    variance: PerModality | None,
    lr: PerModality | None,
    n_steps: int,
    n_samples: int,
    seed: int,
    joint: bool,
    internal_batch_size: int | None,
    show_progress: bool,
    initial_gate: PerModality | None = None,
    antithetic: bool | None = None,
    smoothing: float = 0.0,
    layers: Sequence[Layer] = (),
) -> Settings:
    """Check an attribution's settings and give each modality its own."""
    for name, number in (
        ("n_steps", n_steps),
        ("n_samples", n_samples),
        ("internal_batch_size", internal_batch_size),
    ):
        if name == "internal_batch_size" and number is None:
            continue
        if not isinstance(number, Integral) or isinstance(number, bool) or number < 1:
            raise ValueError(f"{name}: expected a whole number of at least 1, got {number!r}.")
    if not isinstance(seed, Integral) or seed < 0:
        raise ValueError(f"seed: expected a whole number of at least 0, got {seed!r}.")
    if not isinstance(smoothing, Real) or not 0 <= smoothing < 1:
        raise ValueError(f"smoothing: expected a share of the picture's shorter side, from 0 to 1, got {smoothing!r}.")
    defaults = [PUBLISHED if prior is None else STANDARDISED for prior in priors]
    for index, layer in enumerate(layers):
        if layer.argument is not None:
            defaults[index] = AT_INPUT
    chosen = {
        name: tuple(getattr(default, name) for default in defaults) if given is None else given
        for name, given in (("beta", beta), ("variance", variance), ("lr", lr), ("initial_gate", initial_gate))
    }
    count = len(priors)
    gates = _per_modality("initial_gate", chosen["initial_gate"], count)
    if max(gates) >= 1:
        raise ValueError(f"initial_gate: expected a number between 0 and 1, got {initial_gate!r}.")
    return Settings(
        _per_modality("beta", chosen["beta"], count, inclusive=True),
        _per_modality("variance", chosen["variance"], count),
        _per_modality("lr", chosen["lr"], count),
        gates,
        tuple(default.antithetic if antithetic is None else bool(antithetic) for default in defaults),
        int(n_steps),
        int(n_samples),
        int(seed),
        bool(joint),
        float(smoothing),
        None if internal_batch_size is None else int(internal_batch_size),
        show_progress,
    )


def _per_modality(name: str, value: PerModality, count: int, inclusive: bool = False) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if len(values) != count:
        raise ValueError(f"{name}: expected a number or one per modality ({count}), got {len(values)}.")
    for number in values:
        fits = isinstance(number, Real) and (number >= 0 if inclusive else number > 0)
        if not fits or number == float("inf"):
            bound = "of at least" if inclusive else "above"
            raise ValueError(f"{name}: expected a finite number {bound} 0, got {number!r}.")
    return tuple(float(number) for number in values)


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
