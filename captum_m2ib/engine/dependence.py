"""Which tensors descend from which sources, followed through every operation, differentiable or not."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode, _pop_mode_temporarily


NOTHING: frozenset[int] = frozenset()


class Dependence(TorchDispatchMode):
    r"""While active, follows which storages descend from which sources, numbers of the caller's choice.

    Args:

        before_change (Callable, optional): Told the tensors that an operation takes before it changes any of them.
            Default: None
    """

    def __init__(self, before_change: Callable[[list[Tensor]], Any] | None = None) -> None:
        super().__init__()
        self._before_change = before_change
        self._reach: dict[int, frozenset[int]] = {}
        # While one of these is held, no other storage gets the address, although the memory itself is released.
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        came = _tensors_of(args)
        if kwargs:
            came += _tensors_of(kwargs.values())
        is_mutable = func._schema.is_mutable
        if is_mutable and self._before_change is not None:
            self._before_change(came)
        output = func(*args, **(kwargs or {}))
        reach = self.of(came)
        if reach:
            made = _tensors_of((output,))
            self.mark(made, *reach)
            if not made and is_mutable:
                self.mark(came, *reach)
        return output

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Leave out operations that are no part of what is followed."""
        if _get_current_dispatch_mode() is not self:
            yield
            return
        with _pop_mode_temporarily():
            yield

    def mark(self, tensors: Sequence[Tensor], *sources: int) -> None:
        """Have the tensors, and all that is made of them from now on, descend from the sources too."""
        added = frozenset(sources)
        for tensor in tensors if added else ():
            key = storage_of(tensor)
            known = self._reach.get(key)
            if known is None:
                self._reach[key], self._held[key] = added, _hold(tensor)
            elif not added <= known:
                self._reach[key] = known | added

    def of(self, tensors: Sequence[Tensor]) -> frozenset[int]:
        """The sources that at least one of the tensors descends from."""
        found = NOTHING
        for tensor in tensors:
            own = self._reach.get(storage_of(tensor))
            if own is not None and own is not found:
                found = own if found is NOTHING else found | own
        return found


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


def _hold(tensor: Tensor) -> Any:
    """What keeps a tensor's identity, as :func:`storage_of` tells it, from being given to another tensor."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return tensor
