"""Record one forward pass as the sequence of its module calls, with what each output depends on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_m2ib.engine.batch_axis import BatchAxis, find_batch_axis
from captum_m2ib.engine.dependence import NOTHING, Dependence, NumbersFrom, Reach, storage_of
from captum_m2ib.engine.frames import Frames
from captum_m2ib.engine.interception import Handler, intercept
from captum_m2ib.engine.layers import (
    Layer,
    Path,
    find_hidden,
    get_at,
    is_transparent,
    map_leaves,
    replace_at,
    tensors_in,
)
from captum_m2ib.engine.needs import Needed, Trace, can_narrow
from captum_m2ib.engine.rows import append_first, check_score


def record(
    forward: Callable[[tuple[Any, ...]], Any], arguments: tuple[Any, ...], pairs: int, taps: Sequence[Tap]
) -> Recording:
    r"""Run a pass on the pairs and a copy of the first, by which their axis is found, and note what it leaves behind.

    Args:

        forward (Callable): Maps a tuple of arguments to one score per pair, (N,).
        arguments (tuple): The arguments; every tensor whose first dimension is N is a batch of pairs.
        pairs (int): N.
        taps (sequence of Tap): The layers to take over.

    Returns:
        Recording: what the pass left behind.

    Raises:
        RuntimeError: if a tapped layer is not reached, or is reached more than once and no call was chosen, or the
            score does not depend on it.
        ValueError: if ``forward`` does not return one score per pair.
    """
    planted = append_first(arguments, pairs)
    recorder = _Recorder(taps, pairs)
    with intercept(recorder), recorder.dependence, NumbersFrom(recorder.dependence):
        recorder.dependence.mark(tensors_in(planted), _FROM_DATA)
        score = check_score(forward(planted), pairs + 1, pairs)
    return recorder.finish(score)


@dataclass(frozen=True)
class Tap:
    """A layer to take over, and whether at its input instead of its output."""

    layer: Layer
    at_input: bool = False


@dataclass(frozen=True, eq=False)
class Recording:
    r"""What one pass left behind.

    Attributes:

        taps (tuple[Tap, ...]): The layers that were taken over; what follows for each tap is in their order.
        calls (tuple[Call, ...]): The module calls, in the order in which they began.
        structures (tuple): What each layer tapped at its output returned, its tensors :class:`Kept`; else None.
        paths (tuple): Where the hidden state sits in what each tapped layer returned, or was called with.
        axes (tuple[BatchAxis, ...]): Where the pairs run in each hidden state as the model holds it.
        hidden (tuple[Tensor, ...]): Each hidden state, pairs first, (N, ...), detached.
        score (Tensor): The scores, (N,), detached.
        precision (float): The distance from 1 to the next number, in the coarsest type that a module returned.
        sizes (dict): Bytes of the tensors that the pass made of the taps, by what they depend on, the taps among it.
        numbers (frozenset[int]): The taps of which a Python number was made outside of every module.
    """

    taps: tuple[Tap, ...]
    calls: tuple[Call, ...]
    structures: tuple[Any, ...]
    paths: tuple[Path, ...]
    axes: tuple[BatchAxis, ...]
    hidden: tuple[Tensor, ...]
    score: Tensor
    precision: float
    sizes: Mapping[Reach, int]
    numbers: Reach = NOTHING

    def name_of(self, place: int) -> str:
        """What a call's module is known by: its name in the outermost module above it, and its class."""
        module = self.calls[place].module
        roots = (call.module for call in self.calls[: place + 1] if call.end > place)
        found = ((name, root) for root in roots for name, one in root.named_modules() if one is module)
        name, _ = next(found, ("", module))
        return f"{name!r} ({type(module).__name__})" if name else type(module).__name__

    def elsewhere(self, index: int, draws: int) -> Tensor:
        """Other values of a tap, (N * draws, ...), as far from the recorded ones as those are from each other."""
        hidden = self.hidden[index].repeat_interleave(draws, 0)
        return hidden + self.direction(index, draws)

    def direction(self, index: int, draws: int) -> Tensor:
        """Steps from a tap's values, (N * draws, ...), at random but always the same, as long as the values spread."""
        hidden = self.hidden[index].repeat_interleave(draws, 0)
        drawn = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(index))
        return drawn.to(hidden.device, hidden.dtype) * hidden.float().std(correction=0).to(hidden.dtype)

    @property
    def pairs(self) -> int:
        """N."""
        return len(self.score)

    @property
    def rows(self) -> int:
        """On how many rows the pass ran: the pairs, and the copy of the first."""
        return self.pairs + 1


@dataclass(frozen=True, eq=False)
class Call:
    r"""One module call.

    Attributes:

        module (nn.Module): The module.
        tap (int or None): The tap opened there.
        end (int): The call after its last inner one.
        reach (frozenset[int]): The taps it depends on.
        output (Output or None): What a rerun may have instead of running the module; None where it may not.
        unseen (tuple[Kept, ...]): Tensors that it used, in their order, which no operation made within sight.
        operators (tuple[str, ...]): Operators on what depends on the pairs that are not torch's own.
        numbers (frozenset[int]): The taps of which it made a Python number.
        needed (Needed or None): The positions at which its output is read, where these are few and it can be run at
            them alone.
    """

    module: nn.Module
    tap: int | None
    end: int = 0
    reach: Reach = NOTHING
    output: Output | None = None
    unseen: tuple[Kept, ...] = ()
    operators: tuple[str, ...] = ()
    numbers: Reach = NOTHING
    needed: Needed | None = None


@dataclass(frozen=True, eq=False)
class Output:
    """What a call returned, its tensors :class:`Kept`; a constant, of which a part owes nothing to the arguments.

    A constant may still have been made for so many rows.
    """

    structure: Any
    is_constant: bool


@dataclass(frozen=True, eq=False)
class Kept:
    """A tensor of the pass, for the pairs alone where it has an axis of pairs."""

    value: Tensor
    axis: BatchAxis | None


# What every batch tensor descends from, beside the taps, which are counted from 0.
_DATA = -1
_FROM_DATA: Reach = frozenset([_DATA])


class _Opened(NamedTuple):
    """Where the hidden state was found at a tap, where its pairs run, and the state, the planted copy included."""

    path: Path
    axis: BatchAxis
    hidden: Tensor


# While it is open, no mode is told of what tensors are asked: looking on is no part of a pass.
_looking_on = torch._C.DisableTorchFunction


class _Recorder:
    """Runs every call, opens the taps, and notes what each output depends on."""

    def __init__(self, taps: Sequence[Tap], pairs: int) -> None:
        self._frames = Frames(self._keep_unseen)
        self._trace = Trace(lambda tensors: self.dependence.of(tensors), _FROM_DATA)
        self.dependence = Dependence(
            self._frames.of_unseen,
            self._before_change,
            self._frames.note_operator,
            self._frames.note_number,
            self._trace.note,
        )
        self._taps = tuple(taps)
        self._pairs = pairs
        self._seen = [0] * len(taps)
        self._calls: list[Call] = []
        self._opened: dict[int, _Opened] = {}
        self._structures: dict[int, Any] = {}
        # Per call what it returned: as it is until something changes it, since most is dropped for a larger whole.
        self._loose: dict[int, Output] = {}
        self._kept: dict[int, Output] = {}
        self._types: set[torch.dtype] = set()

    def __call__(self, proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tap, start = self._tap_of(module), len(self._calls)
        self._calls.append(Call(module, tap))
        if tap is not None and self._taps[tap].at_input:
            args, kwargs = self._open(tap, (args, kwargs))
        with _looking_on():
            received = tensors_in((args, kwargs))
            versions = [tensor._version for tensor in received]
            self._frames.enter(module, self.dependence.of(received))
        output = proceed(module, *args, **kwargs)
        with _looking_on():
            for tensor in tensors_in(output):
                if not self.dependence.has_seen(tensor):
                    self.dependence.mark([tensor], self.dependence.of([tensor]))
            frame = self._frames.leave()
        if tap is not None and not self._taps[tap].at_input:
            output = self._open(tap, output)
            self._structures[tap] = self._keep(output)
        with _looking_on():
            if can_narrow(module, args, kwargs) and tap is None:
                self._trace.note_layer(start, output)
            is_changed = versions != [tensor._version for tensor in received] or _is_refilled(args, kwargs, received)
            reach = self._close(start, received, output, is_changed)
        self._calls[start] = Call(
            module=module,
            tap=tap,
            end=len(self._calls),
            reach=reach,
            unseen=tuple(kept for _, kept in frame.unseen.values()),
            operators=tuple(frame.operators),
            numbers=frame.numbers - _FROM_DATA,
        )
        return output

    def finish(self, score: Tensor) -> Recording:
        """The recording, if every tap was reached as asked and the score depends on it."""
        reach = self.dependence.of([score])
        for index, tap in enumerate(self._taps):
            _check_reached(tap.layer, self._seen[index], index in reach)
        opened = [self._opened[index] for index in range(len(self._taps))]
        for place in list(self._loose):
            self._fix(place)
        needed = self._needed(score)
        return Recording(
            taps=self._taps,
            calls=tuple(
                replace(call, output=self._kept.get(place), needed=needed.get(place))
                for place, call in enumerate(self._calls)
            ),
            structures=tuple(self._structures.get(index) for index in range(len(self._taps))),
            paths=tuple(one.path for one in opened),
            axes=tuple(one.axis for one in opened),
            hidden=tuple(one.axis.split(one.hidden)[: self._pairs] for one in opened),
            score=score.detach()[: self._pairs].clone(),
            precision=max(torch.finfo(dtype).eps for dtype in (score.dtype, *self._types)),
            numbers=self._frames.numbers - _FROM_DATA,
            sizes=self.dependence.sizes,
        )

    def _needed(self, score: Tensor) -> dict[int, Needed]:
        """Where linear layers are read, by call; nothing where values went out of sight."""
        if self._frames.numbers or any(call.numbers or call.unseen or call.operators for call in self._calls):
            return {}
        return self._trace.needed(score)

    def _tap_of(self, module: nn.Module) -> int | None:
        chosen = None
        for index, tap in enumerate(self._taps):
            if tap.layer.module is module:
                if tap.layer.call in (None, self._seen[index]) and index not in self._opened:
                    chosen = index
                self._seen[index] += 1
        return chosen

    def _open(self, index: int, structure: Any) -> Any:
        """Take the hidden state, and pass on a copy by which its descendants are known."""
        tap = self._taps[index]
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
                f"{tuple(passed.shape)}, does not depend on the pair, or holds pairs of several sizes one behind the "
                "other; choose another layer, or pass pairs of one size at a time."
            )
        self._opened[index] = _Opened(path, axis, passed.clone())
        self.dependence.mark([passed], frozenset([index]))
        return replace_at(structure, path, passed)

    def _close(self, start: int, received: list[Tensor], output: Any, is_changed: bool) -> Reach:
        """What a call depends on; its output is noted if a rerun may have that instead."""
        returned = tensors_in(output)
        reach = self.dependence.of([*received, *returned]) - _FROM_DATA
        self._types.update(tensor.dtype for tensor in returned if tensor.is_floating_point())
        # Reuse would lose what a module does to its inputs, and the link between an input and an output that is it.
        aliases = {storage_of(tensor) for tensor in received} & {storage_of(tensor) for tensor in returned}
        if is_changed or aliases or not is_transparent(output):
            return reach
        for outputs in (self._loose, self._kept):
            # Whenever such a part could be reused, so could this whole.
            for place in [place for place in outputs if place > start and self._calls[place].reach >= reach]:
                del outputs[place]
        is_constant = any(_DATA not in self.dependence.of([tensor]) for tensor in returned)
        self._loose[start] = Output(map_leaves(output, lambda tensor: tensor), is_constant)
        return reach

    def _before_change(self, tensors: list[Tensor]) -> None:
        """Copy what was returned before an operation changes it in place."""
        changed = {storage_of(tensor) for tensor in tensors}
        for place, output in list(self._loose.items()):
            if not changed.isdisjoint(map(storage_of, tensors_in(output.structure))):
                self._fix(place)

    def _fix(self, place: int) -> None:
        output = self._loose.pop(place)
        self._kept[place] = replace(output, structure=self._keep(output.structure))

    def _keep(self, structure: Any) -> Any:
        def keep(tensor: Tensor) -> Kept:
            value = tensor.detach()
            axis = self._axis(value)
            return Kept(value.clone() if axis is None else axis.first(value, self._pairs), axis)

        with self.dependence.resting():
            return map_leaves(structure, keep)

    def _keep_unseen(self, tensor: Tensor) -> Kept:
        with self.dependence.resting():
            value = tensor.detach()
            axis = find_batch_axis(value, self._pairs + 1)
            return Kept(value.clone() if axis is None else axis.first(value, self._pairs), axis)

    def _axis(self, tensor: Tensor) -> BatchAxis | None:
        with self.dependence.resting():
            return find_batch_axis(tensor, self._pairs + 1) if _DATA in self.dependence.of([tensor]) else None


def _is_refilled(args: Any, kwargs: Any, received: list[Tensor]) -> bool:
    """Whether a module put other tensors into a list or dictionary that it was called with."""
    if not any(isinstance(one, (list, dict)) for one in (*args, *kwargs.values())):
        return False
    now = tensors_in((args, kwargs))
    return len(now) != len(received) or any(new is not old for new, old in zip(now, received, strict=True))


def _check_reached(layer: Layer, seen: int, is_used: bool) -> None:
    """Raise unless a layer was reached as asked and the score depends on it."""
    name, chosen = layer.name, layer.call
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
    if not is_used:
        raise RuntimeError(
            f"layers: the score does not depend on layer {name!r}; choose a layer between the input and the score."
        )
