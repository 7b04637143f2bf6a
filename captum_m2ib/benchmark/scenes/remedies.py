"""Remedies that were tried against what M2IB loses by, and are no defaults: the ablation measures them.

Each is a method on a :class:`DualEncoder` of two transformers with one vector per token, as the compact model is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.attr import MultiModalInfoBottleneck
from captum_m2ib.attr._priors import AT_INPUT
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.gates import FilterMaker, GateFilter, unit_positions
from captum_m2ib.engine.layouts import Layout
from captum_m2ib.engine.settings import Settings

CLOSED = -30.0
"""Logit of a gate that lets nothing through."""

BETAS = tuple(factor * AT_INPUT.beta for factor in (4, 2, 1, 0.5))
"""What :class:`BetaOfEachPair` chooses among, the most compressing first."""


class LateLayers(MultiModalInfoBottleneck):
    r"""M2IB at the paper's layers, with the standardised prior and its descent.

    Args:

        encoder (DualEncoder): The encoder.
    """

    def __init__(self, encoder: DualEncoder) -> None:
        layers = encoder.published_layers()
        super().__init__(encoder, layers, statistics=[encoder.statistics_of(layer) or "pair" for layer in layers])


class ClosedPrefix(LateLayers):
    r"""The same with the bypass closed: at the layer, whatever is no patch and no word is noise throughout.

    What the class token and the end token have gathered by then is lost, and the blocks that are left must gather it
    once more, from what the gates let through.

    Args:

        encoder (DualEncoder): The encoder, with a tokenizer in its processor.
    """

    def __init__(self, encoder: DualEncoder) -> None:
        super().__init__(encoder)
        tokenizer = getattr(encoder.processor, "tokenizer", encoder.processor)
        self._special = torch.tensor(tokenizer.all_special_ids)

    def _gate_filter(self, index: int, settings: Settings) -> FilterMaker:
        layout = self.layouts[index]
        if layout is None:
            raise ValueError(f"layouts: expected one for input {index}, got None; without it no unit is known.")
        return partial(_close_all_but_units, layout, self._special)


def _close_all_but_units(
    layout: Layout, special: Tensor, hidden: Tensor, inputs: Tensor, real: Tensor | None
) -> GateFilter:
    units = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    positions = unit_positions(layout, hidden, inputs).flatten()
    units[:, positions] = True if inputs.is_floating_point() else ~torch.isin(inputs, special.to(inputs.device))
    closed = hidden.new_tensor(CLOSED)
    return lambda alpha: torch.where(units.unsqueeze(-1), alpha, closed)


class BetaOfEachPair:
    r"""The largest of several betas at which a picture's gates keep a given share of the pair's score.

    Args:

        encoder (DualEncoder): The encoder.
        share (float, optional): Of the untouched pair's score. Default: 0.9
    """

    def __init__(self, encoder: DualEncoder, share: float = 0.9) -> None:
        self.method: Any = MultiModalInfoBottleneck(encoder)
        self.share = share

    def attribute(self, inputs: Tensor, additional_forward_args: Any = None, seed: int = 0) -> Tensor:
        r"""Maps of pictures, in bits; those of the smallest beta where none keeps so much.

        Args:

            inputs (Tensor): Pictures, (N, C, H, W).
            additional_forward_args (Any, optional): Further arguments of the encoder. Default: None
            seed (int, optional): Seed of the noise. Default: 0
        """
        chosen = torch.zeros_like(inputs)
        unsettled = torch.ones(inputs.shape[0], dtype=torch.bool, device=inputs.device)
        for beta in BETAS:
            bits, record = self.method.attribute_with_record(
                inputs, additional_forward_args=additional_forward_args, beta=beta, seed=seed
            )
            (picture,) = record.modalities
            chosen = torch.where(unsettled.view(-1, 1, 1, 1), bits, chosen)
            unsettled = unsettled & (picture.score_after < self.share * picture.score_before)
        return chosen


class AgainstTheBatch:
    r"""M2IB of a picture's score with its caption beyond that with the other captions of the batch.

    The score is the pair's minus the soft maximum over all captions of the batch, as in the model's own training loss,
    in units of the cosine similarity.

    Args:

        encoder (DualEncoder): The encoder.
        temperature (float, optional): Of the soft maximum. Default: 0.05
    """

    def __init__(self, encoder: DualEncoder, temperature: float = 0.05) -> None:
        self.encoder, self.temperature = encoder, temperature

    def attribute(self, inputs: Tensor, additional_forward_args: Any = None, seed: int = 0) -> Tensor:
        r"""Maps of pictures, in bits.

        Args:

            inputs (Tensor): Pictures, (N, C, H, W).
            additional_forward_args (Any, optional): Their captions' ids, then further arguments of the encoder.
                        Default: None
            seed (int, optional): Seed of the noise. Default: 0
        """
        pictures, captions = self._embedders()
        with torch.no_grad():
            every = F.normalize(captions(*additional_forward_args), dim=-1)

        def beyond_the_others(pixels: Tensor, caption: Tensor) -> Tensor:
            picture = F.normalize(pictures(pixels), dim=-1)
            others = torch.logsumexp(picture @ every.T / self.temperature, -1) * self.temperature
            return (picture * caption).sum(-1) - others

        method = MultiModalInfoBottleneck(beyond_the_others, [None], layouts=self.encoder.layouts[:1])
        bits: Tensor = method.attribute(inputs, additional_forward_args=every, seed=seed)
        return bits

    def _embedders(self) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
        """From pixels, and from token ids and a mask, to what the score compares."""
        model: Any = self.encoder.model

        def pictures(pixels: Tensor) -> Tensor:
            return _features(model.get_image_features(pixel_values=pixels))

        def captions(ids: Tensor, mask: Tensor | None = None, *rest: Any) -> Tensor:
            return _features(model.get_text_features(input_ids=ids, attention_mask=mask))

        return pictures, captions


def _features(output: Any) -> Tensor:
    """What transformers 5 returns in an object, and earlier versions as it is."""
    found: Tensor = getattr(output, "pooler_output", output)
    return found
