"""Rerun only what depends on a layer, on any module tree, and leave the model as it was found.

One forward pass is recorded as the sequence of its module calls. A call whose output does not depend on a tapped
layer, because it ran before the layer or belongs to the other tower, keeps its output; a rerun reuses that output
instead of running the module, and executes only the calls that the layer's value flows through. Dependence is
followed through every tensor operation of the recorded pass, differentiable or not, so nothing is assumed about the
architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.engine.batch_axis import BatchAxis, find_batch_axis
from captum_m2ib.engine.dependence import Dependence, storage_of
from captum_m2ib.engine.interception import Handler, intercept, is_stateless
from captum_m2ib.engine.layers import (
    Layer,
    Path,
    entering,
    find_hidden,
    get_at,
    is_transparent,
    map_leaves,
    replace_at,
    tensors_in,
)
from captum_m2ib.engine.rows import append_first, check_score, repeat_pairs


@dataclass
class _Call:
    """One module call of the recorded pass."""

    module: nn.Module
    start: int
    end: int = 0
    reach: frozenset[int] = frozenset()
    output: Any = None
    reusable: bool = False
    # Whether a constant was made for so many rows; None until a run of another size has told.
    sized: bool | None = False
    tap: int | None = None


@dataclass
class _Kept:
    """A cached tensor: its pristine value per pair, and the copies repeated over draws that reruns were given."""

    value: Tensor
    axis: BatchAxis | None
    repeated: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def hand_out(self, draws: int) -> Tensor:
        given, version = self.repeated.get(draws, (None, 0))
        # A model that works in place on what its modules returned would corrupt the copy for the next rerun.
        if given is None or given._version != version:
            given = self.value.clone() if self.axis is None else self.axis.repeat(self.value, draws)
            self.repeated[draws] = (given, given._version)
        return given


@dataclass
class Tap:
    """A layer to take over, and whether at its input instead of its output."""

    layer: Layer
    at_input: bool = False


class Suffix:
    r"""A recorded forward pass that can be rerun from the values of its tapped layers.

    Args:

        forward (Callable): Maps a tuple of arguments to one score per pair, (N,).
        arguments (tuple): The arguments; every tensor whose first dimension is N is a batch of pairs.
        pairs (int): N.
        taps (sequence of Tap): The layers to take over.

    Attributes:

        score (Tensor): The scores of the recorded pass, (N,).
        hidden (list[Tensor]): The hidden state at each tap, pairs first, (N, ...), detached.
        axes (list[BatchAxis]): Where the pairs run in each tapped hidden state as the model holds it.

    Raises:
        RuntimeError: if a tapped layer is not reached, or is reached more than once and no call was chosen, or the
            score does not depend on it.
        ValueError: if ``forward`` does not return one score per pair.

    Use inside :func:`captum_m2ib.engine.interception.borrowing`, in the thread that built it.
    """

    def __init__(
        self,
        forward: Callable[[tuple[Any, ...]], Any],
        arguments: tuple[Any, ...],
        pairs: int,
        taps: Sequence[Tap],
    ) -> None:
        self._forward = forward = entering(forward, [tap.layer for tap in taps])
        self._arguments = arguments
        self._pairs = pairs
        self.taps = list(taps)
        recorder = _Recorder(self.taps, pairs + 1)
        planted = append_first(arguments, pairs)
        with intercept(recorder), recorder.dependence:
            recorder.dependence.mark(tensors_in(planted), _DATA)
            score = check_score(forward(planted), pairs + 1, pairs)
        recorder.check(score)
        self._calls = recorder.calls
        self.score = score.detach()[:pairs].clone()
        self._structures = recorder.structures
        self._paths = recorder.paths
        self.axes = [axis for axis in recorder.axes if axis is not None]
        self.hidden = [axis.split(held)[:pairs] for axis, held in zip(self.axes, recorder.hidden, strict=True)]

    def run(self, values: dict[int, Tensor], draws: int) -> Tensor:
        r"""Rerun the pass with given hidden states at some taps.

        Args:

            values (dict): Per tap index the hidden state, pairs first and the draws of a pair next to each other,
                (N * draws, ...). Taps that are not named keep what the pass computes there.
            draws (int): Rows per pair.

        Returns:
            Tensor: Scores, (N * draws,), differentiable with respect to ``values``.

        Raises:
            RuntimeError: if they are not, or the model's calls changed since the recorded pass.
        """
        arguments = repeat_pairs(self._arguments, self._pairs, draws)
        with intercept(_Replayer(self, values, draws)):
            score = check_score(self._forward(arguments), self._pairs * draws, self._pairs)
        if torch.is_grad_enabled() and any(v.requires_grad for v in values.values()) and not score.requires_grad:
            names = ", ".join(repr(self.taps[index].layer.name) for index in values)
            raise RuntimeError(
                f"layers: the score does not depend on layer {names} in a differentiable way; choose a layer after the "
                "last rounding, index or torch.no_grad() between the input and the score."
            )
        return score


# What every batch tensor descends from, beside the taps, which are counted from 0.
_DATA = -1


class _Recorder:
    """Runs every call, opens the taps, and notes what each output depends on."""

    def __init__(self, taps: Sequence[Tap], rows: int) -> None:
        self.taps = taps
        self._rows = rows
        self._seen = [0] * len(taps)
        self._opened: set[int] = set()
        self.dependence = Dependence()
        self.calls: list[_Call] = []
        self.hidden: list[Tensor] = [torch.empty(0)] * len(taps)
        self.axes: list[BatchAxis | None] = [None] * len(taps)
        self.paths: list[Path] = [()] * len(taps)
        self.structures: list[Any] = [None] * len(taps)

    def __call__(self, proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tap = self._tap_of(module)
        call = _Call(module, len(self.calls), tap=tap)
        self.calls.append(call)
        if tap is not None and self.taps[tap].at_input:
            args, kwargs = self._open(tap, (args, kwargs))
        received = tensors_in((args, kwargs))
        versions = [tensor._version for tensor in received]
        output = proceed(module, *args, **kwargs)
        if tap is not None and not self.taps[tap].at_input:
            output = self._open(tap, output)
            self.structures[tap] = self._keep(output)
        returned = tensors_in(output)
        call.end = len(self.calls)
        call.reach = self.dependence.of([*received, *returned]) - {_DATA}
        # Reuse would lose what a module does to its inputs, and the link between an input and an output that is it.
        changed = versions != [tensor._version for tensor in received]
        aliases = {storage_of(tensor) for tensor in received} & {storage_of(tensor) for tensor in returned}
        call.reusable = is_transparent(output) and not changed and not aliases
        if call.reusable:
            call.output = self._keep(output)
            constant = [tensor for tensor in returned if _DATA not in self.dependence.of([tensor])]
            call.sized = None if constant else False
            # Whenever such a part could be reused, so could this whole.
            for part in self.calls[call.start + 1 : call.end]:
                if part.reach >= call.reach:
                    part.output, part.reusable = None, False
        return output

    def check(self, score: Tensor) -> None:
        """Raise unless every tap was reached as asked and the score depends on it."""
        reach = self.dependence.of([score])
        for index, tap in enumerate(self.taps):
            name, chosen, seen = tap.layer.name, tap.layer.call, self._seen[index]
            if seen == 0:
                raise RuntimeError(
                    f"layers: the forward pass never called layer {name!r}; choose a module that forward_func "
                    "runs as module(...), of the model that forward_func uses."
                )
            if chosen is None and seen > 1:
                raise RuntimeError(
                    f"layers: the forward pass called layer {name!r} {seen} times; say which call is meant, "
                    f"as ({name!r}, 0) for the first."
                )
            if chosen is not None and chosen >= seen:
                raise RuntimeError(f"layers: layer {name!r} was called {seen} times, so it has no call {chosen}.")
            if index not in reach:
                raise RuntimeError(
                    f"layers: the score does not depend on layer {name!r}; choose a layer between the input and the "
                    "score."
                )

    def _tap_of(self, module: nn.Module) -> int | None:
        chosen = None
        for index, tap in enumerate(self.taps):
            if tap.layer.module is module:
                if tap.layer.call in (None, self._seen[index]) and index not in self._opened:
                    chosen = index
                self._seen[index] += 1
        return chosen

    def _open(self, index: int, structure: Any) -> Any:
        """Take the hidden state, and pass on a copy by which its descendants are known."""
        tap = self.taps[index]
        side = "input" if tap.at_input else "output"
        path = find_hidden(structure)
        if path is None:
            raise RuntimeError(
                f"layers: the {side} of layer {tap.layer.name!r} holds no floating-point tensor of two or more "
                "dimensions; choose another layer."
            )
        passed = get_at(structure, path).detach().clone()
        axis = self._axis(passed)
        if axis is None:
            raise RuntimeError(
                f"layers: the hidden state at the {side} of layer {tap.layer.name!r}, of shape "
                f"{tuple(passed.shape)}, does not depend on the pair; choose another layer."
            )
        self.hidden[index], self.axes[index], self.paths[index] = passed.clone(), axis, path
        self._opened.add(index)
        self.dependence.mark([passed], index)
        return replace_at(structure, path, passed)

    def _keep(self, structure: Any) -> Any:
        def keep(tensor: Tensor) -> _Kept:
            value = tensor.detach()
            axis = self._axis(value)
            return _Kept(value.clone() if axis is None else axis.first(value, self._rows - 1), axis)

        return map_leaves(structure, keep)

    def _axis(self, tensor: Tensor) -> BatchAxis | None:
        return find_batch_axis(tensor, self._rows) if _DATA in self.dependence.of([tensor]) else None


class _Replayer:
    """Follows the record: reuses what does not depend on the replaced taps, runs the rest."""

    def __init__(self, suffix: Suffix, values: dict[int, Tensor], draws: int) -> None:
        self._suffix = suffix
        self._values = values
        self._replaced = frozenset(values)
        self._draws = draws
        self._cursor = 0

    def __call__(self, proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = self._next(module)
        tap = call.tap if call.tap in self._replaced else None
        if tap is not None:
            if self._suffix.taps[tap].at_input:
                args, kwargs = replace_at((args, kwargs), self._suffix._paths[tap], self._value(tap))
                return proceed(module, *args, **kwargs)
            self._cursor = call.end
            structure = self._hand_out(self._suffix._structures[tap])
            return replace_at(structure, self._suffix._paths[tap], self._value(tap))
        if call.reusable and not (call.reach & self._replaced):
            if call.sized is False:
                self._cursor = call.end
                return self._hand_out(call.output)
            return self._remake(call, proceed(module, *args, **kwargs))
        return proceed(module, *args, **kwargs)

    def _remake(self, call: _Call, output: Any) -> Any:
        """Run a constant again, such as a query repeated for each row, unless its shape proves to be fixed."""
        if call.sized is None and self._suffix._pairs * self._draws != self._suffix._pairs + 1:
            kept: list[Any] = []
            map_leaves(call.output, kept.append, _Kept)
            pairs = zip(tensors_in(output), kept, strict=True)
            call.sized = any(k.axis is None and t.shape != k.value.shape for t, k in pairs)
        return output

    def _next(self, module: nn.Module) -> _Call:
        calls = self._suffix._calls
        if self._cursor >= len(calls) or not _is_same(calls[self._cursor].module, module):
            expected = type(calls[self._cursor].module).__name__ if self._cursor < len(calls) else "no further call"
            raise RuntimeError(
                "forward_func: its module calls changed between two runs on the same pairs (the first ran "
                f"{expected} where the second ran {type(module).__name__}); make its control flow independent of "
                "earlier calls and of the hidden state."
            )
        self._cursor += 1
        return calls[self._cursor - 1]

    def _value(self, tap: int) -> Tensor:
        # A copy, so that a model that works in place leaves the caller's values alone.
        return self._suffix.axes[tap].merge(self._values[tap]).clone()

    def _hand_out(self, structure: Any) -> Any:
        return map_leaves(structure, lambda kept: kept.hand_out(self._draws), _Kept)


def _is_same(recorded: nn.Module, module: nn.Module) -> bool:
    """Whether a call is the recorded one; a function in a module's guise may be made anew for each pass."""
    return recorded is module or (type(recorded) is type(module) and is_stateless(module))
