"""The layers that inputs are explained at, and their layouts: what a user may give for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.wrappers import no_towers
from captum_m2ib.engine.layers import Layer, LayerLike, resolve_at
from captum_m2ib.engine.layouts import Layout

Guides: TypeAlias = "Sequence[LayerLike | None] | Literal['late']"


@dataclass(frozen=True)
class Guide:
    """A late layer that guides where in a picture the bits of its pixels lie."""

    guided: int
    layer: Layer
    layout: Layout


def recommended(forward_func: Any) -> Sequence[LayerLike | None]:
    """The layers that an encoder recommends for its bottlenecks."""
    example = "model.image_tower.blocks[0], model.text_tower.embeddings"
    found: Sequence[LayerLike | None] = encoder_of(forward_func, "recommended", example).recommended_layers()
    return found


def encoder_of(forward_func: Any, how: str, example: str) -> DualEncoder:
    """What layers can be chosen for; else an error that says how they were to be, and what to give instead."""
    if isinstance(forward_func, nn.Module) and not isinstance(forward_func, DualEncoder):
        raise ValueError(
            f"layers: they can only be {how} for a dual encoder: {no_towers(forward_func)} Or name one layer per "
            f"input, e.g. layers=({example})."
        )
    if not isinstance(forward_func, DualEncoder):
        raise ValueError(
            f"layers: they can only be {how} for a DualEncoder, got {type(forward_func).__name__}; name one layer per "
            f"input, e.g. layers=({example})."
        )
    return forward_func


def ensure_layers(
    forward_func: Any,
    layers: Sequence[LayerLike | None] | LayerLike | None,
    choose: Callable[[Any], Sequence[LayerLike | None]] = recommended,
) -> tuple[Layer, ...]:
    """One layer per explained input: those given, in a sequence or one alone, else those chosen."""
    if layers is None:
        layers = choose(forward_func)
    elif isinstance(layers, (nn.Module, str)) or (
        isinstance(layers, tuple) and len(layers) == 2 and isinstance(layers[1], int)
    ):
        layers = [layers]
    return tuple(resolve_at(forward_func, index, layer) for index, layer in enumerate(layers))


def ensure_layouts(
    forward_func: Any, layers: Sequence[Layer], layouts: Sequence[Layout | None] | None
) -> tuple[Layout | None, ...]:
    """One layout or None per layer: those given, or those of an encoder."""
    if layouts is None and isinstance(forward_func, DualEncoder):
        layouts = [forward_func.layout_at(layer, index) for index, layer in enumerate(layers[:2])]
    given = tuple(layouts or ())
    return (*given, *[None] * (len(layers) - len(given)))


def ensure_guides(
    forward_func: Any, layers: Sequence[Layer], layouts: Sequence[Layout | None], guides: Guides
) -> tuple[Guide, ...]:
    """The late layers of pictures that are gated themselves: those given, else an encoder's published ones."""
    given: Sequence[LayerLike | None] = ()
    if guides != "late":
        given = tuple(guides)
    elif isinstance(forward_func, DualEncoder):
        # Towers without blocks under a known name have no late layer.
        with contextlib.suppress(ValueError):
            late = forward_func.published_layers()
            given = [late[i] if _is_picture(forward_func, i, layer) else None for i, layer in enumerate(layers[:2])]
    found = []
    for index, guide in enumerate(given):
        if guide is None:
            continue
        if index >= len(layers) or layers[index].argument is None:
            raise ValueError(
                f"guides: only pictures that are gated themselves are guided, got a layer for input {index}; leave "
                "guides out, or pass None for that input."
            )
        layer = resolve_at(forward_func, index, guide)
        layout = forward_func.layout_at(layer, index) if isinstance(forward_func, DualEncoder) else layouts[index]
        if layout is None:
            raise ValueError(
                f"guides: cannot tell how {layer.name} maps onto input {index}; pass its layout as layouts, e.g. "
                "layouts=(PatchLayout(patch_size=(16, 16), prefix=1), None)."
            )
        found.append(Guide(index, layer, layout))
    return tuple(found)


def _is_picture(encoder: DualEncoder, index: int, layer: Layer) -> bool:
    return layer.argument is not None and encoder.gates_input(index)


def check_entry(layer: Layer, tensor: Tensor, purpose: str) -> None:
    """Raise where an input itself is to be changed and holds whole numbers."""
    if layer.argument is not None and not tensor.is_floating_point():
        raise ValueError(
            f"layers: {layer.name} holds token ids, which cannot be {purpose}; name the layer that embeds them, e.g. "
            "layers=(None, model.text_tower.embeddings)."
        )
