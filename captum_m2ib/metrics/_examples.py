"""What every metric shares: arguments and scores in chunks, maps as units, and examples without a value.

A unit is what a metric ranks, replaces or counts: a pixel, with all its channels, or a token.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from captum_m2ib.engine.rows import EACH_BY_ITSELF, FAILURES, Shared, check_score, is_batch, say_shared, unwrap

NanPolicy = Literal["propagate", "omit", "raise"]
Order = Literal["morf", "lerf", "random"]

# Of a score, what rows of one batch may differ by; what all examples share moves it by far more.
_SAME = 0.01


def optional_module(name: str, purpose: str) -> Any:
    """A module that comes with the extra ``metrics``, or an error that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {name}; install it with pip install captum_m2ib[metrics].") from error


def one_of(name: str, value: Any, kind: Any) -> None:
    """Check a choice against the values that its ``Literal`` type allows."""
    if value not in get_args(kind):
        choices = ", ".join(repr(choice) for choice in get_args(kind))
        raise ValueError(f"{name}: expected one of {choices}, got {value!r}.")


def at_least(name: str, value: float, least: float) -> None:
    """Check a number against its lower bound."""
    if not value >= least:
        raise ValueError(f"{name}: expected a number of at least {least}, got {value!r}.")


def settle(
    results: Sequence[Tensor], undefined: Mapping[str, Tensor], nan_policy: NanPolicy, argument: str = "attributions"
) -> tuple[Tensor, ...]:
    r"""Apply the NaN policy to results per example.

    Args:

        results (sequence of Tensor): Floating-point, first dimension N.
        undefined (mapping): Reason to boolean tensor, (N,) or of the results' shape: what has no value, and why.
        nan_policy (str): ``"propagate"``: NaN there; ``"omit"``: those examples are left out, with a warning that
            counts them; ``"raise"``: an error that names them.
        argument (str, optional): What to blame in the error. Default: "attributions"

    Returns:
        tuple[Tensor, ...]: the results, with N or, after omission, fewer examples.

    Raises:
        ValueError: if an example has no value and the policy is ``"raise"``, or the policy is unknown.
    """
    one_of("nan_policy", nan_policy, NanPolicy)
    lost = torch.zeros(len(results[0]), dtype=torch.bool, device=results[0].device)
    settled, reasons = list(results), []
    for reason, where in undefined.items():
        where = where.to(lost.device)
        examples = where.reshape(len(lost), -1).any(1)
        if not bool(examples.any()):
            continue
        lost |= examples
        indices = examples.nonzero().flatten().tolist()
        shown = ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")
        reasons.append(f"{reason}: {len(indices)} (examples {shown})")
        settled = [
            result.masked_fill(where.reshape(*where.shape, *[1] * (result.ndim - where.ndim)), torch.nan)
            for result in settled
        ]
    if reasons and nan_policy == "raise":
        raise ValueError(
            f"{argument}: expected a value for each of the {len(lost)} examples, got none for {int(lost.sum())}; "
            f"{'; '.join(reasons)}; pass nan_policy='omit' or 'propagate' to go on without them."
        )
    if reasons and nan_policy == "omit":
        warnings.warn(
            f"{argument}: {int(lost.sum())} of {len(lost)} examples have no value and are left out; "
            f"{'; '.join(reasons)}.",
            UserWarning,
            stacklevel=3,
        )
        settled = [result[~lost] for result in settled]
    return tuple(settled)


def join_arguments(inputs: Any, additional_forward_args: Any) -> tuple[Any, ...]:
    r"""Inputs and additional arguments as one tuple, checked to agree on the number of examples.

    Raises:
        ValueError: if ``inputs`` holds no tensor first, or a tensor has another number of rows; tensors without a
            dimension and objects of any other kind are handed on as they are.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    if not tensors or not all(isinstance(tensor, Tensor) and tensor.ndim for tensor in tensors):
        raise ValueError(f"inputs: expected a tensor or a tuple of tensors, batch first, got {type(inputs).__name__}.")
    additional = additional_forward_args
    if additional is None:
        additional = ()
    arguments = (*tensors, *(additional if isinstance(additional, tuple) else (additional,)))
    sizes = [argument.shape[0] for argument in arguments if isinstance(argument, Tensor) and argument.ndim]
    if len(set(sizes)) > 1 or not sizes[0]:
        raise ValueError(
            f"inputs: expected the same number of examples, at least one, in every input and additional argument, got "
            f"{sizes}; wrap what examples share, as captum_m2ib.Shared(tensor)."
        )
    return arguments


def argument_at(arguments: Sequence[Any], modality: int, is_ids: bool) -> Tensor:
    """The input that a metric changes: pixels, (N, C, H, W), or token ids, (N, L)."""
    expected = "integer token ids, (N, L)" if is_ids else "floating-point pictures, (N, C, H, W)"
    if not 0 <= modality < len(arguments):
        raise ValueError(f"modality: expected an index below {len(arguments)}, got {modality}.")
    found = arguments[modality]
    fits = isinstance(found, Tensor) and found.ndim == (2 if is_ids else 4) and found.is_floating_point() != is_ids
    if not fits:
        got = f"{found.dtype} of shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"modality: expected argument {modality} to be {expected}, got {got}.")
    return found


def rows_of(arguments: Sequence[Any], rows: Tensor, replaced: Mapping[int, Tensor] | None = None) -> list[Any]:
    """The chosen examples of every argument, some arguments replaced by given rows."""
    chosen = [
        argument[rows.to(argument.device)] if isinstance(argument, Tensor) and argument.ndim else argument
        for argument in arguments
    ]
    for index, value in (replaced or {}).items():
        chosen[index] = value
    return chosen


@torch.no_grad()
def run(forward_func: Callable[..., Any], arguments: Sequence[Any], rows: int) -> Tensor:
    """Scores, (rows,), in at least float32."""
    scores = check_score(forward_func(*unwrap(arguments)), rows, rows)
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def chunks(total: int, size: int | None, description: str, show_progress: bool) -> Iterator[Tensor]:
    """Row indices in chunks of at most ``size``, under a progress bar."""
    from tqdm.auto import tqdm

    starts = range(0, total, size or total)
    for start in tqdm(starts, desc=description, disable=not show_progress):
        yield torch.arange(start, min(start + (size or total), total))


def check_parts(forward_func: Callable[..., Any], arguments: tuple[Any, ...], at_once: int | None) -> None:
    r"""Refuse arguments that parts of the examples cannot be taken of.

    Args:

        forward_func (Callable): Maps arguments to one score per example.
        arguments (tuple): Its arguments.
        at_once (int or None): How many rows a call is going to have; None for all examples, which needs no look.

    Raises:
        ValueError: if the score of an example changes with how many others there are, as it does where a tensor with
            as many rows as there are examples is used by all of them together.
    """
    examples = len(arguments[0])
    if at_once is not None:
        at_least("internal_batch_size", at_once, 1)
    if at_once in (None, examples):
        return

    def is_kept(given: tuple[Any, ...]) -> bool:
        two = torch.arange(2) % examples
        try:
            alone, beside = (run(forward_func, rows_of(given, two[:rows]), rows) for rows in (1, 2))
        except torch.cuda.OutOfMemoryError:
            return True
        except FAILURES:
            return False
        return bool((alone - beside[:1]).abs() <= _SAME * alone.abs()) or not bool(alone.isfinite())

    if is_kept(arguments):
        return
    for index, one in enumerate(arguments):
        if is_batch(one, examples) and is_kept((*arguments[:index], Shared(one), *arguments[index + 1 :])):
            raise ValueError(say_shared(index, one))
    raise ValueError(
        "forward_func: the score of an example changes with the other examples in the batch, so internal_batch_size "
        f"would change the result; leave it out, or {EACH_BY_ITSELF}"
    )


def unit_maps(attributions: Any, shape: Sequence[int], expected: str) -> Tensor:
    r"""Maps with one value per unit, in float64; an image map's channels are summed.

    Args:

        attributions (Tensor): Of ``shape``, or with a dimension of channels after the first.
        shape (sequence of int): (N, ...) of the units.
        expected (str): Where the shape comes from, for the error.

    Returns:
        Tensor: of ``shape``.
    """
    if isinstance(attributions, Tensor):
        given = attributions.detach()
        if tuple(given.shape) == tuple(shape):
            return given.double()
        if given.ndim == len(shape) + 1 and (given.shape[0], *given.shape[2:]) == tuple(shape):
            return given.double().sum(1)
    got = tuple(attributions.shape) if isinstance(attributions, Tensor) else type(attributions).__name__
    raise ValueError(
        f"attributions: expected one value per unit of {expected}, shape {tuple(shape)} or the same with channels, "
        f"got {got}."
    )


def unit_flags(name: str, flags: Any, shape: Sequence[int], device: torch.device) -> Tensor:
    """A boolean per unit, (N, units); all True where none are given."""
    if flags is None:
        return torch.ones(shape, dtype=torch.bool, device=device).flatten(1)
    if not isinstance(flags, Tensor) or flags.dtype != torch.bool or tuple(flags.shape) != tuple(shape):
        got = f"{flags.dtype} of shape {tuple(flags.shape)}" if isinstance(flags, Tensor) else type(flags).__name__
        raise ValueError(f"{name}: expected a boolean tensor of shape {tuple(shape)}, got {got}.")
    return flags.to(device).flatten(1)


def finite_maps(maps: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Flat maps, with 0 where they are not finite, and which examples have such a value among the units counted."""
    flat = maps.flatten(1)
    broken = (~flat.isfinite() & counted).any(1)
    return flat.nan_to_num(0.0, 0.0, 0.0), broken


def min_max(maps: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Flat maps scaled so that the units counted span [0, 1], and which examples are constant there (0 for those)."""
    low = maps.masked_fill(~counted, torch.inf).amin(1, keepdim=True)
    span = maps.masked_fill(~counted, -torch.inf).amax(1, keepdim=True) - low
    flat = ~(span > 0)
    return torch.where(flat, 0.0, (maps - low) / span.masked_fill(flat, 1.0)), flat.squeeze(1)


def importance_ranks(maps: Tensor, order: Order, seed: int, counted: Tensor) -> Tensor:
    r"""Each unit's place in the order in which units are changed.

    Args:

        maps (Tensor): Flat and finite, (N, U).
        order (str): ``"morf"``, most relevant first; ``"lerf"``, least relevant first; ``"random"``.
        seed (int): Of the order of ties, common to all examples, and of the random order.
        counted (Tensor): (N, U), False for units that are never changed; they come last.

    Returns:
        Tensor: (N, U), ranks from 0.
    """
    one_of("order", order, Order)
    generator = torch.Generator().manual_seed(seed)
    shuffle = torch.randperm(maps.shape[1], generator=generator).to(maps.device)
    if order == "random":
        maps = torch.rand(maps.shape, generator=generator, dtype=torch.float64).to(maps.device)
    key = (maps if order == "lerf" else -maps).masked_fill(~counted, torch.inf)
    sequence = shuffle[key[:, shuffle].argsort(stable=True, dim=1)]
    places = torch.arange(maps.shape[1], device=maps.device).expand_as(sequence)
    return torch.empty_like(sequence).scatter_(1, sequence, places)


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks within each row, (N, U), from 1 in ascending order; equal values share the mean of their ranks."""
    ordered = values.sort(1).values
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + up_to + 1).double() / 2
