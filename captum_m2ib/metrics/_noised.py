"""Run a tower on from a hidden state whose units are noise, with and without what stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib.attr.pair_interaction import embed
from captum_m2ib.engine.gates import Prior, check_finite, noise, prior_of, unit_positions
from captum_m2ib.engine.grids import channel_axis
from captum_m2ib.engine.interception import Handler, interpose
from captum_m2ib.engine.layers import Layer, tensors_in
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.real_units import real_elements
from captum_m2ib.engine.suffix import Suffix, Tap

Measure: TypeAlias = Literal["embedding", "score"]

# An embedding that noise everywhere does not change has no share that could survive.
_LEAST_LOSS = 1e-6


@dataclass(frozen=True)
class MeasuredTower:
    """One input's layers with all that stays the same for every pair."""

    index: int
    modality: str
    layers: tuple[Layer, ...]
    layouts: tuple[Layout | None, ...]
    priors: tuple[Prior, ...]


class NoisedPass:
    r"""One recorded pass of some pairs, with a tap at every layer of every tower.

    Args:

        forward (Callable): Maps the tuple of all arguments to scores, (N,).
        arguments (tuple): All arguments; the first is a batch of N.
        towers (list[MeasuredTower]): The towers and their layers.
        start (int): Position of the first of these pairs, for errors.

    Raises:
        ValueError: if a score or a hidden state is not finite.
    """

    def __init__(
        self,
        forward: Callable[[tuple[Any, ...]], Any],
        arguments: tuple[Any, ...],
        towers: list[MeasuredTower],
        start: int,
    ) -> None:
        self.watch: _Watch | None = None
        self.own: tuple[Tensor, Tensor] | None = None
        self.forward = forward
        self.arguments, self.towers = arguments, towers
        taps = [Tap(layer) for tower in towers for layer in tower.layers]
        self.suffix = Suffix(self._run, arguments, arguments[0].shape[0], taps)
        check_finite("score of the untouched pairs", self.suffix.score, start)
        for tap, hidden in zip(taps, self.suffix.hidden, strict=True):
            check_finite(f"hidden state of layer {tap.layer.name!r}", hidden, start)

    def _run(self, arguments: tuple[Any, ...]) -> Any:
        if self.watch is None:
            return self.forward(arguments)
        with interpose(self.watch, is_observer=True):
            return self.forward(arguments)

    def measured(
        self, n_draws: int, seed: int, measure: Measure, advance: Callable[[], Any]
    ) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        r"""Run every layer of every tower.

        Args:

            n_draws (int): Noise draws of each kind.
            seed (int): Seed of the noise.
            measure (str): What is compared, ``"embedding"`` or ``"score"``.
            advance (Callable): Called after each layer.

        Returns:
            list[tuple]: per tower, on the CPU, the share that survives and the number of positions left as they are,
            (layers, N); the score, (N,); and the mean scores with the units replaced and with everything replaced,
            (layers, N).
        """
        if measure == "embedding":
            self.own = embed(self.suffix, {0: self.suffix.hidden[0]}, 1)
        found, first = [], 0
        for tower in self.towers:
            taps = range(first, first + len(tower.layers))
            pooled = self._pooled(tower, taps)
            rows = []
            for place, tap in enumerate(taps):
                rows.append(self._at_layer(tower, place, tap, pooled, n_draws, seed))
                advance()
            share, kept, of_kept, of_none = (torch.stack(part) for part in zip(*rows, strict=True))
            found.append((share, kept, self.suffix.score.cpu(), of_kept, of_none))
            first = taps.stop
        return found

    def _at_layer(
        self, tower: MeasuredTower, place: int, tap: int, pooled: Tensor, n_draws: int, seed: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        suffix, layout = self.suffix, tower.layouts[place]
        held = suffix.hidden[tap]
        hidden = held.to(torch.promote_types(held.dtype, torch.float32))
        inputs = self.arguments[tower.index]
        channels = channel_axis(layout, hidden, inputs)
        real = real_elements(layout, hidden, tower.index, self.arguments)
        mean, std = prior_of(tower.priors[place], hidden, real, 1.0, channels)
        # The same draws whichever layers are measured together.
        drawn = noise(seed, 0, 0, n_draws, hidden.shape[1:], antithetic=n_draws > 1)
        drawn = drawn.to(hidden.device, hidden.dtype).unsqueeze(0)
        mean, std = (part.unsqueeze(1) if isinstance(part, Tensor) else part for part in (mean, std))
        there = _positions(real, hidden, channels)
        units = _units(layout, hidden, inputs, channels, pooled) & there
        masks = [part.unflatten(1, _without(hidden.shape[1:], channels - 1)) for part in (units, there)]
        values = torch.cat(
            [
                torch.where(mask.unsqueeze(channels).unsqueeze(1), mean + std * drawn, hidden.unsqueeze(1))
                for mask in masks
            ],
            1,
        )
        values = values.flatten(0, 1).to(held.dtype)
        if self.own is None:
            score = suffix.run({tap: values}, 2 * n_draws)
            fidelity, whole = score, suffix.score
        else:
            found = embed(suffix, {tap: values}, 2 * n_draws)
            score = _cosine(*found)
            fidelity, whole = _fidelity(found, self.own, 2 * n_draws), torch.ones_like(suffix.score)
        kept, none = (part.mean(1) for part in fidelity.unflatten(0, (-1, 2 * n_draws)).split(n_draws, 1))
        of_kept, of_none = (part.mean(1) for part in score.unflatten(0, (-1, 2 * n_draws)).split(n_draws, 1))
        loss = whole - none
        share = torch.where(loss.abs() > _LEAST_LOSS, (kept - none) / loss, torch.nan)
        left = (there & ~units).sum(1)
        return share.cpu(), left.cpu(), of_kept.cpu(), of_none.cpu()

    def _pooled(self, tower: MeasuredTower, taps: range) -> Tensor:
        """Which unit of the tower's last layer is the only one that the score depends on, (N, units) boolean."""
        last, layout = self.suffix.hidden[taps[-1]], tower.layouts[-1]
        channels = channel_axis(layout, last, self.arguments[tower.index])
        real = real_elements(layout, last, tower.index, self.arguments)
        places = _places(layout, last, self.arguments[tower.index], channels)
        first, axis = self.suffix.hidden[taps[0]], self.suffix.axes[taps[-1]]
        # So many copies that a hidden state with another order of its dimensions has another shape.
        copies = next(count for count in range(1, last.ndim + 2) if count * len(last) not in last.shape[1:])
        self.watch = _Watch(axis.merge(last.repeat_interleave(copies, 0)).shape)
        try:
            with torch.enable_grad():
                score = self.suffix.run({taps[0]: first.repeat_interleave(copies, 0).requires_grad_()}, copies)
                # Scaled, so that half precision holds the gradients of small scores.
                seen = self.watch.seen
                gradients = torch.autograd.grad(score.sum() * 2.0**12, seen, allow_unused=True) if seen else ()
        finally:
            self.watch = None
        used = [gradient for gradient in gradients if gradient is not None and bool(gradient.any())]
        if not used:
            return torch.zeros(len(last), len(places), dtype=torch.bool, device=last.device)
        gradient = axis.split(used[-1])[::copies]
        moved = (gradient != 0).movedim(channels, -1).any(-1).flatten(1)[:, places]
        there = _positions(real, last, channels)[:, places]
        moved &= there
        alone = (moved.sum(1) == 1) & (there.sum(1) > 1)
        return moved & alone.unsqueeze(1)


class _Watch:
    """Keeps what modules return in the shape of a hidden state, as far as it depends on what gradients are taken of."""

    def __init__(self, shape: torch.Size) -> None:
        self.shape = shape
        self.seen: list[Tensor] = []

    def __call__(self, proceed: Handler, aside: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        output = proceed(module, *args, **kwargs)
        self.seen += [found for found in tensors_in(output) if found.shape == self.shape and found.requires_grad]
        return output


def _without(shape: Sequence[int], axis: int) -> list[int]:
    return [size for dim, size in enumerate(shape) if dim != axis]


def _positions(real: Tensor | None, hidden: Tensor, channels: int) -> Tensor:
    """Which positions of a hidden state are real, (N, positions), the channels left out."""
    shape = [len(hidden), *_without(hidden.shape[1:], channels - 1)]
    there = torch.ones(shape, dtype=torch.bool, device=hidden.device)
    return (there if real is None else there & real.squeeze(channels)).flatten(1)


def _places(layout: Layout | None, hidden: Tensor, inputs: Tensor, channels: int) -> Tensor:
    if layout is None:
        return torch.arange(hidden[0].numel() // hidden.shape[channels], device=hidden.device)
    return unit_positions(layout, hidden, inputs).flatten()


def _units(layout: Layout | None, hidden: Tensor, inputs: Tensor, channels: int, pooled: Tensor) -> Tensor:
    """Which positions hold units that are not pooled, (N, positions)."""
    places = _places(layout, hidden, inputs, channels)
    free = torch.ones(len(hidden), len(places), dtype=torch.bool, device=hidden.device)
    # A grid of another resolution than the last layer's has no pooled position.
    free = free & ~pooled if pooled.shape == free.shape else free
    found = torch.zeros(len(hidden), hidden[0].numel() // hidden.shape[channels], dtype=torch.bool, device=free.device)
    found[:, places] = free
    return found


def _fidelity(found: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], draws: int) -> Tensor:
    """Cosine of each embedding with the pair's own, of the two embeddings the one that changed more."""
    first, second = (
        _cosine(changed, kept.repeat_interleave(draws, 0)) for changed, kept in zip(found, own, strict=True)
    )
    return torch.minimum(first, second)


def _cosine(one: Tensor, other: Tensor) -> Tensor:
    precise = torch.promote_types(one.dtype, torch.float32)
    return F.cosine_similarity(one.to(precise), other.to(precise))
