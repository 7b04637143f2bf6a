"""What ``attribute`` was given to explain, checked before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_m2ib import _captum
from captum_m2ib.attr._scoring import Forward, scorer
from captum_m2ib.engine.rows import slice_pairs
from captum_m2ib.engine.settings import check_count


@dataclass(frozen=True)
class Explained:
    r"""The pairs that a call explains.

    Attributes:

        inputs (tuple[Tensor, ...]): The inputs to explain.
        additional (tuple): Further arguments of the function.
        forward (Callable): Maps the tuple of all arguments to scores, (N,).
        arguments (tuple): All arguments: the inputs, the further ones, and the target where it differs by pair.
    """

    inputs: tuple[Tensor, ...]
    additional: tuple[Any, ...]
    forward: Forward
    arguments: tuple[Any, ...]

    @classmethod
    def ensure(
        cls,
        forward_func: Callable[..., Any],
        inputs: Any,
        target: Any,
        additional_forward_args: Any,
        most: int | None = None,
    ) -> Explained:
        """Of what a call was given; at most so many inputs."""
        tensors = format_inputs(inputs, most)
        additional = format_additional(additional_forward_args, len(tensors[0]))
        return cls(tensors, additional, *scorer(forward_func, tensors, additional, target))

    @property
    def pairs(self) -> int:
        """How many pairs there are."""
        return len(self.inputs[0])

    def parts(self, at_once: int | None) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """Where each part of so many pairs starts, and its arguments."""
        step = min(self.pairs, at_once or self.pairs)
        for start in range(0, self.pairs, step):
            yield start, tuple(slice_pairs(argument, self.pairs, start, step) for argument in self.arguments)

    def count(self, at_once: int | None) -> int:
        """How many parts there are."""
        return -(-self.pairs // min(self.pairs, at_once or self.pairs))


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
                f"shape {tuple(argument.shape)}; wrap what the pairs share, as captum_m2ib.Shared(tensor)."
            )
    return arguments


def rows_at_once(internal_batch_size: int | None, rows_per_pair: int) -> tuple[int | None, int]:
    """How many pairs, and how many rows of each, go through the model together."""
    if internal_batch_size is None:
        return None, rows_per_pair
    check_count("internal_batch_size", internal_batch_size)
    return max(1, internal_batch_size // rows_per_pair), min(rows_per_pair, internal_batch_size)
