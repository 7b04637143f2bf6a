"""Find a layer, and read or replace the hidden state in what it returns or receives.

A model hands its hidden state around as a tensor, in a tuple, in a dictionary-like output object or as a keyword
argument. A path of keys says where it sits, so that it can be replaced while everything around it stays as it is.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Path: TypeAlias = tuple[Any, ...]
LayerLike: TypeAlias = "nn.Module | str | tuple[nn.Module | str, int]"

_HIDDEN_NAMES = ("hidden_states", "inputs_embeds", "last_hidden_state", "x", "input")
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)


class Layer(NamedTuple):
    """A module, the name people know it by, and which of its calls in one forward pass is meant (None: the only).

    Where ``argument`` is a number, the module stands for the entry of that input: what is given to the model itself.
    """

    module: nn.Module
    name: str
    call: int | None = None
    argument: int | None = None


def input_layer(index: int) -> Layer:
    """The entry of an input: an identity that :func:`entering` leads it through."""
    return Layer(nn.Identity(), f"inputs[{index}]", argument=index)


def entering(forward: Callable[[tuple[Any, ...]], Any], layers: Sequence[Layer]) -> Callable[[tuple[Any, ...]], Any]:
    """The score with arguments led through the entries among the layers, so that they can be taken over there."""
    entries = {layer.argument: layer.module for layer in layers if layer.argument is not None}
    if not entries:
        return forward

    def entered(arguments: tuple[Any, ...]) -> Any:
        return forward(tuple(entries[i](one) if i in entries else one for i, one in enumerate(arguments)))

    return entered


def resolve_layer(layer: LayerLike, root: nn.Module | None) -> Layer:
    r"""Turn a module, a dotted name or a pair (module or name, call index) into a :class:`Layer`.

    Args:

        layer (nn.Module, str or tuple): The layer; a tuple adds which call of it is meant, counted from 0.
        root (nn.Module, optional): Where names are looked up.

    Returns:
        Layer: the module found.

    Raises:
        ValueError: if a name is not found below ``root`` (near matches are listed), or there is no root.
        TypeError: if ``layer`` is none of the forms above.
    """
    if isinstance(layer, tuple) and len(layer) == 2 and isinstance(layer[1], int):
        return resolve_layer(layer[0], root)._replace(call=layer[1])
    if isinstance(layer, nn.Module):
        return Layer(layer, _name_of(layer, root))
    if not isinstance(layer, str):
        raise TypeError(
            f"layers: expected a module, a dotted name or (layer, call index), got {type(layer).__name__}; "
            "pass e.g. model.vision_model.encoder.layers[9] or 'vision_model.encoder.layers.9'."
        )
    if root is None:
        raise ValueError(
            f"layers: cannot look up the name {layer!r} because forward_func is not a module; pass the module itself."
        )
    found = _below(root, layer)
    if found is not None:
        return Layer(found, layer)
    names = [name for name, _ in root.named_modules(remove_duplicate=False) if name]
    near = difflib.get_close_matches(layer, names, n=5, cutoff=0.5)
    hint = f"near matches: {', '.join(near)}" if near else f"it has: {', '.join(n for n, _ in root.named_children())}"
    raise ValueError(f"layers: no layer named {layer!r} in {type(root).__name__}; {hint}.")


def resolve_for(forward_func: Any, layer: LayerLike) -> Layer:
    """Resolve a layer of whatever computes the score: names start at its ``roots()``, or at itself if a module."""
    if not hasattr(forward_func, "roots"):
        return resolve_layer(layer, forward_func if isinstance(forward_func, nn.Module) else None)
    roots = forward_func.roots()
    name = layer[0] if isinstance(layer, tuple) else layer
    knowing = (root for root in roots if isinstance(name, str) and _below(root, name) is not None)
    return resolve_layer(layer, next(knowing, roots[0]))


def resolve_at(forward_func: Any, index: int, layer: LayerLike | None) -> Layer:
    """Resolve where an input is explained: a layer, or the input itself, which is None or ``inputs[index]``."""
    entry = input_layer(index)
    return entry if layer is None or layer == entry.name else resolve_for(forward_func, layer)


def _below(root: nn.Module, name: str) -> nn.Module | None:
    """The module at a dotted name, found without a walk through all the others."""
    module: nn.Module | None = root
    for part in name.split("."):
        if module is None or part not in module._modules:
            return None
        module = module._modules[part]
    return module


def _name_of(module: nn.Module, root: nn.Module | None) -> str:
    names = (name for name, found in root.named_modules() if found is module) if root is not None else iter(())
    return next(names, "") or type(module).__name__


def map_leaves(structure: Any, function: Callable[[Any], Any], kind: type = Tensor) -> Any:
    """Copy a nested structure, with ``function`` applied to each leaf of a kind; other leaves are shared."""
    if isinstance(structure, kind):
        return function(structure)
    children = _children(structure)
    if not children:
        return structure
    return _rebuild(structure, {key: map_leaves(child, function, kind) for key, child in children})


def tensors_in(structure: Any) -> list[Tensor]:
    """The tensors of a nested structure, depth first."""
    if isinstance(structure, Tensor):
        return [structure]
    return [tensor for _, child in _children(structure) for tensor in tensors_in(child)]


def is_transparent(structure: Any) -> bool:
    """Whether every tensor in the structure can be seen (no leaf is an object of an unknown kind)."""
    if isinstance(structure, (Tensor, *_PLAIN)):
        return True
    children = _children(structure)
    return (bool(children) or _is_container(structure)) and all(is_transparent(child) for _, child in children)


def find_hidden(structure: Any) -> Path | None:
    r"""Where the hidden state sits: the first positional tensor of three dimensions, else one under a usual name.

    Args:

        structure (Any): A layer's output, or ``(args, kwargs)`` of its call.

    Returns:
        tuple or None: the path of keys; tensors of two dimensions are taken where there is none of three. None if
        there is no such floating-point tensor.
    """
    candidates = [(path, tensor) for path, tensor in _walk(structure) if tensor.is_floating_point()]
    for least in (3, 2):
        deep = [path for path, tensor in candidates if tensor.ndim >= least]
        positional = [path for path in deep if not any(isinstance(key, str) for key in path)]
        named = [path for name in _HIDDEN_NAMES for path in deep if path and path[-1] == name]
        for choice in (positional, named, deep):
            if choice:
                return choice[0]
    return None


def get_at(structure: Any, path: Path) -> Any:
    """What sits at ``path``."""
    for key in path:
        structure = dict(_children(structure))[key]
    return structure


def replace_at(structure: Any, path: Path, value: Any) -> Any:
    """A copy of ``structure`` with ``value`` at ``path``; everything else is shared."""
    if not path:
        return value
    child = dict(_children(structure))[path[0]]
    return _rebuild(structure, {path[0]: replace_at(child, path[1:], value)})


def _walk(structure: Any, path: Path = ()) -> list[tuple[Path, Tensor]]:
    if isinstance(structure, Tensor):
        return [(path, structure)]
    return [found for key, child in _children(structure) for found in _walk(child, (*path, key))]


def _is_container(structure: Any) -> bool:
    is_record = dataclasses.is_dataclass(structure) and not isinstance(structure, type)
    return isinstance(structure, (tuple, list, Mapping)) or is_record


def _children(structure: Any) -> list[tuple[Any, Any]]:
    if isinstance(structure, _PLAIN):
        return []
    # Mappings first: the output classes of transformers are dictionaries and dataclasses at once.
    if isinstance(structure, Mapping):
        return list(structure.items())
    if isinstance(structure, (tuple, list)):
        return list(enumerate(structure))
    if dataclasses.is_dataclass(structure) and not isinstance(structure, type):
        return [(field.name, getattr(structure, field.name)) for field in dataclasses.fields(structure)]
    return []


def _rebuild(structure: Any, changes: Mapping[Any, Any]) -> Any:
    if isinstance(structure, MutableMapping):
        rebuilt: Any = copy.copy(structure)
        for key, value in changes.items():
            rebuilt[key] = value
        return rebuilt
    if isinstance(structure, Mapping):
        return type(structure)({**structure, **changes})  # type: ignore[call-arg]
    if isinstance(structure, (tuple, list)):
        items = [changes.get(index, item) for index, item in enumerate(structure)]
        return type(structure)(*items) if hasattr(structure, "_fields") else type(structure)(items)
    rebuilt = copy.copy(structure)
    for key, value in changes.items():
        object.__setattr__(rebuilt, key, value)
    return rebuilt
