"""Second implementations, in float64 and in the open: the attention methods on transformers' CLIP, and what the
information bottlenecks measure of a pair before they descend and do to its gates afterwards."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from families import Case, family_named
from torch import Tensor, nn

from captum_m2ib.engine.gates import noise
from captum_m2ib.engine.units import to_input

CLOSED, HALVES, FIELDS = 2**32, 2**32 + 1, 2**32 + 2
"""The steps whose noise fills closed gates, fills gates half of which are closed, and says which half."""


def range_of(before: float, closed: Sequence[float], halves: Sequence[float]) -> float:
    """What a pair stands to lose: its fall to all gates closed, or twice the spread over halves of them."""
    mean = sum(halves) / len(halves)
    spread = (sum((value - mean) ** 2 for value in halves) / (len(halves) - 1)) ** 0.5
    return max(before - sum(closed) / len(closed), 2 * spread)


def bilateral(picture: Tensor, sigma: float, colour: float, colours: int = 8) -> Tensor:
    """What each pixel of a picture, (C, h, w), takes of each, (pixels, pixels): the filter of low rank, dense."""
    high, wide = picture.shape[1:]
    stds, means = torch.std_mean(picture, (1, 2), correction=0, keepdim=True)
    pixels = ((picture - means) / stds).flatten(1).T
    assert len(pixels) <= 4096, "of larger pictures only some pixels are looked at"
    chosen = [pixels[pixels.norm(dim=1).argmin()]]
    while len(chosen) < colours:
        nearest = torch.stack([(pixels - one).norm(dim=1) for one in chosen]).min(0).values
        if float(nearest.max()) < 1e-6:
            break
        chosen.append(pixels[nearest.argmax()])
    for _ in range(4):
        groups = torch.stack([(pixels - one).norm(dim=1) for one in chosen]).argmin(0)
        chosen = [pixels[groups == i].mean(0) if bool((groups == i).any()) else one for i, one in enumerate(chosen)]
    likeness = torch.stack([torch.exp(-(pixels - one).square().mean(1) / colour**2) for one in chosen], 1)
    shares = likeness / likeness.sum(1, keepdim=True)

    def along(side: int) -> Tensor:
        cells = min(max(1, math.ceil((side - 1) * math.sqrt(2) / sigma)), 2 * (side - 1)) + 1
        near = torch.arange(side, dtype=torch.float64).unsqueeze(1) - torch.linspace(
            0, side - 1, cells, dtype=torch.float64
        )
        held = torch.exp(-near.square() / sigma**2)
        return held @ held.T

    kernel = torch.kron(along(high), along(wide)) * (shares @ shares.T)
    return kernel / kernel.sum(1, keepdim=True)


def measure_range(
    before: Tensor,
    score: Callable[[list[Tensor], list[Tensor]], Tensor],
    indices: Sequence[int],
    shapes: Sequence[Sequence[int]],
    channels: Sequence[int],
    blur: Callable[[Tensor], Tensor] = lambda field: field,
    count: int = 6,
) -> Tensor:
    r"""The range of every pair of a batch, (N,).

    Args:

        before (Tensor): Scores of the untouched pairs, (N,).
        score (Callable): Scores through gates that are 0 or 1 given per layer, and noise given per layer.
        indices (sequence of int): Positions of the layers that close together.
        shapes (sequence): One pair's hidden state's shape per layer.
        channels (sequence of int): The axis of that shape along which channels run.
        blur (Callable, optional): What the fields go through that say which half is open. Default: nothing
        count (int, optional): How many halves there are; of pixels there are 4. Default: 6
    """

    def draws(step: int, count: int, one_channel: bool = False) -> list[Tensor]:
        found = []
        for index, shape, axis in zip(indices, shapes, channels, strict=True):
            own = [1 if one_channel and dim == axis else size for dim, size in enumerate(shape)]
            half = noise(0, index, step, count // 2, own).double()
            found.append(torch.cat([half, -half]))
        return found

    def scores(step: int, gates: list[Tensor]) -> list[Tensor]:
        drawn = draws(step, len(gates[0]))
        return [score([g[d] for g in gates], [eps[d] for eps in drawn]).detach() for d in range(len(gates[0]))]

    closed = scores(CLOSED, [torch.zeros(2, *shape).double() for shape in shapes])
    is_open = [torch.stack([blur(one) for one in fields]) > 0 for fields in draws(FIELDS, count, one_channel=True)]
    halves = scores(HALVES, [given.double().expand(count, *s) for given, s in zip(is_open, shapes, strict=True)])
    found = [
        range_of(float(before[pair]), [float(s[pair]) for s in closed], [float(s[pair]) for s in halves])
        for pair in range(len(before))
    ]
    return torch.tensor(found, dtype=torch.float64)


def shut(gate: Tensor, idle: Tensor) -> Tensor:
    """Gates of a picture after the descent: those hardly further open than the information alone left them close."""
    return gate * torch.maximum((gate / idle - 1.1) / 0.4, (idle - 0.2) / 0.1).clamp(0, 1)


def draw_counts(n_steps: int, n_samples: int, noiseless: float) -> list[int]:
    """Draws of each step: with one without noise, the ends of four steps or more leave the others to the next step."""
    counts = [n_samples] * n_steps
    if noiseless and n_steps > 3:
        for end, inner in ((0, 1), (-1, -2)):
            counts[end], counts[inner] = 1, counts[inner] + n_samples - 1
    return counts


def draw_shares(n_samples: int, noiseless: float) -> list[float]:
    """What the score of each draw counts for, where the first is without noise."""
    if not noiseless or n_samples == 1:
        return [1 / n_samples] * n_samples
    return [noiseless] + [(1 - noiseless) / (n_samples - 1)] * (n_samples - 1)


def draws_of(layer: int, step: int, n_samples: int, shape: Sequence[int], noiseless: float, seed: int = 0) -> Tensor:
    """The noise of one step, antithetic, after the middle where there is one."""
    if not noiseless:
        return noise(seed, layer, step, n_samples, shape, antithetic=True).double()
    others = noise(seed, layer, step, n_samples - 1, shape, antithetic=True).double()
    return torch.cat([torch.zeros(1, *shape).double(), others])


def ground(picture: Tensor) -> Tensor:
    """What fills most of a picture, (C, h, w): of 8 bins to the channel the fullest, or each channel's median."""
    pixels = picture.flatten(1).T.tolist()
    ends = [(min(values), max(values)) for values in zip(*pixels, strict=True)]

    def place(pixel: list[float]) -> tuple[int, ...]:
        return tuple(
            min(int((value - low) / (high - low) * 8), 7) if high > low else 0
            for value, (low, high) in zip(pixel, ends, strict=True)
        )

    places = [place(pixel) for pixel in pixels]
    counts = Counter(places)
    fullest = min(counts, key=lambda bin_: (-counts[bin_], bin_))
    if counts[fullest] < max(2, len(pixels) / 32):
        return picture.new_tensor([sorted(values)[(len(values) - 1) // 2] for values in zip(*pixels, strict=True)])
    inside = [pixel for pixel, bin_ in zip(pixels, places, strict=True) if bin_ == fullest]
    return picture.new_tensor([sum(values) / len(inside) for values in zip(*inside, strict=True)])


@dataclass
class Side:
    """One tower's pass: weights per block, hidden states, the pooled position, and how a token becomes an embedding."""

    attentions: tuple[Tensor, ...]
    hidden: tuple[Tensor, ...]
    pooled: Tensor
    head: Any
    embedding: Tensor


def clip_case() -> Case:
    """A tiny CLIP in float64, with three pairs; the second caption is two tokens shorter."""
    return family_named("clip").build().double()


def eager_copy(case: Case) -> nn.Module:
    model = copy.deepcopy(case.roots[0])
    model.set_attn_implementation("eager")
    return model


def sides(model: nn.Module, case: Case) -> tuple[Side, Side]:
    pixels, ids = case.inputs
    mask = case.additional[0]
    keep = {"output_attentions": True, "output_hidden_states": True}
    image = model.vision_model(pixels, **keep)
    text = model.text_model(ids, attention_mask=mask, **keep)
    ends = mask.sum(1) - 1

    def image_head(token: Tensor) -> Tensor:
        return model.visual_projection(model.vision_model.post_layernorm(token))

    def text_head(token: Tensor) -> Tensor:
        return model.text_projection(model.text_model.final_layer_norm(token))

    first = torch.zeros(len(pixels), dtype=torch.long)
    made = []
    for output, pooled, head in ((image, first, image_head), (text, ends, text_head)):
        token = output.hidden_states[-1][torch.arange(len(pooled)), pooled]
        made.append(Side(output.attentions, output.hidden_states, pooled, head, head(token)))
    return made[0], made[1]


def score_of(model: nn.Module, case: Case) -> tuple[Tensor, tuple[Side, Side]]:
    both = sides(model, case)
    return F.cosine_similarity(both[0].embedding, both[1].embedding), both


def expected_maps(case: Case, tokens: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attributions in the inputs' shapes from values per token of each tower, (N, tokens)."""
    patches = tokens[0][:, 1:].unflatten(1, (4, 4))
    image = to_input(case.forward.layouts[0], patches, case.inputs[0])
    return image, tokens[1] * case.additional[0]


def relevance_oracle(case: Case, first: int) -> tuple[Tensor, Tensor]:
    """Chefer et al., block by block and pair by pair."""
    score, both = score_of(eager_copy(case), case)
    found = []
    for side in both:
        rows = []
        used = side.attentions[first:]
        grads = torch.autograd.grad(score.sum(), used, retain_graph=True)
        for pair, pooled in enumerate(side.pooled.tolist()):
            rollout = torch.eye(used[0].shape[-1], dtype=used[0].dtype)
            for weights, gradient in zip(used, grads, strict=True):
                heads = [(w * g).relu() for w, g in zip(weights[pair], gradient[pair], strict=True)]
                rollout = rollout + sum(heads) / len(heads) @ rollout
            rows.append(rollout[pooled])
        found.append(torch.stack(rows).detach())
    return found[0], found[1]


def grad_eclip_oracle(case: Case, counts: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Grad-ECLIP with hooks on the projections of each block, with the model's own heads."""
    model = eager_copy(case)
    kept: dict[Any, Tensor] = {}
    towers = (model.vision_model.encoder.layers, model.text_model.encoder.layers)
    for block in (*towers[0], *towers[1]):
        for name in ("q_proj", "k_proj", "v_proj"):
            module = getattr(block.self_attn, name)
            module.register_forward_hook(lambda m, args, output: kept.__setitem__(m, output))
        block.self_attn.out_proj.register_forward_pre_hook(lambda m, args: kept.__setitem__(m, args[0]))
    score, both = score_of(model, case)
    found = []
    for blocks, side, count in zip(towers, both, counts, strict=True):
        is_text = blocks is towers[1]
        total = torch.zeros(len(score), side.hidden[0].shape[1], dtype=torch.float64)
        for block in blocks[-count:]:
            attention = block.self_attn
            (gradient,) = torch.autograd.grad(score.sum(), kept[attention.out_proj], retain_graph=True)
            query, key = (
                F.linear(kept[m], attention.out_proj.weight, attention.out_proj.bias)
                for m in (attention.q_proj, attention.k_proj)
            )
            for pair, pooled in enumerate(side.pooled.tolist()):
                end = int(case.additional[0][pair].sum()) if is_text else query.shape[1]
                start = 0 if is_text else 1
                similar = F.cosine_similarity(query[pair, pooled], key[pair, start:end], dim=-1)
                similar = (similar - similar.min()) / (similar.max() - similar.min())
                values = kept[attention.v_proj][pair, start:end]
                total[pair, start:end] += similar * (values @ gradient[pair, pooled])
        found.append(total.relu().detach())
    return found[0], found[1]


def legrad_oracle(case: Case, count: int) -> tuple[Tensor, Tensor]:
    """LeGrad: each layer's mean token through the head, gradients of the weights by autograd."""
    model = eager_copy(case)
    _, both = score_of(model, case)
    real = case.additional[0].double()
    found = []
    for index, side in enumerate(both):
        other = both[1 - index].embedding.detach()
        depth = len(side.attentions)
        total = torch.zeros(side.hidden[0].shape[:2], dtype=torch.float64)
        for block in range(depth - count, depth):
            weight = real if index else torch.ones_like(total)
            # transformers keeps the last hidden state before the final normalisation too.
            mean = (side.hidden[block + 1] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
            score = F.cosine_similarity(side.head(mean), other)
            (gradient,) = torch.autograd.grad(score.sum(), side.attentions[block], retain_graph=True)
            gain = (gradient.relu() * (side.attentions[block] > 0)).mean(1)
            total += gain.sum(1) / weight.sum(1, keepdim=True)
        found.append(total.detach())
    return found[0], found[1]


def state_of(roots: list[nn.Module]) -> list[Any]:
    """What a run could change about models, as something that can be compared."""
    state: list[Any] = [nn.Module.__call__, torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()]
    for root in roots:
        for name, module in root.named_modules():
            hooks = [len(value) for key, value in sorted(vars(module).items()) if key.endswith("_hooks")]
            state.append((name, module.training, sorted(vars(module)), hooks))
            state.append(getattr(getattr(module, "config", None), "_attn_implementation", None))
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            state.append(
                (name, tensor.requires_grad, tensor.grad is None, tensor._version, tensor.double().sum().item())
            )
    return state
