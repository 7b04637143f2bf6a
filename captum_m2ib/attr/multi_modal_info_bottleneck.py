"""M2IB: the least information in each modality that keeps the pair's similarity (arXiv 2312.17174)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from torch import Tensor

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import Explained
from captum_m2ib.attr._layers import (
    Guide,
    check_entry,
    check_pictures,
    encoder_of,
    ensure_guides,
    ensure_layers,
    ensure_layouts,
    late_guides,
)
from captum_m2ib.attr._priors import GUIDE, PUBLISHED, Statistics, defaults_of, ensure_priors
from captum_m2ib.attr._scoring import as_forward_func, roots_of
from captum_m2ib.attr._units import to_pixels_and_input, to_units_and_input
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.descent import LayerRecord, optimise
from captum_m2ib.engine.gates import FilterMaker, Prior
from captum_m2ib.engine.layers import Layer, LayerLike
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.real_units import check_masks
from captum_m2ib.engine.settings import MEMORY_BUDGET, LayerSettings, PerModality, ScoreRange, Settings
from captum_m2ib.engine.smoothing import COLOUR, SHARE, over_neighbours
from captum_m2ib.engine.suffix import Tap


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
    over its neighbours of like colour while they are optimised; IBA (arXiv 2001.00396) smooths gates over all
    neighbours.

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
        guides (sequence, optional): Per modality a late layer of its tower, where a picture itself is gated, or None:
                    the picture's bits are moved to where that layer reads, as :meth:`guided` does. Default: () (bits
                    stay where the gates of pixels leave them)

    Raises:
        ValueError: if a layer is unknown, or cannot be recommended for this model, or nothing is there to be guided.
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
        guides: Sequence[LayerLike | None] = (),
    ) -> None:
        forward_func = as_forward_func(forward_func)
        _captum.Attribution.__init__(self, forward_func)
        self.is_published = False
        self.layers: tuple[Layer, ...] = ensure_layers(forward_func, layers)
        self.layouts: tuple[Layout | None, ...] = ensure_layouts(forward_func, self.layers, layouts)
        self.priors: tuple[Prior, ...] = ensure_priors(forward_func, self.layers, statistics)
        self.guides: tuple[Guide, ...] = ensure_guides(forward_func, self.layers, self.layouts, guides)

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
        method = cls(forward_func, layers=forward_func.published_layers())
        method.is_published = True
        return method

    @classmethod
    def guided(cls, forward_func: Callable[..., Any], layers: Any = None) -> MultiModalInfoBottleneck:
        r"""The method with a late layer of the picture's tower that says where the picture's bits lie.

        A second, short descent, of half as many steps, gates the output of the block at three quarters of the tower's
        depth. Where D are the bits of pixels and L those of that layer, blurred over a fourteenth of the picture, both
        as shares of their sums, the map is in proportion to (D + 0.1 L) L^2 and has as many bits as D
        (:mod:`captum_m2ib.engine.guidance`). More of the map lies on what is named, on scenes and on photographs; it
        keeps less of the picture for the score to live on, and its ranks follow the caption less (docs/benchmark.md,
        docs/benchmark-photos.md). Captions are explained as without it.

        Args:

            forward_func (DualEncoder or nn.Module): The dual encoder.
            layers (sequence, optional): As for the class; pictures of which are None. Default: None

        Returns:
            MultiModalInfoBottleneck: with the published layer of each picture that is gated itself as its guide.

        Raises:
            ValueError: if ``forward_func`` is no dual encoder, a tower has no list of blocks, or no picture is gated
                itself.

        Examples::

            >>> method = MultiModalInfoBottleneck.guided(encoder)
            >>> method.guides[0].layer.name
            'vision_model.encoder.layers.2'
        """
        forward_func = as_forward_func(forward_func)
        encoder = encoder_of(forward_func, "guided", "None, model.text_tower.embeddings")
        chosen = encoder.recommended_layers() if layers is None else layers
        return cls(encoder, layers=chosen, guides=late_guides(encoder, chosen))

    # Inputs that speak against the score, so that it rises where they close.
    _may_rise: tuple[int, ...] = ()

    @_captum.log_usage(part_of_slo=True)
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        beta: PerModality | None = None,
        variance: PerModality | None = None,
        n_steps: int | None = None,
        n_samples: int | None = None,
        lr: PerModality | None = None,
        seed: int = 0,
        joint: bool = False,
        internal_batch_size: int | None = None,
        attribute_to_layer_input: bool = False,
        show_progress: bool = False,
        initial_gate: PerModality | None = None,
        antithetic: bool | None = None,
        smoothing: float = SHARE,
        smoothing_colour: float | None = COLOUR,
        score_range: ScoreRange | None = None,
        noiseless: PerModality | None = None,
        memory_budget: int = MEMORY_BUDGET,
        precision: str | None = None,
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
            beta (float or sequence, optional): Weight of the information per element, in nats, against the share of
                        the score that is kept; one number or one per modality. Larger keeps less. Default: None (0.25
                        for the prior N(0, variance), 3.0 for the standardised prior, 0.6 where an input itself is
                        gated; 0.1 for :meth:`published`)
            variance (float or sequence, optional): Variance of the prior and of the noise, in units of the
                        standardised prior's own where there is one. Default: None (1.0; 0.25 where an input itself is
                        gated)
            n_steps (int, optional): Steps of the optimisation (not of an integral). Default: None (10 as published for
                        the prior N(0, variance), 6 for the standardised prior, 4 where an input itself is gated)
            n_samples (int, optional): Draws per step, in the mean where one of them is without noise; more of them make
                        maps vary less between seeds. Default: None (10 as published for the prior N(0, variance), 2 for
                        the standardised prior, 3 where an input itself is gated)
            lr (float or sequence, optional): Adam's learning rate. Default: None (1.0 as published for the prior
                        N(0, variance); for the standardised prior 4 / n_steps and at most 1, where an input itself is
                        gated 5 / n_steps and at most 1.25, so that more steps are finer ones)
            seed (int, optional): Seed of the noise; the global random state is neither read nor changed. Default: 0
            joint (bool, optional): Optimise the gates of all modalities against one score, each modality seeing the
                        other's noise, instead of one modality at a time. Default: False
            internal_batch_size (int, optional): Most rows (pairs times draws) in one pass, with gradients or without;
                        bounds memory and changes no result. Only the recorded pass has a row more than pairs, and what
                        checks it up to 5 rows to a pair. Default: None (as many as ``memory_budget`` has room for)
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
                        none. Gates at layers are not smoothed. Default: 0.1
            smoothing_colour (float, optional): Standard deviation of a second Gaussian, over colours, in standard
                        deviations of the picture's own: gates are smoothed among pixels that look alike, as by a
                        bilateral filter (Tomasi and Manduchi, ICCV 1998; :mod:`captum_m2ib.engine.bilateral`), so that
                        maps end where colours do. None for pixels of whatever colour. Default: 1.0
            score_range (float or sequence, optional): What the score of a pair stands to lose, in the score's own unit,
                        one number or one per pair, (N,): the objective takes the score as a share of it, so that the
                        score's unit and zero do not matter. Default: None (measured for each pair with gates closed,
                        see :mod:`captum_m2ib.engine.stakes`; 1.0 for :meth:`published`, the score as it is)
            noiseless (float or sequence, optional): Share of the kept score, from 0 to 1, that is the score of one draw
                        at the noise's mean, the first of each step where there is more than one. It makes maps vary
                        less between seeds than further draws would, for a mean over the noise that is no longer quite
                        one. The first and last of four steps or more take this draw alone, and the steps beside them
                        their noise. Default: None (0.0; 0.7 where an input itself is gated)
            memory_budget (int, optional): Where ``internal_batch_size`` is None, the bytes of tensors that the rows of
                        one pass may make on their way from the layer to the score; autograd keeps between half and all
                        of them. What a row makes is counted on the recorded pass. At least one row is run, whatever it
                        takes. Changes no result. Default: 1.5 GiB
            precision (str, optional): ``"bf16"``: where an input of floating point is explained, as a picture, draws of
                        noise run forwards and backwards under ``torch.autocast`` in bfloat16. Draws without noise,
                        descents of token ids, the gates, the range of the score and all that is measured stay in the
                        model's own precision. Maps differ a little. Default: None (the model's own precision)

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                        Bits, of the inputs' shapes, non-negative. An image's channels share its pixels' bits equally;
                        tokens at padding are exactly 0. What prefix tokens (a class token) carry is not included.

        Raises:
            ValueError: if an argument is out of range, batch sizes differ, there are more inputs than layers, a
                layout does not fit, or a score, hidden state or gradient is NaN or infinite.
            RuntimeError: if a layer is not reached, or the score does not depend on it.

        Warns:
            NothingToExplainWarning: if a pair's score is about as high with all gates closed, or no part of an input
                was worth its bits.

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
            smoothing_colour=smoothing_colour,
            score_range=score_range,
            noiseless=noiseless,
            internal_batch_size=internal_batch_size,
            memory_budget=memory_budget,
            precision=precision,
            show_progress=show_progress,
        )
        attributions, _ = self._run(inputs, target, additional_forward_args, settings, attribute_to_layer_input)
        return attributions

    def attribute_with_record(
        self, inputs: Tensor | tuple[Tensor, ...], *args: Any, check: bool = False, **kwargs: Any
    ) -> tuple[Tensor | tuple[Tensor, ...], OptimizationRecord]:
        r"""Like :meth:`attribute`, and also what the optimisation did, at the cost of one more run of the suffix.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): As for :meth:`attribute`.
            *args: As for :meth:`attribute`.
            check (bool, optional): Whether the record also tells what is left of the score when parts of the input are
                        shut (:mod:`captum_m2ib.engine.check`), at the cost of 9 rows per pair and modality, without
                        gradients. Default: False
            **kwargs: As for :meth:`attribute`.

        Returns:
            tuple: what :meth:`attribute` returns, and an :class:`OptimizationRecord` with, per modality, score and
            information at each step, the score before and after, and the bits in all.
        """
        bound = inspect.signature(type(self).attribute).bind(self, inputs, *args, **kwargs)
        bound.apply_defaults()
        given = {name: value for name, value in bound.arguments.items() if name != "self"}
        settings = Settings(**{field.name: given.pop(field.name) for field in fields(Settings)})
        return self._run(**given, settings=settings, with_record=True, with_check=check)

    def attribute_future(self) -> None:
        """Not offered, as for most of Captum's methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    def _gate_filter(self, index: int, settings: Settings) -> FilterMaker:
        """Makes, of a layer's hidden state, the explained input and what is real, what its gates go through."""
        if self.layers[index].argument is None:
            return _unsmoothed
        return partial(over_neighbours, settings.smoothing, settings.smoothing_colour)

    @property
    def _objective(self) -> Callable[..., Any]:
        """What must stay high, as a function of all arguments."""
        found: Callable[..., Any] = self.forward_func
        return found

    def _layouts_among(self, count: int) -> Sequence[Layout | None]:
        """The layouts of what is explained, where the objective takes so many arguments."""
        return self.layouts

    def _run(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any,
        additional_forward_args: Any,
        settings: Settings,
        attribute_to_layer_input: bool,
        with_record: bool = False,
        with_check: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, ...], OptimizationRecord]:
        """Attributions in the form of the inputs; the record holds no layers unless it is asked for."""
        given = Explained.ensure(self._objective, inputs, target, additional_forward_args, len(self.layers))
        layouts = self._layouts_among(len(given.inputs) + len(given.additional))
        count = len(given.inputs)
        check_masks(layouts, given.arguments)
        layers, priors = self.layers[:count], self.priors[:count]
        for layer, tensor in zip(layers, given.inputs, strict=True):
            check_entry(layer, tensor, "mixed with noise")
        if self.is_published and settings.score_range is None:
            settings = replace(settings, score_range=1.0)
        defaults = [PUBLISHED] * count if self.is_published else defaults_of(layers, priors)
        applied = settings.per_layer(defaults)
        guides = [guide for guide in self.guides if guide.guided < count]
        guided = [guide.guided for guide in guides]
        check_pictures(given.inputs, guided)
        late = [guide.layer for guide in guides]
        own: list[Prior] = ["pair" for _ in guides]
        gated = optimise(
            given.forward,
            given.arguments,
            [*(Tap(layer, attribute_to_layer_input) for layer in layers), *map(Tap, late)],
            [*priors, *own],
            [*layouts[:count], *(guide.layout for guide in guides)],
            applied.with_guides(guided, GUIDE),
            roots_of(self._objective, [*layers, *late]),
            with_record,
            with_check,
            modalities=[*range(count), *guided],
            may_rise=self._may_rise,
            filters=[self._gate_filter(index, applied) for index in range(count)],
            guided=guided,
        )
        attributions = []
        for layer, layout, gate, tensor in zip(layers, layouts, gated, given.inputs, strict=False):
            units, attribution = (
                to_units_and_input(layout, gate.bits, gate.real, tensor)
                if layer.argument is None
                else to_pixels_and_input(gate.bits)
            )
            attributions.append(attribution)
            if gate.record is not None:
                gate.record.units = units
        records = tuple(gate.record for gate in gated if gate.record is not None)
        formed = _captum.format_output(_captum.is_tuple(inputs), tuple(attributions))
        return formed, OptimizationRecord(records, applied)


def _unsmoothed(hidden: Tensor, inputs: Tensor, real: Tensor | None) -> None:
    """Gates at a layer are each for itself."""
    return None
