"""The optimisation loop as published beside ours, on a CLIP of ViT-B/32 size with random weights.

The published loop is written from its description: a bottleneck behind one block, both full towers on ten copies of
the pair at every step, parameters that require gradients, one pair and one modality at a time, and the map of the last
forward pass, which is that of the gates before the last update. So our ``n_steps=9`` equals its 10 steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.attr import LayerMultiModalInfoBottleneck
from captum_m2ib.attr._priors import PUBLISHED
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.gates import noise
from captum_m2ib.engine.information import NATS_PER_BIT

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
    bottleneck = _PublishedBottleneck(modality, n_copies, seed)
    copies = tuple(tensor.expand(n_copies, *tensor.shape[1:]) for tensor in inputs)
    handle = layer.register_forward_hook(bottleneck)
    try:
        for step in range(n_steps):
            bottleneck.step = step
            loss = -encoder(*copies).mean() + beta * bottleneck.information.mean()
            if step == 0:
                adam = torch.optim.Adam([bottleneck.alpha], lr=1.0)
            adam.zero_grad()
            loss.backward()
            adam.step()
    finally:
        handle.remove()
    return bottleneck.information[0].detach()


class _PublishedBottleneck:
    """A forward hook that adds noise through gates made at its first call."""

    def __init__(self, modality: int, n_copies: int, seed: int) -> None:
        self.modality, self.n_copies, self.seed, self.step = modality, n_copies, seed, 0
        self.alpha: Any = None
        self.information: Any = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if self.alpha is None:
            self.alpha = torch.full_like(hidden[:1].detach(), 5.0, requires_grad=True)
        gate = torch.sigmoid(self.alpha).expand_as(hidden)
        mean, variance = gate * hidden, (1 - gate) ** 2
        self.information = -0.5 * (1 + torch.log(variance) - mean**2 - variance)
        drawn = noise(self.seed, self.modality, self.step, self.n_copies, hidden.shape[1:])
        mixed = mean + (1 - gate) * drawn.to(hidden.device, hidden.dtype)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def base32_encoder(seed: int = 0) -> DualEncoder:
    """A CLIP of ViT-B/32 size with random weights."""
    from transformers import CLIPConfig, CLIPModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return DualEncoder(CLIPModel(CLIPConfig()).eval())


def random_pairs(count: int, tokens: int = 12, seed: int = 0) -> Inputs:
    """Pairs of random pixels and random token ids that end as CLIP's do."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40_000, (count, tokens), generator=generator)
    ids[:, 0], ids[:, -1] = 49406, 49407
    return torch.randn(count, 3, 224, 224, generator=generator), ids, torch.ones(count, tokens, dtype=torch.long)


def run_published(encoder: DualEncoder, pairs: Inputs, layer: int = 9) -> list[Tensor]:
    """Both maps of the first pair by the published loop, in bits."""
    first = (pairs[0][:1], pairs[1][:1], pairs[2][:1])
    layers = blocks(encoder, layer)
    return [published_map(encoder, first, modality, layers[modality]) / NATS_PER_BIT for modality in (0, 1)]


def run_ours(encoder: DualEncoder, pairs: Inputs, layer: int = 9, n_steps: int = 10) -> list[Tensor]:
    """Both maps of every pair by this library, in bits."""
    method = LayerMultiModalInfoBottleneck(encoder, list(blocks(encoder, layer)))
    maps = method.attribute(
        pairs[:2], additional_forward_args=pairs[2], beta=PUBLISHED.beta, n_steps=n_steps, score_range=1.0
    )
    return list(maps)


def blocks(encoder: DualEncoder, index: int) -> tuple[nn.Module, nn.Module]:
    """One block of each tower of a transformers CLIP."""
    model: Any = encoder.model
    depth = min(len(model.vision_model.encoder.layers), len(model.text_model.encoder.layers))
    if not 0 <= index < depth:
        raise ValueError(f"layer: expected a block from 0 to {depth - 1}, got {index}.")
    return model.vision_model.encoder.layers[index], model.text_model.encoder.layers[index]
