"""From the elements of a hidden state to the units of an input, and from these to the input's elements."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from captum_m2ib.engine.layouts import Layout, PatchLayout
from captum_m2ib.engine.real_units import real_elements
from captum_m2ib.engine.units import to_input, to_units


def sum_units(layout: Layout | None, elements: Tensor, modality: int, arguments: tuple[Any, ...]) -> Tensor:
    """Elements of a hidden state summed to the input's patches or tokens; 0 at padding."""
    real = real_elements(layout, elements, modality, arguments)
    return to_units_and_input(layout, elements, real, arguments[modality])[0]


def spread_units(layout: Layout | None, units: Tensor, inputs: Tensor) -> Tensor:
    """Units spread over the input they came from."""
    return units if layout is None or units.shape == inputs.shape else to_input(layout, units, inputs)


def to_units_and_input(
    layout: Layout | None, elements: Tensor, real: Tensor | None, inputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Elements summed per patch, (N, ...), or token, (N, L), and what these are in the input's shape."""
    if layout is not None and not (isinstance(layout, PatchLayout) and inputs.ndim <= len(layout.patch_size)):
        units = to_units(layout, elements, inputs, real)
        return units, to_input(layout, units, inputs)
    units = elements.sum(-1) if elements.shape[:-1] == inputs.shape else elements
    if units.shape == inputs.shape:
        return units, units.contiguous()
    raise ValueError(
        f"layouts: cannot tell how a hidden state of shape {tuple(units.shape)} maps onto an input of shape "
        f"{tuple(inputs.shape)}; pass layouts=(PatchLayout(patch_size=(16, 16), prefix=1), TextLayout()) or use "
        "LayerMultiModalInfoBottleneck for bits per element."
    )


def to_pixels_and_input(elements: Tensor) -> tuple[Tensor, Tensor]:
    """Elements of an input itself summed per pixel, (N, h, w), and shared by a pixel's channels alike."""
    if elements.ndim != 4:
        return elements, elements.contiguous()
    units = elements.sum(1)
    return units, (units / elements.shape[1]).unsqueeze(1).expand(elements.shape).contiguous()
