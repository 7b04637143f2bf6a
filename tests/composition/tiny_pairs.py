"""Three pairs on a tiny CLIP in float64, with what Captum's tools need beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.composition import EmbeddingForward, feature_masks, token_baselines

# No caption holds it.
UNKNOWN = 61
FEW = {"n_steps": 2, "n_samples": 2}


@dataclass(frozen=True)
class Setup:
    """A dual encoder with pairs; the second caption has one word less and two tokens of padding."""

    encoder: DualEncoder
    pixels: Tensor
    ids: Tensor
    mask: Tensor
    maskable: Tensor
    embedding: EmbeddingForward

    @property
    def inputs(self) -> tuple[Tensor, Tensor]:
        return self.pixels, self.ids

    @property
    def additional(self) -> tuple[Tensor]:
        return (self.mask,)

    @property
    def method(self) -> MultiModalInfoBottleneck:
        return MultiModalInfoBottleneck(self.encoder, self.encoder.published_layers())

    @property
    def embedding_method(self) -> MultiModalInfoBottleneck:
        layers = self.encoder.published_layers()
        return MultiModalInfoBottleneck(self.embedding, layers, self.embedding.layouts)

    @property
    def masks(self) -> tuple[Tensor, ...]:
        masks = feature_masks(self.encoder.layouts, self.inputs, self.additional, self.maskable)
        assert isinstance(masks, tuple)
        return masks

    @property
    def baselines(self) -> tuple[float, Tensor]:
        return 0, token_baselines(self.ids, self.maskable, UNKNOWN)

    def score(self, pixels: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return self.encoder(self.pixels if pixels is None else pixels, self.ids if ids is None else ids, self.mask)

    def row(self, index: int) -> Setup:
        """One of the pairs."""
        rows = slice(index, index + 1)
        return Setup(
            self.encoder, self.pixels[rows], self.ids[rows], self.mask[rows], self.maskable[rows], self.embedding
        )


def close(found: Any, expected: Any, atol: float = 1e-9) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)
