"""Contract 4: the prefix and the other tower run once, a step runs the suffix only, parameters get no gradient."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from families import Block, Case, Family, family_named
from tiny_parts import LEGACY
from torch import nn

from captum_m2ib import MultiModalInfoBottleneck
from captum_m2ib.benchmark.meters import count_flops
from captum_m2ib.engine.stakes import CLOSED_DRAWS, HALVES

CLOSED = CLOSED_DRAWS + HALVES
"""Draws with closed gates, without gradients, by which the score's range is measured."""


def expected_flops(case: Case, suffixes, n_steps: int, n_samples: int) -> int:
    """One pass over the pairs and a copy, one that the first rerun is held against, and per modality what follows the
    layer: closed, and each step, and once more for the second modality, which is held against that."""
    pairs = len(case.inputs[0])
    planted = [torch.cat([a, a[:1]]) for a in (*case.inputs, *case.additional)]
    for root in case.roots:
        root.requires_grad_(False)
    total = count_flops(lambda: case.forward(*planted))

    def mask(draws: int):
        return case.additional[0].repeat_interleave(draws, 0) if case.additional else None

    for suffix, shape in suffixes:
        hidden = torch.randn(pairs * n_samples, *shape, requires_grad=True)
        step = count_flops(
            lambda suffix=suffix, hidden=hidden: torch.autograd.grad(
                suffix(hidden * 1.0, mask(n_samples)).sum(), hidden
            )
        )
        closed = count_flops(
            lambda suffix=suffix, shape=shape: suffix(torch.randn(pairs * CLOSED, *shape), mask(CLOSED))
        )
        total += n_steps * step + closed
    return total + count_flops(lambda: case.forward(*case.inputs, *case.additional))


def tower_suffix(tower, after: int, masked: bool):
    """What a tower does after one of its blocks."""

    def run(hidden, mask):
        mask = mask if masked else None
        for block in tower.blocks[after + 1 :]:
            hidden = block(hidden, mask)
        return tower.head(tower.norm(hidden).mean(1))

    return run


def clip_suffix(model, after: int, image: bool):
    side = model.vision_model if image else model.text_model
    project = model.visual_projection if image else model.text_projection

    def run(hidden, mask):
        for layer in side.encoder.layers[after + 1 :]:
            wanted = None if image else mask[:, None, None, :].bool().expand(-1, 1, hidden.shape[1], -1)
            # transformers 4 wants the causal mask apart, and returns a tuple.
            output = layer(hidden, attention_mask=wanted, causal_attention_mask=None)
            hidden = output[0] if isinstance(output, tuple) else output
        pooled = side.post_layernorm(hidden[:, 0]) if image else side.final_layer_norm(hidden)[:, -1]
        return project(pooled)

    return run


def left_out_of_clip(side, positions: int, pairs: int, n_steps: int, n_samples: int) -> int:
    """What the last block's linear layers do at so many positions that no pair pools, in steps and while closed."""
    last = side.encoder.layers[-1]
    narrowed = (last.self_attn.q_proj, last.self_attn.out_proj, last.mlp.fc1, last.mlp.fc2)
    forwards = 2 * sum(layer.weight.numel() for layer in narrowed) * positions
    return forwards * pairs * (2 * n_steps * n_samples + CLOSED)


@pytest.mark.parametrize("after", [0, 1])
def test_work_of_towers(after: int):
    case = family_named("closure").build()
    image, text = case.roots
    expected = expected_flops(
        case, [(tower_suffix(image, after, False), (17, 16)), (tower_suffix(text, after, True), (6, 16))], 10, 5
    )
    method = MultiModalInfoBottleneck(case.forward, [image.blocks[after], text.blocks[after]], case.layouts)
    counted = count_flops(lambda: case.attribute(method, n_steps=10, n_samples=5))
    assert 0.9 * expected <= counted <= 1.1 * expected


@pytest.mark.skipif(LEGACY, reason="in CLIP of this transformers nothing is left out")
@pytest.mark.parametrize("after", [0, 2])
def test_work_of_clip(after: int):
    case = family_named("clip").build()
    model = case.roots[0]
    expected = expected_flops(
        case, [(clip_suffix(model, after, True), (17, 32)), (clip_suffix(model, after, False), (6, 32))], 8, 4
    )
    ends = case.additional[0].sum(1).unique()
    for side, positions in ((model.vision_model, 16), (model.text_model, 6 - len(ends))):
        expected -= left_out_of_clip(side, positions, len(case.inputs[0]), 8, 4)
    layers = [model.vision_model.encoder.layers[after], model.text_model.encoder.layers[after]]
    method = MultiModalInfoBottleneck(case.forward, layers)
    counted = count_flops(lambda: case.attribute(method, n_steps=8, n_samples=4))
    assert 0.9 * expected <= counted <= 1.1 * expected


def leaves_of(module: nn.Module) -> list[nn.Module]:
    """The modules that do the work; one that hands on a part of what it receives is called for that."""
    return [one for one in module.modules() if not any(True for _ in one.children())]


def test_work_grows_with_the_suffix_only(family: Family):
    case = family.build()
    if case.training:
        case.forward.eval()
    calls: Counter[nn.Module] = Counter()
    handles = [
        module.register_forward_hook(lambda module, *_: calls.update([module]))
        for root in case.roots
        for module in root.modules()
    ]
    counts = []
    for n_steps in (1, 4):
        calls.clear()
        case.attribute(n_steps=n_steps, n_samples=2)
        counts.append(dict(calls))
    for handle in handles:
        handle.remove()
    few, many = counts
    finished = list(many)
    tapped = [choices[0][0] if isinstance(choices[0], tuple) else choices[0] for choices in case.layers]
    if isinstance(case.layers[1][0], tuple) and tapped[0] is not tapped[1]:
        # What a caption's tokens are taken at reads the picture, too, behind the picture's own layer.
        del tapped[1]
    grown = {module for module in many if many[module] > few.get(module, 0)}
    tapped = [case.roots[0].get_submodule(layer) if isinstance(layer, str) else layer for layer in tapped]
    for layer in tapped:
        within = set(layer.modules())
        assert not grown & within, f"{[type(m).__name__ for m in grown & within]} ran again"
    for root in case.roots:
        names = {module: name for name, module in root.named_modules()}
        for name, module in root.named_modules():
            above, _, last = name.rpartition(".")
            # Late interaction embeds its outputs, and what it has embedded is normed once more in its language model.
            embeds = last in ("embed_tokens", "tok_embeddings") if "late" in family.features else "embed" in last
            # What holds a tapped layer, or finishes after one of its own tower, runs again by right.
            beside = [layer for layer in tapped if above and names.get(layer, "").startswith(f"{above}.")]
            is_after = any(layer in set(module.modules()) for layer in tapped) or any(
                finished.index(layer) < finished.index(module) for layer in beside if module in many
            )
            if (embeds or name == "stem") and (not is_after or module in tapped):
                assert not grown & set(leaves_of(module)), f"{name} ran again"
    assert grown


def test_order_of_the_towers_does_not_matter():
    case = family_named("closure").build()
    image, text = case.roots
    calls: Counter[nn.Module] = Counter()

    def score(picture, ids, mask):
        words = text(ids, mask)
        return F.cosine_similarity(image(picture), words)

    for root in case.roots:
        for module in root.modules():
            module.register_forward_hook(lambda module, *_: calls.update([module]))
    method = MultiModalInfoBottleneck(score, [image.blocks[1], text.blocks[1]], case.layouts)
    case.attribute(method, n_steps=6)
    # Recorded, and for each modality held against the whole once, where the first tower need not run again.
    assert calls[image.embed] == calls[image.blocks[0]] == 1 + 2
    assert calls[text.embed] == calls[text.blocks[1]] == 1 + 2
    # Besides, all draws with closed gates at once, and six steps.
    assert calls[image.blocks[2]] == calls[text.blocks[2]] == 1 + 2 + 1 + 6


def test_only_the_explained_modality_runs():
    case = family_named("clip").build()
    pixels, ids = case.inputs
    calls: Counter[nn.Module] = Counter()
    # Made once, for any number of calls: what embeds tokens is found by a pass of its own.
    method = case.method()
    for module in case.roots[0].modules():
        module.register_forward_hook(lambda module, *_: calls.update([module]))
    method.attribute(pixels, additional_forward_args=(ids, *case.additional), n_steps=5, n_samples=2)
    assert max(calls[module] for module in case.roots[0].text_model.modules()) == 1 + 1
    assert calls[case.roots[0].vision_model.encoder.layers[3]] == 1 + 1 + 1 + 5


@pytest.mark.parametrize("name", ["closure", "conv_maps"])
def test_parameters_receive_no_gradient(name: str):
    case = family_named(name).build()
    for root in case.roots:
        root.requires_grad_(True)
    case.attribute()
    assert all(parameter.grad is None for root in case.roots for parameter in root.parameters())


def test_gradients_that_are_there_stay():
    case = family_named("clip").build()
    case.forward(*case.inputs, *case.additional).sum().backward()
    before = {name: p.grad.clone() for name, p in case.roots[0].named_parameters() if p.grad is not None}
    assert before
    case.attribute()
    for name, parameter in case.roots[0].named_parameters():
        assert (parameter.grad is None) == (name not in before)
        assert parameter.grad is None or torch.equal(parameter.grad, before[name])


def test_a_part_used_by_both_sides_of_the_layer():
    torch.manual_seed(0)
    shared, block = Block(8).eval(), Block(8).eval()

    def score(tokens):
        return shared(block(shared(tokens))).flatten(1).sum(1)

    calls: Counter[nn.Module] = Counter()
    for module in (shared, block):
        module.register_forward_hook(lambda module, *_: calls.update([module]))
    MultiModalInfoBottleneck(score, [block]).attribute(torch.randn(2, 3, 8), n_steps=5, n_samples=2)
    assert calls[block] == 1 + 1 and calls[shared] == 2 + 2 + 1 + 5
