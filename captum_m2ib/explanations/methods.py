"""What any attribution method says of pairs, as maps of pictures and of captions in one form."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from captum_m2ib import _captum
from captum_m2ib.attr import LayerRecord, MultiModalInfoBottleneck
from captum_m2ib.attr.map_check import check_maps
from captum_m2ib.attr.registry import method_named, unit_of
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.pairs import Pairs
from captum_m2ib.engine.layouts import Layout, PackedLayout, PatchLayout
from captum_m2ib.engine.rows import slice_pairs
from captum_m2ib.engine.units import packed_grid, per_patch, to_input
from captum_m2ib.explanations.checking import pair_checks
from captum_m2ib.explanations.timed_maps import over_time

Method: TypeAlias = Any
"""An object with ``attribute(inputs, additional_forward_args=...)``, two of them, or a name."""

# In one pass of a method that does not look at the memory itself.
_ROWS = 80


@dataclass(frozen=True)
class Maps:
    r"""Maps of a batch of pairs.

    Attributes:

        pixels (list[Tensor]): Per pair the picture's map, (h, w).
        patches (list[Tensor] or None): The same per patch, (gh, gw).
        tokens (Tensor): The captions' maps, (N, L).
        scores (Tensor): (N,).
        unit (str): What they are in.
        settings (dict): How they were made, as JSON.
        records (list[dict] or None): Per pair the optimisation's course.
        checks (list[dict] or None): Per pair the check.
        second (tuple or None): Of pairs without captions, ``pixels`` and ``patches`` of the second ones.
    """

    pixels: list[Tensor]
    patches: list[Tensor] | None
    tokens: Tensor
    scores: Tensor
    unit: str
    settings: dict[str, Any]
    records: list[dict[str, Any]] | None = None
    checks: list[dict[str, Any]] | None = None
    second: tuple[list[Tensor], list[Tensor] | None] | None = None


def maps_of(
    encoder: DualEncoder,
    method: Method,
    pairs: Pairs,
    internal_batch_size: int | None,
    check: bool,
    settings: Mapping[str, Any],
    rivals: Pairs | None = None,
) -> Maps:
    r"""What a method says of pairs.

    Args:

        encoder (DualEncoder): Whose score is explained.
        method: A name of :data:`captum_m2ib.attr.registry.METHODS`; an attribution method; or two, whose maps of the
            picture and of the caption are taken.
        pairs (Pairs): As the encoder prepares them.
        internal_batch_size (int or None): Most rows in one pass, where a method takes it; None for as many as the
            method's ``memory_budget`` has room for, or 80.
        check (bool): Whether to check the maps.
        settings (mapping): Further arguments of ``attribute``.
        rivals (Pairs, optional): The same pictures with other captions, for a :class:`ContrastiveInfoBottleneck`.
            Default: None

    Returns:
        Maps: in one form, whatever the method.

    Raises:
        ValueError: if it returns no maps of the pair, or needs gradients of token ids.
        TypeError: if it is no method, or takes no such setting.
    """
    if isinstance(method, str):
        method = method_named(method, encoder)
    _check_model(encoder, method)
    if isinstance(method, MultiModalInfoBottleneck):
        return _by_bottleneck(method, pairs, internal_batch_size, check, settings, rivals)
    both = tuple(method) if isinstance(method, Sequence) else (method, method)
    if len(both) != 2 or not all(callable(getattr(one, "attribute", None)) for one in both):
        raise TypeError(
            "method: expected a name, an object with attribute(inputs, additional_forward_args=...), or two of them, "
            f"for the picture and for the caption, got {type(method).__name__}."
        )
    return _by_attribution(encoder, both, pairs, internal_batch_size or _ROWS, check, settings)


def _check_model(encoder: DualEncoder, method: Method) -> None:
    """Raise where a method was made of another model than the one whose pairs and scores are shown."""
    for one in method if isinstance(method, Sequence) else (method,):
        explained = getattr(one, "forward_func", None)
        while explained is not None and not isinstance(explained, DualEncoder):
            explained = getattr(explained, "forward_func", None)
        if explained is not None and any(explained.tower_of(i) is not encoder.tower_of(i) for i in (0, 1)):
            raise ValueError(
                f"method: {_name(one)} was made of another model than the encoder; make it of the one that is given, "
                f"{_name(one)}(encoder)."
            )


def _by_bottleneck(
    method: MultiModalInfoBottleneck,
    pairs: Pairs,
    internal_batch_size: int | None,
    check: bool,
    settings: Mapping[str, Any],
    rivals: Pairs | None,
) -> Maps:
    additional = pairs.additional_forward_args
    if rivals is not None:
        additional = (rivals.inputs[1], *additional, *rivals.additional_forward_args)
    (image_bits, token_bits), record = method.attribute_with_record(
        pairs.inputs,
        additional_forward_args=additional,
        internal_batch_size=internal_batch_size,
        check=check,
        **settings,
    )
    image, text = record.modalities
    found = [part.check for part in record.modalities if part.check is not None]
    pixels, patches = _picture_in_bits(method, image_bits, image.units, pairs)
    return Maps(
        pixels,
        patches,
        token_bits,
        image.score_before if rivals is None else scores_of(method.forward_func, pairs, internal_batch_size),
        "bits",
        {
            "method": type(method).__name__,
            "layers": [layer.name for layer in method.layers],
            "priors": [_prior_name(prior) for prior in method.priors],
            **asdict(record.settings),
        },
        [{"image": _course(image, i), "text": _course(text, i)} for i in range(len(pairs))],
        pair_checks(found) if found else None,
        _second(method.layouts[1], token_bits, text.units, pairs),
    )


def _second(
    layout: Layout | None, maps: Tensor, units: Tensor | None, pairs: Pairs
) -> tuple[list[Tensor], list[Tensor] | None] | None:
    """The second sound's or video's map, or None where there is a caption."""
    if not pairs.partner_timelines:
        return None
    return over_time(layout, maps, units, replace(pairs, timelines=pairs.partner_timelines))


def _picture_in_bits(
    method: MultiModalInfoBottleneck, image_bits: Tensor, units: Tensor | None, pairs: Pairs
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Pictures' maps per pixel, and per patch where there are patches."""
    if pairs.timelines:
        return over_time(method.layouts[0], image_bits, units, pairs)
    if pairs.tiles:
        return _on_page(pairs, image_bits), None
    layout, arguments = method.layouts[0], (*pairs.inputs, *pairs.additional_forward_args)
    if isinstance(layout, PackedLayout) and units is not None:
        patches = _packed_grids(layout, units, arguments)
        return [_over_pixels(grid, layout.patch_size) for grid in patches], patches
    if isinstance(layout, PatchLayout) and method.layers[0].argument is not None and units is not None:
        units = per_patch(layout, units)
    return [bits.sum(0) for bits in image_bits], None if units is None else list(units)


def _picture_of_any(layout: Layout | None, image_map: Tensor, pairs: Pairs) -> tuple[list[Tensor], list[Tensor] | None]:
    """The same of maps that may be below zero."""
    if pairs.timelines:
        return over_time(layout, image_map, None, pairs)
    if pairs.tiles:
        return _on_page(pairs, image_map), None
    if isinstance(layout, PackedLayout):
        arguments = (*pairs.inputs, *pairs.additional_forward_args)
        patches = _packed_grids(layout, image_map.flatten(2).sum(2), arguments)
        return [_over_pixels(grid, layout.patch_size) for grid in patches], patches
    summed = image_map.sum(1)
    if not isinstance(layout, PatchLayout):
        return list(summed), None
    return list(summed), list(per_patch(layout, summed.clamp(min=0)) - per_patch(layout, (-summed).clamp(min=0)))


def pictures_alone(
    encoder: DualEncoder, method: Any, pairs: Pairs, internal_batch_size: int | None, settings: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor] | None]:
    r"""What a method says of pairs' pictures, the captions left unexplained.

    Args:

        encoder (DualEncoder): Whose score is explained.
        method (Attribution): As :func:`captum_m2ib.attr.registry.method_named` makes it.
        pairs (Pairs): As the encoder prepares them.
        internal_batch_size (int or None): Most rows in one pass, where a method takes it; None for as many as the
            method's ``memory_budget`` has room for, or 80.
        settings (mapping): Further arguments of ``attribute``.

    Returns:
        tuple: :attr:`Maps.pixels` and :attr:`Maps.patches`.
    """
    arguments = (*pairs.inputs, *pairs.additional_forward_args)
    is_bottleneck = isinstance(method, MultiModalInfoBottleneck)
    rows = internal_batch_size if is_bottleneck else internal_batch_size or _ROWS
    given = {"additional_forward_args": arguments[1:], **_options(method, rows, settings)}
    if is_bottleneck:
        bits: Any
        bits, record = method.attribute_with_record(arguments[0], **given)
        return _picture_in_bits(method, bits, record.modalities[0].units, pairs)
    found = method.attribute(arguments[0], **given).detach()
    return _picture_of_any(encoder.layouts[0], _image_map(method, found, encoder.layouts[0], arguments[0]), pairs)


def _by_attribution(
    encoder: DualEncoder,
    methods: Sequence[Any],
    pairs: Pairs,
    internal_batch_size: int | None,
    check: bool,
    settings: Mapping[str, Any],
) -> Maps:
    arguments = (*pairs.inputs, *pairs.additional_forward_args)
    layout = encoder.layouts[0]
    image, text = methods
    found = _attributed(image, pairs, internal_batch_size, settings)
    image_map = _image_map(image, found[0] if isinstance(found, tuple) else found, layout, pairs.inputs[0])
    if text is not image:
        found = _attributed(text, pairs, internal_batch_size, settings)
    elif not isinstance(found, tuple):
        raise ValueError(
            f"method: expected {_name(image)} to return a map of the picture and one of the caption, got one; give two "
            "methods, method=(of_picture, of_caption)."
        )
    tokens = _token_map(text, found[-1] if isinstance(found, tuple) else found, pairs.inputs[1])
    pixels, patches = _picture_of_any(layout, image_map, pairs)
    units = {unit_of(image), unit_of(text)}
    return Maps(
        pixels,
        patches,
        tokens,
        scores_of(encoder, pairs, internal_batch_size),
        units.pop() if len(units) == 1 else "relative",
        _told(methods, settings),
        checks=_checks(encoder, arguments, (image_map, tokens), internal_batch_size) if check else None,
        second=_second(encoder.layouts[1], tokens, None, pairs),
    )


def _attributed(method: Any, pairs: Pairs, internal_batch_size: int | None, settings: Mapping[str, Any]) -> Any:
    """What a method returns, detached; through a view that takes embeddings in the place of ids, those."""
    inputs, additional = pairs.inputs, pairs.additional_forward_args
    embedded = getattr(getattr(method, "forward_func", None), "embedded", None)
    if embedded is not None:
        inputs, additional = embedded(inputs, additional)
    elif _needs_gradients(method) and not all(tensor.is_floating_point() for tensor in inputs):
        raise ValueError(
            f"method: {_name(method)} takes the gradient of every input, and token ids have none; make it of "
            f"captum_m2ib.composition.EmbeddingForward(encoder) instead of the encoder."
        )
    given = _options(method, internal_batch_size, settings)
    # Captum's gradient methods ask for the gradient themselves, and warn that they had to.
    ready = tuple(one.clone().requires_grad_() if one.is_floating_point() else one for one in inputs)
    found = method.attribute(ready, additional_forward_args=additional or None, **given)
    if isinstance(found, tuple):
        return tuple(one.detach() for one in found)
    if isinstance(found, Tensor):
        return found.detach()
    raise ValueError(f"method: expected {_name(method)} to return maps as tensors, got {type(found).__name__}.")


def _options(method: Any, internal_batch_size: int | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a method is asked for: no limit of rows that it does not know, and no bar where it shows none."""
    takes = inspect.signature(method.attribute).parameters
    asked = {name: value for name, value in settings.items() if name != "show_progress" or name in takes}
    if internal_batch_size is None or "internal_batch_size" not in takes:
        return asked
    return {**asked, "internal_batch_size": internal_batch_size}


def _needs_gradients(method: Any) -> bool:
    """Whether it is one of Captum's methods that take gradients of their inputs; those at layers do not."""
    return _captum.is_gradient_method(method)


def _image_map(method: Any, found: Tensor, layout: Layout | None, inputs: Tensor) -> Tensor:
    """A picture's map in the input's shape; one of patches, (N, 1, rows, columns), is spread over it."""
    if found.shape == inputs.shape:
        return found.float()
    is_grid = found.ndim == inputs.ndim == 4 and found.shape[:2] == (len(inputs), 1)
    if is_grid and isinstance(layout, PatchLayout):
        return to_input(layout, found[:, 0].float(), inputs)
    raise ValueError(
        f"method: expected {_name(method)} to return a map of the picture of shape {tuple(inputs.shape)}, or of its "
        f"patches, (N, 1, rows, columns), got {tuple(found.shape)}."
    )


def _token_map(method: Any, found: Tensor, ids: Tensor) -> Tensor:
    """A caption's map, (N, L), of one that may hold a value per channel of each token."""
    if found.shape == ids.shape:
        return found.float()
    if found.ndim == 3 and found.shape[:2] == ids.shape:
        return found.float().sum(-1)
    if found.ndim == 3 and found.shape == (len(ids), 1, ids.shape[1]):
        return found[:, 0].float()
    raise ValueError(
        f"method: expected {_name(method)} to return a map of the caption of shape {tuple(ids.shape)}, or with "
        f"channels behind, got {tuple(found.shape)}."
    )


@torch.no_grad()
def scores_of(encoder: DualEncoder, pairs: Pairs, at_once: int | None) -> Tensor:
    """The model's similarity of each pair, (N,), so many in one pass."""
    arguments, count = (*pairs.inputs, *pairs.additional_forward_args), len(pairs)
    step = min(count, at_once or _ROWS)
    chunks = (tuple(slice_pairs(a, count, start, step) for a in arguments) for start in range(0, count, step))
    return torch.cat([encoder(*chunk) for chunk in chunks])


def _checks(
    encoder: DualEncoder, arguments: tuple[Any, ...], maps: tuple[Tensor, Tensor], internal_batch_size: int | None
) -> list[dict[str, Any]] | None:
    try:
        bottleneck = MultiModalInfoBottleneck(encoder)
        found = [check_maps(bottleneck, arguments, i, [one], internal_batch_size)[0] for i, one in enumerate(maps)]
    except ValueError as error:
        warnings.warn(f"check: left out, for it needs layers with a layout ({error})", UserWarning, stacklevel=5)
        return None
    return pair_checks(found, has_gates=False)


def _told(methods: Sequence[Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """How maps were made, as JSON."""
    names = list(dict.fromkeys(_name(method) for method in methods))
    layers = [[layer.name for layer in getattr(method, "layers", ())] for method in methods[: len(names)]]
    told: dict[str, Any] = {"method": names[0] if len(names) == 1 else names}
    if any(layers):
        told["layers"] = layers[0] if len(names) == 1 else layers
    return {**told, **{name: _as_json(value) for name, value in settings.items() if name != "show_progress"}}


def _name(method: Any) -> str:
    return type(method).__name__


def _as_json(value: Any) -> Any:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return value.item() if callable(getattr(value, "item", None)) and _is_single(value) else type(value).__name__
    return value


def _is_single(value: Any) -> bool:
    return getattr(value, "size", None) == 1 or (isinstance(value, Tensor) and value.numel() == 1)


def _packed_grids(layout: PackedLayout, units: Tensor, arguments: tuple[Any, ...]) -> list[Tensor]:
    return [packed_grid(layout, units, arguments, index) for index in range(len(units))]


def _on_page(pairs: Pairs, maps: Tensor) -> list[Tensor]:
    """Maps of tiles, (N, tiles, C, h, w), summed where they lie on the page that is shown."""
    found = []
    for tiles, shown, regions in zip(maps.sum(2).float().cpu(), pairs.pictures, pairs.tiles, strict=True):
        size = shown.shape[1], shown.shape[0]
        if any(region is None for region in regions):
            raise ValueError(
                "processor: cannot tell where on the page the tiles lie that it makes; explain the tensors instead."
            )
        laid = [region.scaled(*size).lay(tile.numpy()) for region, tile in zip(regions, tiles, strict=False) if region]
        found.append(torch.from_numpy(np.sum(laid, 0)))
    return found


def _over_pixels(grid: Tensor, patch: tuple[int, int]) -> Tensor:
    """A map of patches spread over the pixels of the picture that they were cut from."""

    rows, columns = grid.shape
    picture = grid.new_zeros(1, 1, rows * patch[0], columns * patch[1])
    return to_input(PatchLayout(patch), grid[None], picture)[0, 0]


def _prior_name(prior: Any) -> str:
    return "N(0, variance)" if prior is None else prior if isinstance(prior, str) else "standardised"


def _course(record: LayerRecord, index: int) -> dict[str, Any]:
    """One pair's optimisation as JSON."""
    return {
        "layer": record.layer,
        "score": record.score[:, index].tolist(),
        "information": record.information[:, index].tolist(),
        "bits": float(record.bits[index]),
        "score_before": float(record.score_before[index]),
        "score_after": float(record.score_after[index]),
    }
