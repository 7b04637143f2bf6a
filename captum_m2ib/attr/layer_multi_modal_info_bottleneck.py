"""M2IB at a layer: the bits of each element of a hidden state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import Explained
from captum_m2ib.attr._priors import Statistics, defaults_of, ensure_priors
from captum_m2ib.attr._scoring import as_forward_func, roots_of
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.descent import optimise
from captum_m2ib.engine.layers import Layer, resolve_for
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.settings import MEMORY_BUDGET, PerModality, ScoreRange, Settings
from captum_m2ib.engine.suffix import Tap


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
        score_range: ScoreRange | None = None,
        noiseless: PerModality | None = None,
        memory_budget: int = MEMORY_BUDGET,
        precision: str | None = None,
    ) -> Tensor | list[Tensor]:
        r"""Bits per element of the layer's hidden state.

        Args:

            inputs, target, additional_forward_args: As for :meth:`MultiModalInfoBottleneck.attribute`.
            beta, variance, lr, initial_gate, antithetic: As for :meth:`MultiModalInfoBottleneck.attribute`, per layer.
            n_steps, n_samples, seed, joint: As for :meth:`MultiModalInfoBottleneck.attribute`.
            internal_batch_size, attribute_to_layer_input: As for :meth:`MultiModalInfoBottleneck.attribute`.
            show_progress, score_range, noiseless: As for :meth:`MultiModalInfoBottleneck.attribute`.
            memory_budget, precision: As for :meth:`MultiModalInfoBottleneck.attribute`.

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
            score_range=score_range,
            noiseless=noiseless,
            n_steps=n_steps,
            n_samples=n_samples,
            seed=seed,
            joint=joint,
            internal_batch_size=internal_batch_size,
            memory_budget=memory_budget,
            precision=precision,
            show_progress=show_progress,
        )
        given = Explained.ensure(self.forward_func, inputs, target, additional_forward_args)
        several = isinstance(self.layer, list)
        layers = [resolve_for(self.forward_func, layer) for layer in (self.layer if several else [self.layer])]
        priors = ensure_priors(self.forward_func, layers, self.statistics)
        gated = optimise(
            given.forward,
            given.arguments,
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
