"""M2IB: the least information in each modality that keeps the pair's similarity (arXiv 2312.17174)."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from torch import Tensor, nn

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import defaults_of, format_additional, format_inputs, scorer
from captum_m2ib.encoders.dual_encoder import DualEncoder, is_dual_encoder
from captum_m2ib.engine.gates import Gated, GateFilter, LayerRecord, Prior, optimise
from captum_m2ib.engine.layers import Layer, LayerLike, resolve_at, resolve_for
from captum_m2ib.engine.layouts import Layout, PatchLayout, to_input, to_units
from captum_m2ib.engine.settings import LayerSettings, PerModality, Settings
from captum_m2ib.engine.smoothing import over_neighbours
from captum_m2ib.engine.statistics import ChannelStatistics
from captum_m2ib.engine.suffix import Tap

Statistics = Mapping[str, ChannelStatistics] | Sequence[Prior]


@dataclass
class OptimizationRecord:
    r"""What an attribution's optimisation did.

    Attributes:

        modalities (tuple[LayerRecord, ...]): One record per modality.
        settings (LayerSettings): The settings as they were applied, one ``beta``, ``variance`` and ``lr`` per modality.
    """

    modalities: tuple[LayerRecord, ...]
    settings: LayerSettings


class MultiModalInfoBottleneck(_captum.Attribution):
    r"""Multi-modal information bottleneck attribution (M2IB).

    For each pair and modality, a bottleneck at one layer of the modality's tower, or at its input, mixes the hidden
    state with noise. Its gates are optimised to let through as little information as possible while the pair's
    similarity stays high; the information, in bits, that still passes at a position is the attribution of the input
    unit it stands for.

    By default pictures are gated themselves, pixel by pixel, and captions where their tokens are embedded: there,
    nothing can go round the gates. A picture's gates are common to a pixel's channels, and their logits are smoothed
    over its neighbours while they are optimised; IBA (arXiv 2001.00396) smooths gates likewise.

    Wang, Rudner and Wilson, "Visual Explanations of Image-Text Representations via Multi-Modal Information Bottleneck
    Attribution", NeurIPS 2023, https://arxiv.org/abs/2312.17174

    Args:

        forward_func (Callable or nn.Module): A :class:`DualEncoder`, a model that one can wrap, or any callable
                    ``forward_func(*inputs, *additional_forward_args)`` that returns one score per pair, (N,).
        layers (sequence, optional): Per modality, in the order of the inputs, the layer whose hidden state is gated:
                    a module, a dotted name, a pair (module or name, index of the call) where one pass calls it more
                    than once, or None for the input itself, which must be of floating point. Default: None (where it
                    measured best, see :meth:`DualEncoder.recommended_layers`, with the standardised prior)
        layouts (sequence, optional): Per modality how hidden-state units map onto input units. Default: None
                    (derived from the encoder)
        statistics (mapping or sequence, optional): Per layer its :class:`ChannelStatistics` for the standardised
                    prior, ``"pair"`` for those of the pair's own hidden state, or None for the prior N(0, variance);
                    or a mapping from layer names. Default: None (for recommended layers, given or not, those that the
                    encoder knows, else ``"pair"``; ``"pair"`` for an input itself; N(0, variance) for other layers)

    Raises:
        ValueError: if a layer is unknown, or cannot be recommended for this model.
        TypeError: if ``forward_func`` cannot be called.

    Examples::

        >>> m2ib = MultiModalInfoBottleneck(encoder)
        >>> image_bits, token_bits = m2ib.attribute(
        ...     pairs.inputs, additional_forward_args=pairs.additional_forward_args, n_steps=2)
        >>> image_bits.shape, token_bits.shape  # of the pixels and of the token ids
        (torch.Size([2, 3, 64, 64]), torch.Size([2, 7]))
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layers: Sequence[LayerLike | None] | LayerLike | None = None,
        layouts: Sequence[Layout | None] | None = None,
        statistics: Statistics | None = None,
    ) -> None:
        forward_func = as_forward_func(forward_func)
        _captum.Attribution.__init__(self, forward_func)
        if layers is None:
            layers = _recommended(forward_func)
        elif isinstance(layers, (nn.Module, str)) or (
            isinstance(layers, tuple) and len(layers) == 2 and isinstance(layers[1], int)
        ):
            layers = [layers]
        self.layers: tuple[Layer, ...] = tuple(
            resolve_at(forward_func, index, layer) for index, layer in enumerate(layers)
        )
        if layouts is None and isinstance(forward_func, DualEncoder):
            layouts = [forward_func.layout_at(layer, index) for index, layer in enumerate(self.layers[:2])]
        given = tuple(layouts or ())
        self.layouts: tuple[Layout | None, ...] = (*given, *[None] * (len(self.layers) - len(given)))
        self.priors: tuple[Prior, ...] = _priors(forward_func, self.layers, statistics)

    @classmethod
    def published(cls, forward_func: Callable[..., Any]) -> MultiModalInfoBottleneck:
        r"""The method as published: output of the block at three quarters of each tower's depth, prior N(0, variance).

        For comparison, not for use on captions: by that depth the pooled position of a causal text tower holds nearly
        all that the score needs, information goes round the other tokens' gates, and their bits mean little. See
        :func:`captum_m2ib.metrics.bypass.measure_bypass`.

        Args:

            forward_func (DualEncoder or nn.Module): The dual encoder.

        Returns:
            MultiModalInfoBottleneck: with the paper's layers and prior, for comparison.

        Raises:
            ValueError: if ``forward_func`` is no dual encoder.
        """
        forward_func = as_forward_func(forward_func)
        if not isinstance(forward_func, DualEncoder):
            raise ValueError(
                f"forward_func: expected a DualEncoder or a model that it can wrap, got {type(forward_func).__name__}; "
                "pass MultiModalInfoBottleneck(forward_func, layers=...) instead."
            )
        return cls(forward_func, layers=forward_func.published_layers())

    @_captum.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        beta: PerModality | None = None,
        variance: PerModality | None = None,
        n_steps: int = 10,
        n_samples: int = 10,
        lr: PerModality | None = None,
        seed: int = 0,
        joint: bool = False,
        internal_batch_size: int | None = None,
        attribute_to_layer_input: bool = False,
        show_progress: bool = False,
        initial_gate: PerModality | None = None,
        antithetic: bool | None = None,
        smoothing: float = 1 / 14,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Attribute each pair's score to its inputs, in bits.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): The inputs to explain, batch first; input ``i`` is explained at
                        layer ``i``.
            target (int, tuple, Tensor or list, optional): Selects one output per example where ``forward_func``
                        returns several, as everywhere in Captum. Prefer a ``forward_func`` that returns one score per
                        pair. Default: None
            additional_forward_args (Any, optional): Further positional arguments of ``forward_func``: inputs that are
                        not explained, attention masks. Tensors whose first dimension is N are taken as one entry per
                        pair. Default: None
            beta (float or sequence, optional): Weight of the information per element against the score; one number
                        or one per modality. Larger keeps less. Default: None (0.1 as published for the prior
                        N(0, variance), 3.0 for the standardised prior, 0.3 where an input itself is gated)
            variance (float or sequence, optional): Variance of the prior and of the noise, in units of the
                        standardised prior's own where there is one. Default: None (1.0; 0.25 where an input itself is
                        gated)
            n_steps (int, optional): Steps of the optimisation (not of an integral). Default: 10
            n_samples (int, optional): Noise draws per step. Default: 10
            lr (float or sequence, optional): Adam's learning rate. Default: None (1.0 as published for the prior
                        N(0, variance), 0.5 for the standardised prior and where an input itself is gated)
            seed (int, optional): Seed of the noise; the global random state is neither read nor changed. Default: 0
            joint (bool, optional): Optimise the gates of all modalities against one score, each modality seeing the
                        other's noise, instead of one modality at a time. Default: False
            internal_batch_size (int, optional): Most rows (pairs times draws) in one pass of the optimisation; bounds
                        memory and changes no result. Default: None (all at once)
            attribute_to_layer_input (bool, optional): Gate what the layers receive instead of what they return.
                        Default: False
            show_progress (bool, optional): Show a progress bar. Default: False
            initial_gate (float or sequence, optional): Share of the hidden state that passes before the first step,
                        between 0 and 1. Default: None (0.9933 as published for the prior N(0, variance), 0.5 for the
                        standardised prior, 0.8 where an input itself is gated)
            antithetic (bool, optional): Use each noise draw once more with its sign changed instead of a new one,
                        which makes maps vary less between seeds. Default: None (False as published for the prior
                        N(0, variance), True for the standardised prior)
            smoothing (float, optional): Standard deviation of the Gaussian kernel by which the gates of a picture's
                        pixels are smoothed while they are optimised, as a share of the picture's shorter side; 0 for
                        none. Gates at layers are not smoothed. Default: 1 / 14

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                        Bits, of the inputs' shapes, non-negative. An image's channels share its pixels' bits equally;
                        tokens at padding are exactly 0. What prefix tokens (a class token) carry is not included.

        Raises:
            ValueError: if an argument is out of range, batch sizes differ, there are more inputs than layers, a
                layout does not fit, or a score, hidden state or gradient is NaN or infinite.
            RuntimeError: if a layer is not reached, or the score does not depend on it.

        Examples::

            >>> m2ib = MultiModalInfoBottleneck(encoder)
            >>> pixel_values, input_ids = pairs.inputs
            >>> m2ib.attribute(  # one modality: tensor in, tensor out
            ...     pixel_values, additional_forward_args=(input_ids, *pairs.additional_forward_args), n_steps=2).shape
            torch.Size([2, 3, 64, 64])
        """
        settings = Settings(
            beta=beta,
            variance=variance,
            lr=lr,
            initial_gate=initial_gate,
            antithetic=antithetic,
            n_steps=n_steps,
            n_samples=n_samples,
            seed=seed,
            joint=joint,
            smoothing=smoothing,
            internal_batch_size=internal_batch_size,
            show_progress=show_progress,
        )
        attributions, _ = self._run(inputs, target, additional_forward_args, settings, attribute_to_layer_input)
        return attributions

    def attribute_with_record(
        self, inputs: Tensor | tuple[Tensor, ...], *args: Any, **kwargs: Any
    ) -> tuple[Tensor | tuple[Tensor, ...], OptimizationRecord]:
        r"""Like :meth:`attribute`, and also what the optimisation did, at the cost of one more run of the suffix.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): As for :meth:`attribute`.
            *args: As for :meth:`attribute`.
            **kwargs: As for :meth:`attribute`.

        Returns:
            tuple: what :meth:`attribute` returns, and an :class:`OptimizationRecord` with, per modality, score and
            information at each step, the score before and after, and the bits in all.
        """
        bound = inspect.signature(type(self).attribute).bind(self, inputs, *args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        settings = Settings(**{field.name: given.pop(field.name) for field in fields(Settings)})
        return self._run(**given, settings=settings, with_record=True)

    def attribute_future(self) -> None:
        """Not offered, as for most of Captum's methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _gate_filter(self, index: int, smoothing: float) -> Callable[[Tensor, Tensor], GateFilter | None]:
        """Makes, of a layer's hidden state and the explained input, what its gates go through."""
        return _unsmoothed if self.layers[index].argument is None else partial(over_neighbours, smoothing)

    def _objective(self, count: int) -> tuple[Callable[..., Any], Sequence[Layout | None]]:
        """What must stay high, a function of so many arguments, and the layouts of those that are explained."""
        return self.forward_func, self.layouts

    def _run(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any,
        additional_forward_args: Any,
        settings: Settings,
        attribute_to_layer_input: bool,
        with_record: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, ...], OptimizationRecord]:
        """Attributions in the form of the inputs; the record holds no layers unless it is asked for."""
        tensors = format_inputs(inputs, len(self.layers))
        additional = format_additional(additional_forward_args, tensors[0].shape[0])
        forward_func, layouts = self._objective(len(tensors) + len(additional))
        layers, priors = self.layers[: len(tensors)], self.priors[: len(tensors)]
        for layer, tensor in zip(layers, tensors, strict=True):
            check_entry(layer, tensor, "mixed with noise")
        applied = settings.per_layer(defaults_of(layers, priors))
        gated = optimise(
            *scorer(forward_func, tensors, additional, target),
            [Tap(layer, attribute_to_layer_input) for layer in layers],
            priors,
            layouts,
            applied,
            roots_of(forward_func, layers),
            with_record,
            filters=[self._gate_filter(index, applied.smoothing) for index in range(len(layers))],
        )
        attributions = []
        for layer, layout, gate, tensor in zip(layers, layouts, gated, tensors, strict=False):
            explained = to_units_and_input if layer.argument is None else _entry_units
            units, attribution = explained(layout, gate, tensor)
            attributions.append(attribution)
            if gate.record is not None:
                gate.record.units = units
        records = tuple(gate.record for gate in gated if gate.record is not None)
        formed = _captum.format_output(_captum.is_tuple(inputs), tuple(attributions))
        return formed, OptimizationRecord(records, applied)


class LayerMultiModalInfoBottleneck(_captum.LayerAttribution):
    r"""M2IB at a layer: bits per element of its hidden state, prefix tokens included.

    Args:

        forward_func (Callable or nn.Module): As for :class:`MultiModalInfoBottleneck`.
        layer (nn.Module, str, tuple or list): The layer, or a list of layers. A pair (layer, index of the call)
                    chooses among several calls.
        device_ids (list[int], optional): Accepted as everywhere in Captum; not used. Default: None
        statistics (sequence or mapping, optional): As for :class:`MultiModalInfoBottleneck`. Default: None
        layouts (sequence, optional): Layouts of the inputs, so that padding is left out. Default: None (derived from
                    a :class:`DualEncoder`)

    Examples::

        >>> method = LayerMultiModalInfoBottleneck(encoder, "vision_model.encoder.layers.1")
        >>> bits = method.attribute(
        ...     pairs.inputs, additional_forward_args=pairs.additional_forward_args, n_steps=2)
        >>> bits.shape  # class token and patches, channels
        torch.Size([2, 65, 96])
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Any,
        device_ids: list[int] | None = None,
        statistics: Statistics | None = None,
        layouts: Sequence[Layout | None] | None = None,
    ) -> None:
        _captum.LayerAttribution.__init__(self, as_forward_func(forward_func), layer, device_ids)
        self.statistics = statistics
        self.layouts = layouts

    @_captum.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        beta: PerModality | None = None,
        variance: PerModality | None = None,
        n_steps: int = 10,
        n_samples: int = 10,
        lr: PerModality | None = None,
        seed: int = 0,
        joint: bool = False,
        internal_batch_size: int | None = None,
        attribute_to_layer_input: bool = False,
        show_progress: bool = False,
        initial_gate: PerModality | None = None,
        antithetic: bool | None = None,
    ) -> Tensor | list[Tensor]:
        r"""Bits per element of the layer's hidden state.

        Args:

            inputs, target, additional_forward_args: As for :meth:`MultiModalInfoBottleneck.attribute`.
            beta, variance, lr, initial_gate, antithetic: As for :meth:`MultiModalInfoBottleneck.attribute`, per layer.
            n_steps, n_samples, seed, joint: As for :meth:`MultiModalInfoBottleneck.attribute`.
            internal_batch_size, attribute_to_layer_input: As for :meth:`MultiModalInfoBottleneck.attribute`.
            show_progress: As for :meth:`MultiModalInfoBottleneck.attribute`.

        Returns:
            *Tensor* or *list[Tensor]* of **attributions**:
            - **attributions** (*Tensor* or *list[Tensor]*):
                        Bits, of the shape of the layer's output (or input); a list if a list of layers was given.
        """
        settings = Settings(
            beta=beta,
            variance=variance,
            lr=lr,
            initial_gate=initial_gate,
            antithetic=antithetic,
            n_steps=n_steps,
            n_samples=n_samples,
            seed=seed,
            joint=joint,
            internal_batch_size=internal_batch_size,
            show_progress=show_progress,
        )
        tensors = format_inputs(inputs, None)
        additional = format_additional(additional_forward_args, tensors[0].shape[0])
        several = isinstance(self.layer, list)
        layers = [resolve_for(self.forward_func, layer) for layer in (self.layer if several else [self.layer])]
        priors = _priors(self.forward_func, layers, self.statistics)
        gated = optimise(
            *scorer(self.forward_func, tensors, additional, target),
            [Tap(layer, attribute_to_layer_input) for layer in layers],
            priors,
            self._layouts_of(layers),
            settings.per_layer(defaults_of(layers, priors)),
            roots_of(self.forward_func, layers),
            modalities=self._modalities_of(layers),
        )
        bits = [gate.axis.merge(gate.bits).contiguous() for gate in gated]
        return bits if several else bits[0]

    def attribute_future(self) -> None:
        """Not offered, as for most of Captum's methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _layouts_of(self, layers: Sequence[Layer]) -> Sequence[Layout | None]:
        if self.layouts is not None:
            return [*self.layouts, *[None] * len(layers)]
        if isinstance(self.forward_func, DualEncoder):
            return [self.forward_func.layout_of(layer.module) for layer in layers]
        return [None] * len(layers)

    def _modalities_of(self, layers: Sequence[Layer]) -> list[int]:
        """Which argument each layer's units belong to."""
        if isinstance(self.forward_func, DualEncoder) and self.layouts is None:
            return [self.forward_func.owner(layer.module) for layer in layers]
        return list(range(len(layers)))


def check_entry(layer: Layer, tensor: Tensor, purpose: str) -> None:
    """Raise where an input itself is to be changed and holds whole numbers."""
    if layer.argument is not None and not tensor.is_floating_point():
        raise ValueError(
            f"layers: {layer.name} holds token ids, which cannot be {purpose}; name the layer that embeds them, e.g. "
            "layers=(None, model.text_tower.embeddings)."
        )


def _unsmoothed(hidden: Tensor, inputs: Tensor) -> None:
    """Gates at a layer are each for itself."""
    return None


def _entry_units(layout: Layout | None, gate: Gated, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Bits where an input itself is gated: per pixel, (N, h, w), and per element, its channels alike."""
    if tensor.ndim != 4:
        return gate.bits, gate.bits.contiguous()
    units = gate.bits.sum(1)
    return units, (units / tensor.shape[1]).unsqueeze(1).expand(tensor.shape).contiguous()


def as_forward_func(forward_func: Any) -> Any:
    """A raw dual encoder becomes a DualEncoder; everything else that can be called stays as it is."""
    if (
        isinstance(forward_func, nn.Module)
        and not isinstance(forward_func, DualEncoder)
        and is_dual_encoder(forward_func)
    ):
        return DualEncoder(forward_func)
    if not callable(forward_func):
        raise TypeError(f"forward_func: expected a model or a callable, got {type(forward_func).__name__}.")
    return forward_func


def _recommended(forward_func: Any) -> Sequence[LayerLike | None]:
    if not isinstance(forward_func, DualEncoder):
        raise ValueError(
            f"layers: they can only be recommended for a DualEncoder, got {type(forward_func).__name__}; name one "
            "layer per input, e.g. layers=(model.image_tower.blocks[0], model.text_tower.embeddings)."
        )
    found: Sequence[LayerLike | None] = forward_func.recommended_layers()
    return found


def _known_priors(forward_func: Any, layers: Sequence[Layer]) -> tuple[Prior, ...]:
    """The priors where none are given: standardised at an input itself and at recommended layers."""
    encoder = forward_func if isinstance(forward_func, DualEncoder) else None
    recommended: list[Layer] = []
    # Towers without parts under a known name have no recommended layers.
    with contextlib.suppress(ValueError):
        if encoder is not None:
            recommended = [resolve_at(encoder, i, layer) for i, layer in enumerate(encoder.recommended_layers())]
    known = {(layer.module, layer.call) for layer in recommended}
    priors: list[Prior] = []
    for layer in layers:
        if layer.argument is not None:
            priors.append((encoder.statistics.get(layer.name) if encoder is not None else None) or "pair")
        elif encoder is not None and (layer.module, layer.call) in known:
            priors.append(encoder.statistics_of(layer.module) or "pair")
        else:
            priors.append(None)
    return tuple(priors)


def _priors(forward_func: Any, layers: Sequence[Layer], statistics: Statistics | None) -> tuple[Prior, ...]:
    if statistics is None:
        return _known_priors(forward_func, layers)
    if isinstance(statistics, Mapping):
        missing = [layer.name for layer in layers if layer.name not in statistics]
        if missing:
            raise ValueError(
                f"statistics: expected an entry for each layer, none for {', '.join(missing)}; it has "
                f"{', '.join(statistics) or 'none'}."
            )
        return tuple(statistics[layer.name] for layer in layers)
    if len(statistics) != len(layers):
        raise ValueError(f"statistics: expected one entry per layer ({len(layers)}), got {len(statistics)}.")
    for prior in statistics:
        if prior is not None and prior != "pair" and not isinstance(prior, ChannelStatistics):
            raise ValueError(f"statistics: expected ChannelStatistics, 'pair' or None, got {prior!r}.")
    return tuple(statistics)


def roots_of(forward_func: Any, layers: Sequence[Layer]) -> list[nn.Module]:
    owners = (forward_func, getattr(forward_func, "__self__", None), *(layer.module for layer in layers))
    return [owner for owner in owners if isinstance(owner, nn.Module)]


def to_units_and_input(layout: Layout | None, gate: Gated, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Bits per patch, (N, ...), or token, (N, L), and what they are in the input's shape."""
    if layout is not None and not (isinstance(layout, PatchLayout) and tensor.ndim <= len(layout.patch_size)):
        units = to_units(layout, gate.bits, tensor, gate.real)
        return units, to_input(layout, units, tensor)
    units = gate.bits.sum(-1) if gate.bits.shape[:-1] == tensor.shape else gate.bits
    if units.shape == tensor.shape:
        return units, units.contiguous()
    raise ValueError(
        f"layouts: cannot tell how a hidden state of shape {tuple(units.shape)} maps onto an input of shape "
        f"{tuple(tensor.shape)}; pass layouts=(PatchLayout(patch_size=(16, 16), prefix=1), TextLayout()) or use "
        "LayerMultiModalInfoBottleneck for bits per element."
    )
