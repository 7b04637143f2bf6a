"""Per-channel mean and standard deviation of a hidden state: what the standardised prior needs.

Estimated over a data set in one batched pass; batches are merged by the pairwise update of Chan et al. (1979), which
keeps its digits where a sum of squares does not. Kept as safetensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib.engine.grids import channel_axis
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer, LayerLike, resolve_at
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.real_units import real_elements
from captum_m2ib.engine.suffix import Suffix, Tap

# Channels that hardly vary would make any deviation infinitely surprising.
MINIMUM_STD = 1e-2


@dataclass(frozen=True)
class ChannelStatistics:
    r"""Mean and standard deviation of each channel of a hidden state.

    Args:

        mean (Tensor): (channels,).
        std (Tensor): (channels,), positive.
        count (int, optional): Positions the estimate rests on. Default: 0 (unknown)

    Raises:
        ValueError: if the shapes differ, or a value is not finite or a standard deviation not positive.

    Examples::

        >>> ChannelStatistics(torch.zeros(2), torch.ones(2)).count
        0
    """

    mean: Tensor
    std: Tensor
    count: int = 0

    def __post_init__(self) -> None:
        if self.mean.ndim != 1 or self.mean.shape != self.std.shape:
            raise ValueError(
                "statistics: expected mean and std of one shape (channels,), got "
                f"{tuple(self.mean.shape)} and {tuple(self.std.shape)}."
            )
        if not (self.mean.isfinite().all() and self.std.isfinite().all() and (self.std > 0).all()):
            raise ValueError("statistics: expected finite means and positive, finite standard deviations.")


class RunningStatistics:
    """Count, mean and sum of squared deviations per channel, in float64, over any number of batches."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | None = None
        self.squares: Tensor | None = None

    def update(self, units: Tensor) -> None:
        """Merge in a batch of units, (n, channels)."""
        if not len(units):
            return
        units = units.detach().double()
        count, mean = len(units), units.mean(0)
        squares = (units - mean).square().sum(0)
        if self.mean is None or self.squares is None:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, delta = self.count + count, mean - self.mean
        self.squares += squares + delta.square() * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    def result(self) -> ChannelStatistics:
        """Mean and sample standard deviation, floored at ``MINIMUM_STD`` times their largest value."""
        if self.mean is None or self.squares is None or self.count < 2:
            raise ValueError(f"statistics: expected at least 2 positions to estimate from, got {self.count}.")
        std = (self.squares / (self.count - 1)).sqrt()
        return ChannelStatistics(self.mean.float().cpu(), floor_std(std).float().cpu(), self.count)


def floor_std(std: Tensor) -> Tensor:
    """Raise standard deviations to a small share of the largest one along the last dimension."""
    largest = std.amax(-1, keepdim=True)
    return torch.where(largest > 0, std.maximum(MINIMUM_STD * largest), 1.0)


def positions_of(hidden: Tensor, channels: int, real: Tensor | None = None) -> Tensor:
    """The positions of a hidden state as rows of channels, (n, channels), padding left out."""
    rows = hidden.movedim(channels, -1)
    if real is not None:
        return rows[real.squeeze(-1).expand(rows.shape[:-1])]
    return rows.flatten(0, -2)


def estimate_statistics(
    forward_func: Any,
    layers: Sequence[LayerLike | None],
    loader: Iterable[Any],
    *,
    layouts: Sequence[Layout | None] | None = None,
    attribute_to_layer_input: bool = False,
    show_progress: bool = False,
) -> dict[str, ChannelStatistics]:
    r"""Estimate the statistics of layers over a data set, in one pass, batch by batch.

    Args:

        forward_func (Callable): A :class:`DualEncoder`, or any callable that returns one score per pair.
        layers (sequence): The layers: modules, dotted names, or (layer, index of the call); None for the input of that
            position itself.
        loader (iterable): Yields batches: tuples of all arguments of ``forward_func``, or :class:`Pairs`.
        layouts (sequence, optional): Per layer its layout, so that padding is left out. Default: None (derived from
            a :class:`DualEncoder`)
        attribute_to_layer_input (bool, optional): Take what the layers receive instead of what they return.
            Default: False
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        dict: Layer name to :class:`ChannelStatistics`, in the order of ``layers``.

    Raises:
        ValueError: if the loader yields nothing, or a layer is unknown.
        RuntimeError: if a layer is not reached.

    Examples::

        >>> layers = encoder.recommended_layers()
        >>> statistics = estimate_statistics(encoder, layers, [pairs])
        >>> [(name, found.mean.shape, found.count) for name, found in statistics.items()]
        [('inputs[0]', torch.Size([3]), 8192), ('text_model.embeddings', torch.Size([96]), 12)]
    """
    found = [resolve_at(forward_func, index, layer) for index, layer in enumerate(layers)]
    taps = [Tap(layer, attribute_to_layer_input) for layer in found]
    owners = [_owner(forward_func, layer) for layer in found]
    if layouts is None:
        is_encoder = hasattr(forward_func, "layout_at")
        layouts = [
            forward_func.layout_at(layer, owner) if is_encoder else None
            for layer, owner in zip(found, owners, strict=True)
        ]
    running = [RunningStatistics() for _ in found]
    with borrowing(*(layer.module for layer in found)):
        for batch in tqdm(loader, desc="Statistics", unit="batch", disable=not show_progress):
            arguments = (*batch.inputs, *batch.additional_forward_args) if hasattr(batch, "inputs") else tuple(batch)
            suffix = Suffix(lambda given: forward_func(*given), arguments, arguments[0].shape[0], taps)
            for index, (hidden, layout) in enumerate(zip(suffix.hidden, layouts, strict=True)):
                explained = owners[index]
                real = real_elements(layout, hidden, explained, arguments)
                channels = channel_axis(layout, hidden, arguments[explained])
                running[index].update(positions_of(hidden, channels, real))
    return {layer.name: estimate.result() for layer, estimate in zip(found, running, strict=True)}


def _owner(forward_func: Any, layer: Layer) -> int:
    """Which argument a layer's units belong to; the first where nothing is known."""
    if layer.argument is not None:
        return layer.argument
    return forward_func.owner(layer.module) if hasattr(forward_func, "owner") else 0


def save_statistics(path: str | os.PathLike[str], statistics: Mapping[str, ChannelStatistics]) -> None:
    r"""Write statistics of named layers to one safetensors file.

    Args:

        path (str or PathLike): The file; replaced if it exists.
        statistics (mapping): Layer name to :class:`ChannelStatistics`.

    Examples::

        >>> import tempfile
        >>> statistics = {"tower.blocks.0": ChannelStatistics(torch.zeros(4), torch.ones(4))}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_statistics(f"{folder}/statistics.safetensors", statistics)
        ...     list(load_statistics(f"{folder}/statistics.safetensors"))
        ['tower.blocks.0']
    """
    from safetensors.torch import save_file

    tensors = {}
    for name, channel in statistics.items():
        tensors[f"{name}.mean"] = channel.mean.contiguous()
        tensors[f"{name}.std"] = channel.std.contiguous()
        tensors[f"{name}.count"] = torch.tensor(channel.count)
    temporary = Path(f"{path}.part")
    save_file(tensors, temporary, metadata={"format": "pt"})
    # safetensors writes for the owner alone.
    temporary.chmod(0o644)
    os.replace(temporary, path)


def load_statistics(path: str | os.PathLike[str]) -> dict[str, ChannelStatistics]:
    r"""Read what :func:`save_statistics` wrote.

    Args:

        path (str or PathLike): The file.

    Returns:
        dict: Layer name to :class:`ChannelStatistics`.

    Raises:
        OSError: if the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
        return {
            name: ChannelStatistics(tensors[f"{name}.mean"], tensors[f"{name}.std"], int(tensors[f"{name}.count"]))
            for name in (key.removesuffix(".mean") for key in tensors if key.endswith(".mean"))
        }
    except (SafetensorError, KeyError) as error:
        raise OSError(f"statistics: {path} is damaged ({error}); estimate and save them again.") from error
