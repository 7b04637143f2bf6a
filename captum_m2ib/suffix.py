"""Rerun only what depends on a layer, on any module tree, and leave the model as it was found.

One forward pass is recorded as the sequence of its module calls. A call whose output does not depend on a tapped
layer, because it ran before the layer or belongs to the other tower, keeps its output; a rerun reuses that output
instead of running the module, and executes only the calls that the layer's value flows through. Dependence is
followed through every tensor operation of the recorded pass, differentiable or not, so nothing is assumed about the
architecture.

Calls are intercepted on :class:`torch.nn.Module` itself, for the current thread and only while a pass is running:
no hook, ``forward`` attribute or buffer of the model is ever touched. What must be changed for the duration
(training flags, ``requires_grad``) is borrowed and given back, also after an exception or an interrupt.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_m2ib.layers import (
    Layer,
    Path,
    find_hidden,
    get_at,
    is_transparent,
    map_leaves,
    replace_at,
    tensors_in,
)

Handler = Callable[..., Any]


@dataclass(frozen=True)
class BatchAxis:
    """Where the pairs run in a tensor: a dimension, and how many consecutive entries of it belong to one pair."""

    dim: int
    per_pair: int = 1

    def split(self, tensor: Tensor) -> Tensor:
        """Bring the pairs to the front: (pairs, ...), with what a merged dimension held besides them kept in place."""
        unflat = tensor.unflatten(self.dim, (-1, self.per_pair)).movedim(self.dim, 0)
        return unflat.squeeze(self.dim + 1) if self.per_pair == 1 else unflat

    def merge(self, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`split`, for any number of pairs."""
        if self.per_pair == 1:
            return tensor.movedim(0, self.dim)
        return tensor.movedim(0, self.dim).flatten(self.dim, self.dim + 1)

    def first(self, tensor: Tensor, pairs: int) -> Tensor:
        """The part of the tensor that belongs to the first ``pairs`` pairs, as a copy."""
        return tensor.narrow(self.dim, 0, pairs * self.per_pair).clone()

    def repeat(self, tensor: Tensor, draws: int) -> Tensor:
        """Repeat every pair ``draws`` times, the draws of one pair next to each other, as a copy."""
        unflat = tensor.unflatten(self.dim, (-1, self.per_pair))
        return unflat.repeat_interleave(draws, self.dim).flatten(self.dim, self.dim + 1)


def find_batch_axis(tensor: Tensor, rows: int) -> BatchAxis | None:
    r"""Find the dimension along which a batch runs, given that its last pair is a copy of its first.

    A shape alone cannot tell a batch of one from a broadcast table, or eight pairs from eight heads; the planted
    copy can: only along the batch are the first and the last entry equal.

    Args:

        tensor (Tensor): Something computed from the batch.
        rows (int): Pairs in the batch, the copy included.

    Returns:
        BatchAxis or None: the axis; None if the tensor does not depend on the batch.
    """
    whole = [BatchAxis(dim) for dim, size in enumerate(tensor.shape) if size == rows]
    # Windows and heads are merged behind the batch, into the first dimension.
    first = tensor.shape[0] if tensor.ndim else 0
    merged = [BatchAxis(0, first // rows)] if first > rows and first % rows == 0 else []
    for axis in whole + merged:
        pairs = tensor.unflatten(axis.dim, (rows, axis.per_pair))
        if _nearly_equal(pairs.select(axis.dim, 0), pairs.select(axis.dim, rows - 1)):
            return axis
    return None


def _nearly_equal(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    # Kernels may round rows of one batch differently; the square root of the precision is far above that and far
    # below the difference between two unrelated entries.
    finite = torch.where(a.isfinite(), a.abs(), 0.0)
    tolerance = torch.finfo(a.dtype).eps ** 0.5 * float(finite.max()) if a.numel() else 0.0
    return bool(torch.allclose(a, b, rtol=0.0, atol=tolerance, equal_nan=True))


@dataclass
class _Call:
    """One module call of the recorded pass."""

    module: nn.Module
    start: int
    end: int = 0
    reach: frozenset[int] = frozenset()
    output: Any = None
    reusable: bool = False
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

    Use inside :func:`borrowing`, in the thread that built it.
    """

    def __init__(
        self,
        forward: Callable[[tuple[Any, ...]], Any],
        arguments: tuple[Any, ...],
        pairs: int,
        taps: Sequence[Tap],
    ) -> None:
        self._forward = forward
        self._arguments = arguments
        self._pairs = pairs
        self._taps = list(taps)
        recorder = _Recorder(self._taps, pairs + 1)
        planted = tuple(_repeat_first(argument, pairs) for argument in arguments)
        with _intercept(recorder), recorder.dependence:
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
        arguments = tuple(_repeat_rows(argument, self._pairs, draws) for argument in self._arguments)
        with _intercept(_Replayer(self, values, draws)):
            score = check_score(self._forward(arguments), self._pairs * draws, self._pairs)
        if torch.is_grad_enabled() and any(v.requires_grad for v in values.values()) and not score.requires_grad:
            names = ", ".join(repr(self._taps[index].layer.name) for index in values)
            raise RuntimeError(
                f"layers: the score does not depend on layer {names} in a differentiable way; choose a layer after the "
                "last rounding, index or torch.no_grad() between the input and the score."
            )
        return score


# What every batch tensor descends from, beside the taps, which are counted from 0.
_DATA = -1


class _Dependence(TorchDispatchMode):
    """Follows which storages descend from which sources, through every operation."""

    def __init__(self) -> None:
        super().__init__()
        self._reach: dict[int, frozenset[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        came = tensors_in((args, kwargs))
        given = {_storage(tensor) for tensor in came}
        reach = self.of(came)
        made = tensors_in(output)
        for tensor in made:
            key = _storage(tensor)
            # A storage that no argument had is new, whatever its address held before.
            self._reach[key] = reach | self._reach.get(key, frozenset()) if key in given else reach
        if not made and func._schema.is_mutable:
            self.mark(came, *reach)
        return output

    def mark(self, tensors: Sequence[Tensor], *sources: int) -> None:
        for tensor in tensors:
            key = _storage(tensor)
            self._reach[key] = self._reach.get(key, frozenset()) | frozenset(sources)

    def of(self, tensors: Sequence[Tensor]) -> frozenset[int]:
        return frozenset().union(*(self._reach.get(_storage(tensor), frozenset()) for tensor in tensors))


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)


class _Recorder:
    """Runs every call, opens the taps, and notes what each output depends on."""

    def __init__(self, taps: Sequence[Tap], rows: int) -> None:
        self._taps = taps
        self._rows = rows
        self._seen = [0] * len(taps)
        self._opened: set[int] = set()
        self.dependence = _Dependence()
        self.calls: list[_Call] = []
        self.hidden: list[Tensor] = [torch.empty(0)] * len(taps)
        self.axes: list[BatchAxis | None] = [None] * len(taps)
        self.paths: list[Path] = [()] * len(taps)
        self.structures: list[Any] = [None] * len(taps)

    def __call__(self, proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        tap = self._tap_of(module)
        call = _Call(module, len(self.calls), tap=tap)
        self.calls.append(call)
        if tap is not None and self._taps[tap].at_input:
            args, kwargs = self._open(tap, (args, kwargs))
        received = tensors_in((args, kwargs))
        versions = [tensor._version for tensor in received]
        output = proceed(module, *args, **kwargs)
        if tap is not None and not self._taps[tap].at_input:
            output = self._open(tap, output)
            self.structures[tap] = self._keep(output)
        returned = tensors_in(output)
        call.end = len(self.calls)
        call.reach = self.dependence.of([*received, *returned]) - {_DATA}
        # Reuse would lose what a module does to its inputs, and the link between an input and an output that is it.
        changed = versions != [tensor._version for tensor in received]
        aliases = {_storage(tensor) for tensor in received} & {_storage(tensor) for tensor in returned}
        call.reusable = is_transparent(output) and not changed and not aliases
        if call.reusable:
            call.output = self._keep(output)
            # Whenever such a part could be reused, so could this whole.
            for part in self.calls[call.start + 1 : call.end]:
                if part.reach >= call.reach:
                    part.output, part.reusable = None, False
        return output

    def check(self, score: Tensor) -> None:
        """Raise unless every tap was reached as asked and the score depends on it."""
        reach = self.dependence.of([score])
        for index, tap in enumerate(self._taps):
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
            if self._suffix._taps[tap].at_input:
                args, kwargs = replace_at((args, kwargs), self._suffix._paths[tap], self._value(tap))
                return proceed(module, *args, **kwargs)
            self._cursor = call.end
            structure = self._hand_out(self._suffix._structures[tap])
            return replace_at(structure, self._suffix._paths[tap], self._value(tap))
        if call.reusable and not (call.reach & self._replaced):
            self._cursor = call.end
            return self._hand_out(call.output)
        return proceed(module, *args, **kwargs)

    def _next(self, module: nn.Module) -> _Call:
        calls = self._suffix._calls
        if self._cursor >= len(calls) or calls[self._cursor].module is not module:
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


def _repeat_first(argument: Any, pairs: int) -> Any:
    """Append a copy of the first pair to a batch."""
    if isinstance(argument, Tensor) and argument.ndim and argument.shape[0] == pairs:
        return torch.cat([argument.detach(), argument.detach()[:1]])
    return _plain_tensor(argument)


def _repeat_rows(argument: Any, pairs: int, draws: int) -> Any:
    if isinstance(argument, Tensor) and argument.ndim and argument.shape[0] == pairs:
        return argument.detach().repeat_interleave(draws, 0)
    return _plain_tensor(argument)


def _plain_tensor(argument: Any) -> Any:
    # Tensors made in inference mode cannot take part in autograd; a copy made outside it can.
    if isinstance(argument, Tensor):
        return argument.detach().clone() if argument.is_inference() else argument.detach()
    return argument


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


_state = threading.local()
_lock = threading.RLock()
_interceptors = 0
_original_call: Any = None
_borrowed: dict[int, _Loan] = {}


@dataclass
class _Loan:
    """A module or parameter whose flag is changed while at least one run in any thread needs it so."""

    owner: Any
    value: bool
    holders: int = 0


@contextlib.contextmanager
def borrowing(*roots: Any) -> Iterator[None]:
    r"""Set the stage for recording and rerunning: autograd on, models in eval mode, parameters without gradients.

    Whatever is changed is given back at the end: the training flag of every module called, ``requires_grad`` of
    every parameter. Several threads may hold the same model at once; the last gives it back.

    Args:

        *roots: Modules known beforehand (modules met on the way are treated alike).
    """
    borrower, outer = _Borrower(), getattr(_state, "borrower", None)
    try:
        with torch.inference_mode(False), torch.enable_grad(), _plain_execution():
            _state.borrower = borrower
            for root in roots:
                borrower.take(root)
            yield
    finally:
        _state.borrower = outer
        borrower.give_back()


class _Borrower:
    def __init__(self) -> None:
        self._taken: dict[int, Any] = {}
        self._warned = False

    def take(self, root: nn.Module) -> None:
        if id(root) in self._taken:
            return
        for module in root.modules():
            if isinstance(module, nn.DataParallel):
                raise ValueError(
                    "forward_func: DataParallel replicates the model in threads of its own, where a layer cannot be "
                    "taken over; pass the wrapped module (model.module) and one batch per device."
                )
            if id(module) in self._taken:
                continue
            self._borrow(module, "training")
            for parameter in module.parameters(recurse=False):
                if parameter.is_leaf:
                    self._borrow(parameter, "requires_grad")

    def _borrow(self, owner: Any, flag: str) -> None:
        if id(owner) in self._taken:
            return
        with _lock:
            loan = _borrowed.setdefault(id(owner), _Loan(owner, getattr(owner, flag)))
            loan.holders += 1
            self._taken[id(owner)] = flag
            if getattr(owner, flag):
                if flag == "training" and not self._warned:
                    self._warned = True
                    warnings.warn(
                        "forward_func: the model is in training mode; it is explained in eval mode, and its mode is "
                        "restored afterwards. Call model.eval() to silence this.",
                        UserWarning,
                        stacklevel=2,
                    )
                setattr(owner, flag, False)

    def give_back(self) -> None:
        with _lock:
            for key, flag in self._taken.items():
                loan = _borrowed[key]
                loan.holders -= 1
                if loan.holders == 0:
                    del _borrowed[key]
                    if getattr(loan.owner, flag) != loan.value:
                        setattr(loan.owner, flag, loan.value)
            self._taken.clear()


@contextlib.contextmanager
def _intercept(handler: Handler) -> Iterator[None]:
    """Route this thread's module calls through ``handler(proceed, module, args, kwargs)``."""
    global _interceptors, _original_call
    with _lock:
        if _interceptors == 0:
            _original_call = nn.Module.__call__
            nn.Module.__call__ = _call  # type: ignore[method-assign]
        _interceptors += 1
    outer, _state.handler = getattr(_state, "handler", None), handler
    try:
        yield
    finally:
        _state.handler = outer
        with _lock:
            _interceptors -= 1
            if _interceptors == 0:
                nn.Module.__call__ = _original_call  # type: ignore[method-assign]


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    handler = getattr(_state, "handler", None)
    proceed = _original_call
    if handler is None:
        return proceed(module, *args, **kwargs)
    _refuse_compiled(module)
    _state.borrower.take(module)
    return handler(proceed, module, args, kwargs)


def _refuse_compiled(module: nn.Module) -> None:
    compiled = getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod")
    if compiled and not hasattr(torch.compiler, "set_stance"):
        raise RuntimeError(
            f"forward_func: {type(module).__name__} is compiled, and this version of torch ({torch.__version__}) "
            "cannot run it eagerly; pass the module that torch.compile was given."
        )


_plain_holders = 0
_plain_exits = contextlib.ExitStack()


@contextlib.contextmanager
def _plain_execution() -> Iterator[None]:
    """Run modules as written, one by one, while any thread needs it so.

    Compiled code would run past the interception, and transformer layers of torch skip their submodules when no
    gradient is needed. Both switches belong to the process.
    """
    global _plain_holders
    with _lock:
        if _plain_holders == 0:
            enabled = torch.backends.mha.get_fastpath_enabled()
            _plain_exits.callback(torch.backends.mha.set_fastpath_enabled, enabled)
            torch.backends.mha.set_fastpath_enabled(False)
            if hasattr(torch.compiler, "set_stance"):
                _plain_exits.enter_context(torch.compiler.set_stance("force_eager"))
        _plain_holders += 1
    try:
        yield
    finally:
        with _lock:
            _plain_holders -= 1
            if _plain_holders == 0:
                _plain_exits.close()
