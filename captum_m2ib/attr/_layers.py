"""The layers that inputs are explained at, and their layouts: what a user may give for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.wrappers import no_towers
from captum_m2ib.engine.layers import Layer, LayerLike, resolve_at
from captum_m2ib.engine.layouts import Layout


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
    forward_func: Any,
    layers: Sequence[Layer],
    layouts: Sequence[Layout | None],
    guides: Sequence[LayerLike | None],
) -> tuple[Guide, ...]:
    """The late layers of pictures that are gated themselves, of those given per input."""
    found = []
    for index, guide in enumerate(guides):
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


def check_pictures(inputs: Sequence[Tensor], guided: Sequence[int]) -> None:
    """Raise where an input whose bits are to be moved is no batch of pictures."""
    for index in guided:
        if inputs[index].ndim != 4:
            raise ValueError(
                f"guides: expected pictures, (N, C, H, W), as input {index}, whose bits are guided, got a tensor of "
                f"shape {tuple(inputs[index].shape)}; leave guides out."
            )


def late_guides(encoder: DualEncoder, layers: Sequence[LayerLike | None]) -> list[LayerLike | None]:
    """Per input the layer at three quarters of its tower's depth, for pictures that are gated themselves."""
    pictures = [layer is None and encoder.gates_input(index) for index, layer in enumerate(layers)]
    if not any(pictures):
        raise ValueError(
            "layers: only pictures that are gated themselves can be guided, and neither input is one; use "
            "MultiModalInfoBottleneck(encoder)."
        )
    published = encoder.published_layers()
    return [late if is_picture else None for late, is_picture in zip(published, pictures, strict=True)]


def check_entry(layer: Layer, tensor: Tensor, purpose: str) -> None:
    """Raise where an input itself is to be changed and holds whole numbers."""
    if layer.argument is not None and not tensor.is_floating_point():
        raise ValueError(
            f"layers: {layer.name} holds token ids, which cannot be {purpose}; name the layer that embeds them, e.g. "
            "layers=(None, model.text_tower.embeddings)."
        )
