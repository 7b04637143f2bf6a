"""Which tensors descend from which sources, followed through every operation, differentiable or not."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)

Reach = frozenset[int]
NOTHING: Reach = frozenset()

# Namespaces of operators that say themselves what their derivative is, zero included.
_OWN = ("aten", "prim", "prims", "higher_order")
# What makes a Python number of a tensor.
_TO_NUMBER = torch.ops.aten._local_scalar_dense.default


class Dependence(TorchDispatchMode):
    r"""While active, follows which storages descend from which sources, numbers of the caller's choice.

    A tensor that no operation made within sight, such as one that went through NumPy, descends from what the caller
    says.

    Args:

        of_unseen (Callable, optional): The sources of a tensor whose making was not seen. Default: None (no sources)
        before_change (Callable, optional): Told the tensors that an operation takes before it changes any of them.
            Default: None
        foreign (Callable, optional): Told the name of each operator that is not torch's own and takes a tensor that
            descends from a source. Default: None
        numbered (Callable, optional): Told the sources of each tensor that becomes a Python number, or a list of them.
            Default: None
        note (Callable, optional): Told each operation on what descends from sources: these, its function, its
            arguments, by position and by name, and the tensors that it made. Default: None

    Attributes:

        sizes (Counter): Bytes of the storages that were made or marked, by the sources that they descended from then.
    """

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing compiles while a pass is followed, and being called past the compiler costs as much as following."""
        return False

    def __init__(
        self,
        of_unseen: Callable[[Tensor], Reach] | None = None,
        before_change: Callable[[list[Tensor]], Any] | None = None,
        foreign: Callable[[str], Any] | None = None,
        numbered: Callable[[Reach], Any] | None = None,
        note: Callable[[Reach, Any, Any, Sequence[Tensor]], Any] | None = None,
    ) -> None:
        super().__init__()
        self._of_unseen = of_unseen
        self._before_change = before_change
        self._foreign = foreign
        self._numbered = numbered
        self._note = note
        self.sizes: Counter[Reach] = Counter()
        self._reach: dict[int, Reach] = {}
        # While one of these is held, no other storage gets the address, although the memory itself is released.
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        came = _tensors_of(args)
        if kwargs:
            came += _tensors_of(kwargs.values())
        schema = getattr(func, "_schema", None)
        is_mutable = schema is not None and schema.is_mutable
        if is_mutable and self._before_change is not None:
            self._before_change(came)
        reach = self.of(came)
        if reach and self._foreign is not None and func.namespace not in _OWN:
            self._foreign(func.name())
        if func is _TO_NUMBER:
            self.note_number(came[0])
        output = func(*args, **(kwargs or {}))
        made = _tensors_of((output,))
        self.mark(made, reach)
        if is_mutable and not made:
            self.mark(came, reach)
        if reach and self._note is not None:
            self._note(reach, func, (args, kwargs), made)
        return output

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Leave out operations that are no part of what is followed."""
        if _get_current_dispatch_mode() is not self:
            yield
            return
        with _pop_mode_temporarily():
            yield

    def mark(self, tensors: Iterable[Tensor], sources: Reach) -> None:
        """Have the tensors, and all that is made of them from now on, descend from the sources too."""
        for tensor in tensors:
            key = storage_of(tensor)
            known = self._reach.get(key)
            if known is None:
                self._reach[key], self._held[key] = sources, _hold(tensor)
                if sources:
                    self.sizes[sources] += _bytes_of(tensor)
            elif not sources <= known:
                self._reach[key] = known | sources

    def note_number(self, tensor: Tensor) -> None:
        """A tensor's value goes on as a Python number; integers and truths have no derivative to lose."""
        reach = self.of([tensor]) if tensor.is_floating_point() else NOTHING
        if reach and self._numbered is not None:
            self._numbered(reach)

    def has_seen(self, tensor: Tensor) -> bool:
        """Whether the tensor was marked, or made within sight."""
        return storage_of(tensor) in self._reach

    def of(self, tensors: Sequence[Tensor]) -> Reach:
        """The sources that at least one of the tensors descends from."""
        found = NOTHING
        for tensor in tensors:
            own = self._reach.get(storage_of(tensor))
            if own is None:
                own = NOTHING if self._of_unseen is None else self._of_unseen(tensor)
            if own is not found:
                found = found | own if found else own
        return found


class NumbersFrom(TorchFunctionMode):
    """While active, has a :class:`Dependence` note the tensors made into lists of numbers, which no operation does."""

    def __init__(self, dependence: Dependence) -> None:
        super().__init__()
        self._dependence = dependence

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.tolist:
            self._dependence.note_number(args[0])
        return func(*args, **(kwargs or {}))


def _tensors_of(given: Iterable[Any]) -> list[Tensor]:
    """The tensors an operation takes or gives: they stand alone or in lists."""
    found = []
    for item in given:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            found += _tensors_of(item)
    return found


def storage_of(tensor: Tensor) -> int:
    """What tells a tensor's memory from that of every other tensor alive; views share it."""
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _bytes_of(tensor: Tensor) -> int:
    """The memory behind a tensor; 0 where that cannot be told."""
    try:
        return tensor.untyped_storage().nbytes()
    except (NotImplementedError, RuntimeError):
        return 0


def _hold(tensor: Tensor) -> Any:
    """What keeps a tensor's identity, as :func:`storage_of` tells it, from being given to another tensor."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return tensor
