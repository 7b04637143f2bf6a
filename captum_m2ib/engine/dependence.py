"""Which tensors descend from which sources, followed through every operation, differentiable or not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class Dependence(TorchDispatchMode):
    """While active, follows which storages descend from which sources, numbers of the caller's choice."""

    def __init__(self) -> None:
        super().__init__()
        self._reach: dict[int, frozenset[int]] = {}
        # While one of these is held, no other storage gets the address, although the memory itself is released.
        self._held: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        came = _tensors_of(args)
        if kwargs:
            came += _tensors_of(kwargs.values())
        reach = self.of(came)
        made = _tensors_of((output,))
        self.mark(made, *reach)
        if not made and func._schema.is_mutable:
            self.mark(came, *reach)
        return output

    def mark(self, tensors: Sequence[Tensor], *sources: int) -> None:
        """Have the tensors, and all that is made of them from now on, descend from the sources too."""
        for tensor in tensors if sources else ():
            key = storage_of(tensor)
            if key not in self._held:
                self._held[key] = _hold(tensor)
            self._reach[key] = self._reach.get(key, frozenset()) | frozenset(sources)

    def of(self, tensors: Sequence[Tensor]) -> frozenset[int]:
        """The sources that at least one of the tensors descends from."""
        return frozenset().union(*(self._reach.get(storage_of(tensor), frozenset()) for tensor in tensors))


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
