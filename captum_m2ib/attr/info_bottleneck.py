"""IBA: the least information in a hidden state that a classifier needs for a class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import Explained
from captum_m2ib.attr._layers import ensure_layers, ensure_layouts
from captum_m2ib.attr._priors import PUBLISHED, Statistics, ensure_priors
from captum_m2ib.attr._scoring import as_forward_func, roots_of
from captum_m2ib.attr._units import to_units_and_input
from captum_m2ib.encoders.towers import image_layout
from captum_m2ib.engine.descent import optimise
from captum_m2ib.engine.gates import GateFilter, Prior, unit_positions
from captum_m2ib.engine.grids import channel_axis
from captum_m2ib.engine.layers import LayerLike
from captum_m2ib.engine.layouts import Layout, PatchLayout
from captum_m2ib.engine.settings import PerModality, ScoreRange, Settings
from captum_m2ib.engine.smoothing import smooth_logits
from captum_m2ib.engine.statistics import estimate_statistics
from captum_m2ib.engine.suffix import Tap


class InfoBottleneck(_captum.Attribution):
    r"""Information bottleneck attribution (IBA) for classifiers.

    The bottleneck, its optimisation and its unit are those of :class:`MultiModalInfoBottleneck`; what must stay is not
    a pair's similarity but the log-probability of a class, so that per example the loss is

        beta * mean(information) + mean over noise draws(cross entropy of the target).

    As in the paper the prior is standardised: noise and prior have each channel's own mean and standard deviation,
    estimated over data by :meth:`estimate`, or else taken from the example itself; and the gates are smoothed while
    they are optimised: what the hidden state passes through is, channel by channel, the sigmoid of the optimised
    values blurred by a Gaussian kernel over the grid, so that a narrow gate cannot open without its neighbours. One
    difference: statistics are per channel instead of per unit.

    Schulz, Sixt, Tombari and Landgraf, "Restricting the Flow: Information Bottlenecks for Attribution", ICLR 2020,
    https://arxiv.org/abs/2001.00396

    Args:

        forward_func (Callable or nn.Module): A classifier: returns logits, (N, classes), or, to be explained without
                    ``target``, one score per example, (N,).
        layers (sequence): One layer per explained input: a module, a dotted name, or a pair (module or name, index of
                    the call).
        layouts (sequence, optional): How hidden-state units map onto input units. Default: None (for pictures derived
                    from ``forward_func`` where that is a module)
        statistics (mapping or sequence, optional): As for :class:`MultiModalInfoBottleneck`. Default: None (the
                    example's own, until :meth:`estimate` is called)

    Raises:
        ValueError: if a layer is unknown.
        TypeError: if ``forward_func`` cannot be called.

    Examples::

        >>> classifier = nn.Sequential(
        ...     nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)).eval()
        >>> iba = InfoBottleneck(classifier, layers=["1"])
        >>> iba.estimate([(torch.randn(16, 3, 16, 16),)])
        >>> iba.attribute(torch.randn(2, 3, 16, 16), target=torch.tensor([1, 0])).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: Sequence[LayerLike] | LayerLike,
        layouts: Sequence[Layout | None] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        forward_func = as_forward_func(forward_func)
        _captum.Attribution.__init__(self, forward_func)
        self.layers = ensure_layers(forward_func, layers)
        self.layouts = ensure_layouts(forward_func, self.layers, layouts)
        own: list[Prior] = ["pair" for _ in self.layers]
        self.priors = ensure_priors(forward_func, self.layers, own if statistics is None else statistics)

    def estimate(self, loader: Iterable[Any], show_progress: bool = False) -> None:
        r"""Estimate each channel's mean and standard deviation over data, for the standardised prior.

        Args:

            loader (iterable): Yields batches: tuples of all arguments of ``forward_func``. A few hundred examples give
                        stable channels.
            show_progress (bool, optional): Show a progress bar. Default: False

        Raises:
            ValueError: if the loader yields nothing.
            RuntimeError: if a layer is not reached.
        """
        found = estimate_statistics(
            _Total(self.forward_func),
            [layer.module if layer.call is None else (layer.module, layer.call) for layer in self.layers],
            loader,
            layouts=self.layouts,
            show_progress=show_progress,
        )
        self.priors = tuple(found.values())

    @_captum.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        beta: PerModality | None = None,
        variance: PerModality = 1.0,
        n_steps: int = 10,
        n_samples: int = 10,
        lr: PerModality = 1.0,
        smoothing: float | None = 1.0,
        seed: int = 0,
        internal_batch_size: int | None = None,
        attribute_to_layer_input: bool = False,
        show_progress: bool = False,
        score_range: ScoreRange | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Attribute the probability of a class to the inputs, in bits.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): The inputs to explain, batch first; input ``i`` is explained at
                        layer ``i``.
            target (int, Tensor or list, optional): The class to explain, one for all examples or one per example.
                        Default: None (``forward_func`` returns one score per example, which is kept as it is)
            additional_forward_args (Any, optional): Further positional arguments of ``forward_func``. Default: None
            beta (float or sequence, optional): Weight of the information per element against the cross entropy, the
                        paper's beta / k. Default: None (10.0; 8.0 without a target)
            variance (float or sequence, optional): Variance of the prior and of the noise, in units of the
                        standardised prior's own. Default: 1.0
            n_steps (int, optional): Steps of the optimisation. Default: 10
            n_samples (int, optional): Noise draws per step. Default: 10
            lr (float or sequence, optional): Adam's learning rate. Default: 1.0
            smoothing (float, optional): Standard deviation of the Gaussian kernel by which gates are smoothed while
                        they are optimised, in cells of the hidden state's grid; None or 0 for none. Kernels reach two
                        standard deviations, and grids are mirrored at their borders, as in the paper's code. Gates of
                        class tokens, of texts, and of units on no grid of two axes are not smoothed. Default: 1.0
            seed (int, optional): Seed of the noise. Default: 0
            internal_batch_size (int, optional): Most rows (examples times draws) in one pass. Default: None
                        (as :meth:`MultiModalInfoBottleneck.attribute` does by default)
            attribute_to_layer_input (bool, optional): Gate what the layers receive instead of what they return.
                        Default: False
            show_progress (bool, optional): Show a progress bar. Default: False
            score_range (float or sequence, optional): As for :meth:`MultiModalInfoBottleneck.attribute`. Default: None
                        (1.0 with a target, whose cross entropy is in nats; measured without, where the score may be in
                        any unit)

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                        Bits, of the inputs' shapes, non-negative. An image's channels share its pixels' bits equally.

        Raises:
            ValueError: if an argument is out of range, a target is missing, a layout does not fit, or a score is NaN
                or infinite.
            RuntimeError: if a layer is not reached, or the score does not depend on it.
        """
        if smoothing is not None and not 0 <= smoothing < float("inf"):
            raise ValueError(f"smoothing: expected a finite number of at least 0 or None, got {smoothing!r}.")
        if target is not None and score_range is None:
            score_range = 1.0
        settings = Settings(
            beta=(8.0 if target is None else 10.0) if beta is None else beta,
            score_range=score_range,
            variance=variance,
            lr=lr,
            n_steps=n_steps,
            n_samples=n_samples,
            seed=seed,
            internal_batch_size=internal_batch_size,
            show_progress=show_progress,
        )
        kept = _LogProbability(self.forward_func, target is not None)
        given = Explained.ensure(kept, inputs, target, additional_forward_args, len(self.layers))
        layers, priors = self.layers[: len(given.inputs)], self.priors[: len(given.inputs)]
        layouts = [self._layout(index, tensor) for index, tensor in enumerate(given.inputs)]
        gated = optimise(
            given.forward,
            given.arguments,
            [Tap(layer, attribute_to_layer_input) for layer in layers],
            priors,
            layouts,
            settings.per_layer([PUBLISHED] * len(layers)),
            roots_of(self.forward_func, layers),
            filters=[partial(_smoothing, layout, smoothing) for layout in layouts] if smoothing else None,
        )
        attributions = tuple(
            to_units_and_input(layout, gate.bits, gate.real, tensor)[1]
            for layout, gate, tensor in zip(layouts, gated, given.inputs, strict=True)
        )
        return _captum.format_output(_captum.is_tuple(inputs), attributions)

    def attribute_future(self) -> None:
        """Not offered, as for most of Captum's methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _layout(self, index: int, tensor: Tensor) -> Layout | None:
        layout = self.layouts[index]
        if layout is None and tensor.ndim == 4 and isinstance(self.forward_func, nn.Module):
            return image_layout(self.forward_func)
        return layout


class _LogProbability:
    """A classifier's log-probabilities, or a score as it is."""

    def __init__(self, forward_func: Callable[..., Any], has_target: bool) -> None:
        self.forward_func = forward_func
        self.has_target = has_target

    def __call__(self, *arguments: Any) -> Tensor:
        output = self.forward_func(*arguments)
        if not isinstance(output, Tensor) or output.ndim != (2 if self.has_target else 1):
            wanted = "logits, (N, classes)" if self.has_target else "one score per example, (N,), or a target"
            got = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(
                f"target: expected forward_func to return {wanted}, got {got}; name the class with target=..., or let "
                "forward_func return what target selects from."
            )
        if not self.has_target:
            return output
        return F.log_softmax(output, 1, dtype=torch.promote_types(output.dtype, torch.float32))


class _Total:
    """One number per example that depends on all of a classifier's outputs."""

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        self.forward_func = forward_func

    def __call__(self, *arguments: Any) -> Tensor:
        return self.forward_func(*arguments).flatten(1).sum(1)


def _smoothing(
    layout: Layout | None, sigma: float, hidden: Tensor, inputs: Tensor, real: Tensor | None
) -> GateFilter | None:
    """The smoothing of the gates of one hidden state, or None where it has no grid of two axes."""
    if not isinstance(layout, PatchLayout) or inputs.ndim <= len(layout.patch_size):
        return None
    places = unit_positions(layout, hidden, inputs)
    return partial(_smooth_units, sigma, places, channel_axis(layout, hidden, inputs)) if places.ndim == 2 else None


def _smooth_units(sigma: float, places: Tensor, channels: int, alpha: Tensor) -> Tensor:
    last = alpha.movedim(channels, -1)
    rows = last.flatten(1, -2)
    grid = rows[:, places.flatten()].movedim(1, -1).unflatten(-1, places.shape)
    smoothed = smooth_logits(grid, sigma).flatten(2).movedim(-1, 1)
    return rows.index_copy(1, places.flatten(), smoothed).view(last.shape).movedim(-1, channels)
