"""The optimisation loop as published beside ours, on a CLIP of ViT-B/32 size with random weights.

The published loop is written from its description: a bottleneck behind one block, both full towers on ten copies of
the pair at every step, parameters that require gradients, one pair and one modality at a time, and the map of the last
forward pass, which is that of the gates before the last update. So our ``n_steps=9`` equals its 10 steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.attr import LayerMultiModalInfoBottleneck
from captum_m2ib.attr._gates import INITIAL_ALPHA, noise
from captum_m2ib.dual_encoder import DualEncoder

Inputs = tuple[Tensor, Tensor, Tensor]


def published_map(
    encoder: DualEncoder,
    inputs: Inputs,
    modality: int,
    layer: nn.Module,
    n_steps: int = 10,
    beta: float = 0.1,
    n_copies: int = 10,
    seed: int = 0,
) -> Tensor:
    r"""The published loop for one pair and one modality, with the noise draws that ours makes for the same seed.

    Args:

        encoder (DualEncoder): The model; its parameters receive gradients, as in the published code.
        inputs (tuple[Tensor, Tensor, Tensor]): ``pixel_values``, ``input_ids`` and ``attention_mask`` of one pair.
        modality (int): 0 for the image, 1 for the text; chooses the noise.
        layer (nn.Module): The block behind which the bottleneck sits.
        n_steps (int, optional): Default: 10
        beta (float, optional): Default: 0.1
        n_copies (int, optional): Copies of the pair per step. Default: 10
        seed (int, optional): Default: 0

    Returns:
        Tensor: Information per element in nats, (tokens, channels).
    """
    adam: torch.optim.Adam | None = None
    alpha = information = torch.empty(0)
    step = 0

    def bottleneck(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal alpha, information, adam
        hidden = output[0] if isinstance(output, tuple) else output
        if adam is None:
            alpha = torch.full_like(hidden[:1].detach(), INITIAL_ALPHA, requires_grad=True)
            adam = torch.optim.Adam([alpha], lr=1.0)
        gate = torch.sigmoid(alpha).expand_as(hidden)
        mean, variance = gate * hidden, (1 - gate) ** 2
        information = -0.5 * (1 + torch.log(variance) - mean**2 - variance)
        drawn = noise(seed, modality, step, n_copies, hidden.shape[1:]).to(hidden.device, hidden.dtype)
        mixed = mean + (1 - gate) * drawn
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    copies = tuple(tensor.expand(n_copies, *tensor.shape[1:]) for tensor in inputs)
    handle = layer.register_forward_hook(bottleneck)
    try:
        for step in range(n_steps):
            score = encoder(*copies)
            loss = beta * information.mean() - score.mean()
            if adam is not None:
                adam.zero_grad()
            loss.backward()
            if adam is not None:
                adam.step()
    finally:
        handle.remove()
    return information[0].detach()


@dataclass
class Cost:
    """What one way of making both maps of one pair costs."""

    gflop: float
    seconds: float
    peak_mebibytes: float


def base32_encoder(seed: int = 0) -> DualEncoder:
    """A CLIP of ViT-B/32 size with random weights."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    return DualEncoder(CLIPModel(CLIPConfig()).eval())


def random_pairs(count: int, tokens: int = 12, seed: int = 0) -> Inputs:
    """Pairs of random pixels and random token ids that end as CLIP's do."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40_000, (count, tokens), generator=generator)
    ids[:, 0], ids[:, -1] = 49406, 49407
    return (
        torch.randn(count, 3, 224, 224, generator=generator),
        ids,
        torch.ones(count, tokens, dtype=torch.long),
    )


def _layers(encoder: DualEncoder, index: int) -> tuple[nn.Module, nn.Module]:
    model: Any = encoder.model
    return model.vision_model.encoder.layers[index], model.text_model.encoder.layers[index]


def run_published(encoder: DualEncoder, pairs: Inputs, index: int = 9) -> list[Tensor]:
    """Both maps of the first pair by the published loop, in nats."""
    one = (pairs[0][:1], pairs[1][:1], pairs[2][:1])
    return [published_map(encoder, one, modality, layer) for modality, layer in enumerate(_layers(encoder, index))]


def run_ours(encoder: DualEncoder, pairs: Inputs, index: int = 9, n_steps: int = 10) -> list[Tensor]:
    """Both maps of every pair by this library, in bits."""
    method = LayerMultiModalInfoBottleneck(encoder, list(_layers(encoder, index)))
    return list(method.attribute(pairs[:2], additional_forward_args=pairs[2], beta=0.1, n_steps=n_steps))
