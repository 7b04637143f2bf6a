"""Which positions of what linear layers return the score reads, told by the operations of one pass.

Behind the last attention a transformer treats each position by itself, and most scores then read one of them. The
operations of the recorded pass are followed from the score backwards, each by what its kind takes of its inputs for
what is read of its outputs. Nothing is guessed: of an operation that is not known here, all that goes in is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from captum_m2ib.engine.dependence import Reach, storage_of
from captum_m2ib.engine.interception import Handler, is_untouched

# What tells the value of a tensor as long as nothing works in place; and what is read of it, True for all.
Key: TypeAlias = tuple[Any, ...]
Need: TypeAlias = Tensor | Literal[True]

# Operations that only move values: those that keep them in order, those that undo themselves, those that leave some of
# them out, and those that do so by an argument.
_IN_ORDER = {"_unsafe_view", "alias", "clone", "detach", "squeeze", "unsqueeze", "view"}
_UNDOING = {"t", "transpose"}
_BY_INDEX = {"gather", "index", "index_select"}
_LEAVING_OUT = {*_BY_INDEX, "select", "slice"}
_MOVING = {
    *(*_IN_ORDER, *_UNDOING, *_LEAVING_OUT),
    *("cat", "expand", "permute", "split", "split_with_sizes", "stack", "unbind"),
}

# The argument of which a row, its last dimension, makes the same row of what comes out; of the others all is read.
_BY_ROW = {"addmm": 1, "baddbmm": 1, "bmm": 0, "linear": 0, "mm": 0}
_BY_ROW |= {
    f"_scaled_dot_product_{kind}": 0
    for kind in (
        "attention_math",
        "cudnn_attention",
        "efficient_attention",
        "flash_attention",
        "flash_attention_for_cpu",
    )
}

# A layer whose output is read at a larger share of the positions runs at all of them.
_MOST = 0.5


class Needed(NamedTuple):
    r"""The positions of a tensor that are read.

    Attributes:

        dim (int): The dimension along which they are counted.
        size (int): How many positions there are.
        positions (tuple[int, ...]): Those that are read.
    """

    dim: int
    size: int
    positions: tuple[int, ...]


class _Place(NamedTuple):
    """A tensor that an operation took; its key is empty where it depends on nothing that is followed."""

    key: Key
    shape: torch.Size


class _Operation(NamedTuple):
    """What an operation was given, the tensors among that which depend on what is followed, and what it made."""

    function: Any
    args: Any
    kwargs: Any
    dependent: list[_Place]
    made: tuple[Key, ...]


class Trace:
    r"""The operations of a pass on what depends on the tapped layers.

    Args:

        sources_of (Callable): What a tensor descends from.
        others (frozenset[int]): Sources that are no tapped layers.
    """

    def __init__(self, sources_of: Callable[[list[Tensor]], Reach], others: Reach) -> None:
        self._sources_of = sources_of
        self._others = others
        self._operations: list[_Operation] = []
        self._layers: dict[int, Key] = {}

    def note(self, reach: Reach, function: Any, given: tuple[Any, Any], made: Sequence[Tensor]) -> None:
        """An operation took, by position and by name, what descends from sources."""
        args, kwargs = given
        if self._follows(reach):
            dependent: list[_Place] = []
            noted = self._noted(args, dependent), self._noted(kwargs or {}, dependent)
            self._operations.append(_Operation(function, *noted, dependent, tuple(map(_key_of, made))))

    def note_layer(self, place: int, made: Any) -> None:
        """A linear layer was called as the call ``place``."""
        if isinstance(made, Tensor) and made.ndim > 2:
            self._layers[place] = _key_of(made)

    def needed(self, score: Tensor) -> dict[int, Needed]:
        """By call, the positions of linear layers that are read, where these are few."""
        needs: dict[Key, Need] = {_key_of(score): True}
        # Memory that an operation works in: what it held before may have been read under any name.
        changed: set[Any] = set()
        for operation in reversed(self._operations):
            if _may_change(operation.function):
                keys = [*operation.made, *(place.key for place in operation.dependent)]
                changed.update(key[0] for key in keys)
                continue
            wanted = [True if key[0] in changed else needs.get(key) for key in operation.made]
            if any(one is not None for one in wanted):
                for key, need in _pulled(operation, wanted):
                    needs[key] = _joined(needs.get(key), need)
        found = {}
        for place, key in self._layers.items():
            read = None if key[0] in changed else needs.get(key)
            few = _few(read) if isinstance(read, Tensor) else None
            if few is not None:
                found[place] = few
        return found

    def _follows(self, reach: Reach) -> bool:
        return not reach <= self._others

    def _noted(self, item: Any, dependent: list[_Place]) -> Any:
        if isinstance(item, Tensor):
            if self._follows(self._sources_of([item])):
                dependent.append(_Place(_key_of(item), item.shape))
                return dependent[-1]
            # Indices are what some operations move by.
            return _Place((), item.shape) if item.is_floating_point() else item
        if isinstance(item, (list, tuple)):
            return [self._noted(one, dependent) for one in item]
        if isinstance(item, dict):
            return {name: self._noted(one, dependent) for name, one in item.items()}
        return item


def can_narrow(module: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a call may be made on some of the positions alone."""
    return not kwargs and len(args) == 1 and is_untouched(module, nn.Linear)


def narrowed(proceed: Handler, module: nn.Module, args: Any, kwargs: Any, needed: Needed) -> Any:
    r"""Run a linear layer on the positions that are read; the others hold what one of these does.

    Numbers of the usual size, that is: what is made of them downstream, and its derivative, is as finite as the rest.
    """
    if not can_narrow(module, args, kwargs) or args[0].shape[needed.dim : needed.dim + 1] != (needed.size,):
        return proceed(module, *args, **kwargs)
    given: Tensor = args[0]
    dim, size, positions = needed
    if len(positions) == 1:
        made: Tensor = proceed(module, given.narrow(dim, positions[0], 1))
        shape = [size if at == dim else -1 for at in range(made.ndim)]
        return made.expand(shape).contiguous()
    read = torch.tensor(positions, device=given.device)
    places = torch.zeros(size, dtype=torch.long, device=given.device)
    places[read] = torch.arange(len(positions), device=given.device)
    return proceed(module, given.index_select(dim, read)).index_select(dim, places)


def _key_of(tensor: Tensor) -> Key:
    try:
        return storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
    except (NotImplementedError, RuntimeError):
        return (id(tensor),)


def _joined(one: Need | None, other: Need) -> Need:
    if one is True or other is True:
        return True
    both = other if one is None else one | other
    return True if bool(both.all()) else both


def _pulled(operation: _Operation, wanted: Sequence[Need | None]) -> Iterator[tuple[Key, Need]]:
    """What an operation reads of its inputs for what is read of its outputs."""
    name = _name_of(operation.function)
    places = operation.dependent
    if name in _MOVING and not (name in _BY_INDEX and len(places) > 1):
        yield from _moved(name, operation, places, wanted)
        return
    need = wanted[0]
    is_known = need is not None and need is not True and all(one is None for one in wanted[1:])
    for place in places:
        yield place.key, _read_of(name, operation, need, place) if is_known else True  # type: ignore[arg-type]


@functools.cache
def _may_change(function: Any) -> bool:
    """Whether an operation may change what it is given."""
    schema = getattr(function, "_schema", None)
    return schema is None or schema.is_mutable


@functools.cache
def _name_of(function: Any) -> str:
    """An operation of torch's own by its name; nothing of others."""
    space, _, name = function.name().partition("::")
    return name.partition(".")[0] if space == "aten" else ""


def _read_of(name: str, operation: _Operation, need: Tensor, place: _Place) -> Need:
    """What an operation reads of one of its inputs for what is read of its first output."""
    args = operation.args
    if torch.Tag.pointwise in operation.function.tags or name == "_to_copy":
        return _folded(need, place.shape)
    if name in _BY_ROW and place is args[_BY_ROW[name]]:
        return _along(need, [-1], place.shape)
    if name == "native_layer_norm" and place is args[0]:
        return _along(need, list(range(-len(args[1]), 0)), place.shape)
    if name == "_softmax":
        return _along(need, [args[1]], place.shape)
    return True


def _along(need: Tensor, dims: Sequence[int], shape: torch.Size) -> Tensor:
    """All along some dimensions where anything along them is read."""
    for dim in dims:
        need = need.any(dim, keepdim=True)
    return need.expand(shape)


def _folded(need: Tensor, shape: torch.Size) -> Tensor:
    """What is read of a tensor that is broadcast."""
    while need.ndim > len(shape):
        need = need.any(0)
    for dim, size in enumerate(shape):
        if size == 1:
            need = need.any(dim, keepdim=True)
    return need


def _moved(
    name: str, operation: _Operation, places: Sequence[_Place], wanted: Sequence[Need | None]
) -> Iterator[tuple[Key, Need]]:
    """Have the operation move the numbers of values, and see which arrive where something is read."""
    if name not in _LEAVING_OUT and all(need is True for need in wanted):
        yield from ((place.key, True) for place in places)
        return
    need = wanted[0]
    if name in _IN_ORDER and isinstance(need, Tensor) and need.numel() == places[0].shape.numel():
        yield places[0].key, need.reshape(places[0].shape)
        return
    if name in _UNDOING and isinstance(need, Tensor):
        yield places[0].key, operation.function(need, *operation.args[1:], **operation.kwargs)
        return
    starts, count = {}, 0
    for place in places:
        starts[id(place)] = count
        count += place.shape.numel()

    def numbered(item: Any) -> Any:
        if isinstance(item, _Place):
            start = starts.get(id(item))
            if start is None:
                return torch.full(item.shape, -1)
            return torch.arange(start, start + item.shape.numel()).view(item.shape)
        if isinstance(item, Tensor):
            return item.cpu()
        if isinstance(item, list):
            return [numbered(one) for one in item]
        return item

    kwargs = {key: numbered(item) for key, item in operation.kwargs.items()}
    made = operation.function(*numbered(operation.args), **kwargs)
    is_read = torch.zeros(count, dtype=torch.bool)
    for one, need in zip([made] if isinstance(made, Tensor) else made, wanted, strict=True):
        if need is not None:
            found = one.flatten() if need is True else one[need]
            is_read[found[found >= 0]] = True
    for place in places:
        start = starts[id(place)]
        yield place.key, is_read[start : start + place.shape.numel()].view(place.shape)


def _few(need: Tensor) -> Needed | None:
    """The positions that are read along the dimension where they are the smallest share; None if that is no small one.

    The last dimension holds the channels.
    """
    found, least = None, _MOST
    for dim in range(need.ndim - 1):
        positions = need.movedim(dim, 0).flatten(1).any(1).nonzero().flatten().tolist()
        if len(positions) <= least * need.shape[dim]:
            least = len(positions) / need.shape[dim]
            found = Needed(dim, need.shape[dim], tuple(positions))
    return found
