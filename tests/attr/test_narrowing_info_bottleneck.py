"""NIB against Captum's integrated gradients from a hidden state of zeros, and its completeness."""

from __future__ import annotations

import pytest
import torch
from attr_oracles import clip_case
from captum.attr import IntegratedGradients, LayerIntegratedGradients
from families import Case
from torch import Tensor, nn

from captum_m2ib import PatchLayout
from captum_m2ib.attr.narrowing_info_bottleneck import NarrowingInfoBottleneck
from captum_m2ib.engine.layers import tensors_in
from captum_m2ib.engine.units import to_units

PLACES = [(0, 1, True), (0, 2, True), (0, 2, False), (1, 1, True), (1, 2, True), (1, 2, False)]


def tower(case: Case, modality: int) -> nn.Module:
    return (case.roots[0].vision_model, case.roots[0].text_model)[modality]


def suffix_of(case: Case, block: nn.Module, at_input: bool):
    """The score as a function of the hidden state at a block, by torch's own hooks, and that hidden state."""
    kept: list[Tensor] = []

    def score(hidden: Tensor, *rest: Tensor) -> Tensor:
        if at_input:
            handle = block.register_forward_pre_hook(lambda m, args: (hidden, *args[1:]))
        else:
            handle = block.register_forward_hook(
                lambda m, args, output: (hidden, *output[1:]) if isinstance(output, tuple) else hidden
            )
        try:
            return case.forward(*rest)
        finally:
            handle.remove()

    keep = block.register_forward_pre_hook if at_input else block.register_forward_hook
    handle = keep(lambda m, args, *output: kept.append(tensors_in(output or args)[0].detach()))
    case.forward(*case.inputs, *case.additional)
    handle.remove()
    return score, kept[0]


def units_of(case: Case, elements: Tensor, modality: int) -> Tensor:
    if modality:
        return elements.sum(-1) * case.additional[0]
    return elements[:, 1:].sum(-1).unflatten(1, (4, 4))


@pytest.mark.parametrize("n_steps", [2, 10])
@pytest.mark.parametrize(("modality", "block", "at_input"), PLACES)
def test_equals_captums_integrated_gradients(modality: int, block: int, at_input: bool, n_steps: int):
    case = clip_case()
    layers = [tower(case, index).encoder.layers[block] for index in (0, 1)]
    score, hidden = suffix_of(case, layers[modality], at_input)
    expected = IntegratedGradients(score).attribute(
        hidden,
        baselines=0,
        additional_forward_args=(*case.inputs, *case.additional),
        n_steps=n_steps,
        method="riemann_right",
    )
    expected = units_of(case, expected, modality)
    found = NarrowingInfoBottleneck(case.forward, layers).attribute(
        case.inputs, additional_forward_args=case.additional, n_steps=n_steps, attribute_to_layer_input=at_input
    )[modality]
    # Captum holds the steps of the integral in float32. Resizing keeps the sums of what is for and what is against.
    close = {"rtol": 0, "atol": 1e-6 * float(expected.abs().max())}
    if modality:
        torch.testing.assert_close(found, expected, **close)
    positive, negative = found.clamp(min=0).flatten(1).sum(1), found.clamp(max=0).flatten(1).sum(1)
    assert bool((positive <= expected.clamp(min=0).flatten(1).sum(1) * 1.0001).all())
    assert bool((negative >= expected.clamp(max=0).flatten(1).sum(1) * 1.0001).all())
    torch.testing.assert_close(found.flatten(1).sum(1), expected.flatten(1).sum(1), **close)
    assert float(found.min()) < 0 < float(found.max())


class Tokens(nn.Module):
    """A tower whose first layer receives the hidden state as the model's input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.last = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 1))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.last(self.first(hidden).square().mean(1)).squeeze(1)


def test_equals_captums_layer_integrated_gradients():
    model = Tokens().double().eval()
    hidden = torch.randn(4, 5, 6, dtype=torch.float64)
    expected = LayerIntegratedGradients(model, model.first).attribute(
        hidden, baselines=0, n_steps=7, method="riemann_right", attribute_to_layer_input=True
    )
    expected = expected[0] if isinstance(expected, tuple) else expected
    found = NarrowingInfoBottleneck(model, [model.first]).attribute(hidden, n_steps=7)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_completeness_improves_with_the_steps():
    model = Tokens().double().eval()
    hidden = torch.randn(4, 5, 6, dtype=torch.float64)
    difference = (model(hidden) - model(torch.zeros_like(hidden))).detach()
    errors = []
    for n_steps in (10, 100, 1000):
        total = NarrowingInfoBottleneck(model, [model.first]).attribute(hidden, n_steps=n_steps).flatten(1).sum(1)
        errors.append(float((total - difference).abs().max()))
    # A right Riemann sum errs by O(1 / n_steps).
    assert errors[0] > 5 * errors[1] > 25 * errors[2] > 0 and errors[2] < 1e-2 * float(difference.abs().max())


def test_default_is_the_input_of_the_block_at_three_quarters():
    case = clip_case()
    layers = [tower(case, index).encoder.layers[2] for index in (0, 1)]
    settings = {"additional_forward_args": case.additional, "attribute_to_layer_input": True}
    expected = NarrowingInfoBottleneck(case.forward, layers).attribute(case.inputs, **settings)
    found = NarrowingInfoBottleneck(case.forward).attribute(case.inputs, additional_forward_args=case.additional)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


class Signed(nn.Module):
    """A score that is a signed sum over the patches of a picture of one channel."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.cut = nn.Conv2d(1, 1, 4, 4, bias=False)
        nn.init.constant_(self.cut.weight, 1 / 16)
        self.register_buffer("weight", weight)

    def forward(self, pictures: Tensor) -> Tensor:
        return (self.cut(pictures) * self.weight).sum((1, 2, 3))


def test_signed_evidence_of_a_linear_score_is_exact_and_in_its_place():
    weight = torch.zeros(2, 3)
    weight[0, 2], weight[1, 0] = 2.0, -3.0
    model = Signed(weight).eval()
    layout = PatchLayout((4, 4))
    pictures = torch.ones(2, 1, 8, 12)
    pictures[1] *= 2
    found = NarrowingInfoBottleneck(model, [model.cut], [layout]).attribute(
        pictures, n_steps=3, attribute_to_layer_input=False
    )
    per_patch = to_units(layout, torch.nn.functional.avg_pool2d(found, 4), torch.ones(2, 1, 8, 12))
    assert per_patch[0].argmax() == 2 and per_patch[0].argmin() == 3
    torch.testing.assert_close(found.clamp(min=0).sum((1, 2, 3)) + found.clamp(max=0).sum((1, 2, 3)), model(pictures))
    assert torch.allclose(found[1], 2 * found[0])


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_rows_at_once_change_nothing(rows: int):
    case = clip_case()
    expected = NarrowingInfoBottleneck(case.forward).attribute(case.inputs, additional_forward_args=case.additional)
    found = NarrowingInfoBottleneck(case.forward).attribute(
        case.inputs, additional_forward_args=case.additional, internal_batch_size=rows
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_steps", [0, -1, 2.5, True])
def test_steps_are_checked(n_steps):
    case = clip_case()
    with pytest.raises(ValueError, match="n_steps: expected a whole number of at least 1"):
        NarrowingInfoBottleneck(case.forward).attribute(
            case.inputs, additional_forward_args=case.additional, n_steps=n_steps
        )
