"""Gates on an input itself: against a second implementation, on planted evidence, at margins and with other methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attr_oracles import bilateral, draw_counts, draw_shares, draws_of, ground, measure_range, shut
from families import family_named
from torch import Tensor, nn

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, PatchLayout
from captum_m2ib.attr import ContrastiveInfoBottleneck, NarrowingInfoBottleneck
from captum_m2ib.engine.real_units import covered_elements
from captum_m2ib.engine.smoothing import blur
from captum_m2ib.engine.units import per_patch
from captum_m2ib.metrics.bypass import has_chosen_layers, measure_bypass, warn_of_bypass

FEW = {"n_steps": 3, "n_samples": 4}


def reader(*place, **options) -> Reader:
    return Reader(*place, **options).eval()


class Reader(nn.Module):
    """The mean of one channel over a rectangle, squashed."""

    def __init__(self, rows: slice, columns: slice, channel: int = 1) -> None:
        super().__init__()
        self.place, self.channel = (rows, columns), channel
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pixels: Tensor) -> Tensor:
        rows, columns = self.place
        return torch.tanh(self.scale * pixels[:, self.channel, rows, columns].mean((1, 2)))


def kernel(sigma: float, reach: int) -> Tensor:
    weights = torch.exp(-(torch.arange(-reach, reach + 1, dtype=torch.float64) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


def mirrored(maps: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur pixel by pixel: neighbours beyond the border are mirrored without repeating it."""
    reach = round(2 * sigma)
    weights = kernel(sigma, reach)
    for axis in (0, 1):
        length = maps.shape[axis]
        places = torch.arange(length)[:, None] + torch.arange(-reach, reach + 1)
        places = places.abs()
        places = torch.where(places >= length, 2 * (length - 1) - places, places)
        maps = (maps.movedim(axis, 0)[places] * weights.view(1, -1, 1)).sum(1).movedim(0, axis)
    return maps


def smoothing_of(picture: Tensor, sigma: float, colour: float | None) -> Callable[[Tensor], Tensor]:
    if not sigma:
        return lambda logits: logits
    if colour is None:
        return lambda logits: mirrored(logits, sigma)
    kernel = bilateral(picture, sigma, colour)
    return lambda logits: (kernel @ logits.flatten()).view_as(logits)


def second_implementation(
    score,
    pixels: Tensor,
    beta: float,
    variance: float,
    lr: float,
    start: float,
    smoothed: Callable[[Tensor], Tensor],
    n_steps: int,
    n_samples: int,
    noiseless: float,
) -> Tensor:
    """Bits per pixel of one picture, (h, w), in float64: one logit per pixel, divergences from torch.distributions."""
    center = pixels.mean((1, 2), keepdim=True)
    mean = ground(pixels).view(-1, 1, 1)
    std = (variance * (pixels - center).square().mean((1, 2), keepdim=True)).sqrt()
    logits = torch.full(pixels.shape[1:], math.log(start / (1 - start)), dtype=torch.float64, requires_grad=True)

    def through(gate: Tensor, eps: Tensor) -> Tensor:
        return score((gate * pixels + (1 - gate) * (mean + std * eps))[None])

    range_ = measure_range(
        score(pixels[None]).detach(),
        lambda gates, drawn: through(gates[0], drawn[0]),
        [0],
        [pixels.shape],
        [0],
        lambda field: smoothed(field[0])[None],
        count=4,
    )[0]

    def nats(gate: Tensor) -> Tensor:
        passed = torch.distributions.Normal(gate * pixels + (1 - gate) * mean, (1 - gate) * std)
        return torch.distributions.kl_divergence(passed, torch.distributions.Normal(mean, std))

    idle = logits.detach().clone().requires_grad_()
    adam, adrift = torch.optim.Adam([logits], lr=lr), torch.optim.Adam([idle], lr=lr)
    for step, draws in enumerate(draw_counts(n_steps, n_samples, noiseless)):
        gate = torch.sigmoid(smoothed(logits))
        drawn = draws_of(0, step, draws, pixels.shape, noiseless)
        values = [through(gate, eps)[0] for eps in drawn]
        kept = sum(share * value for share, value in zip(draw_shares(draws, noiseless), values, strict=True))
        adam.zero_grad()
        (beta * nats(gate).mean() - kept / range_).backward()
        adam.step()
        adrift.zero_grad()
        (beta * nats(torch.sigmoid(smoothed(idle))).mean()).backward()
        adrift.step()
    gate = shut(*(torch.sigmoid(smoothed(one)) for one in (logits, idle)))
    return nats(gate).sum(0).detach() / math.log(2)


@pytest.mark.parametrize(
    ("smoothing", "variance", "beta", "lr", "noiseless", "steps", "closes"),
    [(0.0, 0.25, 0.3, 0.2, 0.0, 3, False), (1 / 14, 0.25, 0.3, 0.2, 0.6, 5, False), (0.2, 1.0, 0.3, 0.2, 1.0, 3, False)]
    + [(smoothing, 0.25, 1.2, 1.5, 0.3, 3, True) for smoothing in (0.0, 1 / 14, 0.1)],
)
@pytest.mark.parametrize("colour", [None, 1.0, 0.4])
def test_equals_a_second_implementation(
    smoothing: float,
    colour: float | None,
    variance: float,
    beta: float,
    lr: float,
    noiseless: float,
    steps: int,
    closes: bool,
):
    torch.manual_seed(0)
    score = reader(slice(2, 9), slice(3, 10)).double()
    pixels = (torch.rand(2, 3, 16, 20, dtype=torch.float64) - 0.4) * torch.tensor([1.5, 3.0, 6.0]).view(3, 1, 1)
    # One picture lies on a ground, the other's values are spread.
    pixels[1, :, 6:] = torch.tensor([0.9, -0.2, 0.4], dtype=torch.float64).view(3, 1, 1)
    assert ground(pixels[1]).tolist() == pytest.approx([0.9, -0.2, 0.4])
    assert torch.equal(ground(pixels[0]), pixels[0].flatten(1).median(1).values)
    settings = {"beta": beta, "variance": variance, "lr": lr, "initial_gate": 0.6, "noiseless": noiseless}
    settings |= {"n_steps": steps, "n_samples": 4, "smoothing": smoothing, "smoothing_colour": colour}
    bits = MultiModalInfoBottleneck(score, [None]).attribute(pixels, **settings)
    for one, picture in zip(bits, pixels, strict=True):
        smoothed = smoothing_of(picture, 16 * smoothing, colour)
        expected = second_implementation(score, picture, beta, variance, lr, 0.6, smoothed, steps, 4, noiseless)
        torch.testing.assert_close(one.sum(0), expected, rtol=0, atol=1e-6 * float(expected.max()))
        for channel in one:
            torch.testing.assert_close(channel, one.mean(0))
        assert bool((one == 0).any()) == closes and torch.equal(one.sum(0) == 0, expected == 0)


def test_defaults_of_gated_inputs():
    score = reader(slice(2, 9), slice(3, 10))
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    method = MultiModalInfoBottleneck(score, [None])
    told = {"beta": 0.6, "variance": 0.25, "initial_gate": 0.8, "antithetic": True, "smoothing": 0.1}
    told |= {"smoothing_colour": 1.0, "noiseless": 0.7, "lr": 5 / 4}
    assert method.priors == ("pair",) and method.layers[0].name == "inputs[0]"
    assert torch.equal(method.attribute(pixels, **FEW), method.attribute(pixels, **FEW, **told))
    assert torch.equal(method.attribute(pixels), method.attribute(pixels, n_steps=4, n_samples=3, lr=1.25))
    assert torch.equal(method.attribute(pixels, n_steps=10), method.attribute(pixels, n_steps=10, lr=0.5))
    others: dict[str, Any] = {"beta": 0.7, "variance": 1.0, "lr": 0.2, "initial_gate": 0.5, "antithetic": False}
    others |= {"noiseless": 0.0, "smoothing": 1 / 14, "smoothing_colour": 0.9}
    for name, other in others.items():
        assert not torch.equal(method.attribute(pixels, **FEW), method.attribute(pixels, **FEW, **{name: other})), name
    assert not torch.equal(method.attribute(pixels, **FEW), method.attribute(pixels, **FEW, smoothing_colour=None))


def test_bits_lie_where_the_score_reads():
    score, place = reader(slice(4, 10), slice(18, 26)), torch.zeros(32, 32, dtype=torch.bool)
    place[4:10, 18:26] = True
    generator = torch.Generator().manual_seed(0)
    pixels = 0.3 * torch.randn(3, 3, 32, 32, generator=generator)
    pixels[:, 1] += 2.0 * place
    bits = MultiModalInfoBottleneck(score, [None]).attribute(pixels, n_steps=30, lr=0.5, beta=0.1).sum(1)
    assert bool((bits[:, place].sum(1) / bits.flatten(1).sum(1) > 0.9).all())
    assert bool(place.flatten()[bits.flatten(1).argmax(1)].all())


def test_a_picture_alone_in_a_batch_and_in_parts_is_the_same():
    case = family_named("clip").build().double()
    method = MultiModalInfoBottleneck(case.forward)
    assert method.layers[0].argument == 0 and method.layers[1].argument is None
    whole = case.attribute(method)
    parts = case.attribute(method, internal_batch_size=3)
    alone = case.select(slice(1, 2)).attribute(method)
    for index in (0, 1):
        torch.testing.assert_close(parts[index], whole[index], rtol=0, atol=1e-6 * float(whole[index].max()))
        torch.testing.assert_close(alone[index][0], whole[index][1], rtol=0, atol=1e-6 * float(whole[index].max()))
    _, record = method.attribute_with_record(case.inputs, additional_forward_args=case.additional, **FEW)
    bits, _ = case.attribute(method, **FEW)
    torch.testing.assert_close(record.modalities[0].bits, bits.flatten(1).sum(1))
    torch.testing.assert_close(record.modalities[0].units, bits.sum(1))


def test_what_no_patch_covers_carries_nothing():
    torch.manual_seed(0)
    score = reader(slice(0, 8), slice(0, 12))
    pixels = torch.randn(2, 3, 10, 15)
    layout = PatchLayout((4, 4))
    bits = MultiModalInfoBottleneck(score, [None], [layout]).attribute(pixels, lr=0.2, **FEW)
    assert not bits[:, :, 8:].any() and not bits[:, :, :, 12:].any() and bool((bits[:, :, :8, :12] > 0).all())
    covered = covered_elements(layout, pixels)
    assert covered is not None and covered.expand(1, 1, 10, 15).sum() == 8 * 12
    assert covered_elements(layout, pixels[:, :, :8, :12]) is None
    assert covered_elements(PatchLayout((4, 4), size=(8, 8)), pixels) is None
    assert covered_elements(None, pixels) is None


def test_maps_summed_over_patches():
    pixels = torch.rand(2, 10, 15, dtype=torch.float64)
    pixels[:, 8:], pixels[:, :, 12:] = 0, 0
    found = per_patch(PatchLayout((4, 4)), pixels)
    assert found.shape == (2, 2, 3)
    torch.testing.assert_close(found[0, 1, 2], pixels[0, 4:8, 8:12].sum())
    coarse = per_patch(PatchLayout((4, 4), coarser=(1, 2, 4, 8)), torch.ones(1, 64, 64))
    assert coarse.shape == (1, 4, 4) and bool((coarse == 256).all())
    resized = per_patch(PatchLayout((4, 4), size=(12, 12)), torch.rand(1, 20, 20))
    assert resized.shape == (1, 3, 3)
    assert not per_patch(PatchLayout((4, 4)), torch.zeros(1, 8, 8)).any()


def test_blur_mirrors_at_the_border():
    maps = torch.rand(2, 3, 9, 7, dtype=torch.float64)
    for sigma in (0.4, 1.0, 1.4):
        found = blur(maps, sigma)
        torch.testing.assert_close(found[1, 2], mirrored(maps[1, 2], sigma))


def test_a_constant_picture_and_one_channel():
    score = reader(slice(0, 8), slice(0, 8), channel=0)
    bits = MultiModalInfoBottleneck(score, [None]).attribute(torch.ones(2, 1, 8, 8), lr=0.2, **FEW)
    assert bool(bits.isfinite().all()) and bool((bits > 0).all())


class Vectors(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return F.cosine_similarity(first.flatten(1), second.flatten(1))


def test_inputs_of_other_shapes_have_gates_of_their_own():
    first, second = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).unsqueeze(0).unbind(1)
    method = MultiModalInfoBottleneck(Vectors().eval(), [None, None], statistics=[None, None])
    for bits in method.attribute((first, second), **FEW):
        assert bits.shape == (1, 5) and len(bits.unique()) == 5


def test_two_pictures_may_both_be_gated():
    pixels = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    method = MultiModalInfoBottleneck(Vectors().eval(), [None, None])
    one, other = method.attribute((pixels[0], pixels[1]), **FEW)
    joint = method.attribute((pixels[0], pixels[1]), joint=True, **FEW)
    assert one.shape == other.shape == (2, 3, 8, 8) and not torch.equal(joint[0], one)


def test_captions_cannot_be_gated_themselves():
    case = family_named("clip").build()
    method = MultiModalInfoBottleneck(case.forward, [None, None])
    with pytest.raises(ValueError, match=r"layers: inputs\[1\] holds token ids, which cannot be mixed with noise"):
        case.attribute(method)


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, float("nan"), "wide"])
def test_smoothing_out_of_range(smoothing):
    case = family_named("clip").build()
    with pytest.raises(ValueError, match="smoothing: expected a share of the picture's shorter side"):
        case.attribute(MultiModalInfoBottleneck(case.forward), smoothing=smoothing)


@pytest.mark.parametrize("colour", [0, 0.0, -1.0, float("nan"), float("inf"), "wide", True, False, (1.0, 1.0)])
def test_colours_out_of_range(colour):
    case = family_named("clip").build()
    with pytest.raises(ValueError, match="smoothing_colour: expected a finite number above 0") as raised:
        case.attribute(MultiModalInfoBottleneck(case.forward), smoothing_colour=colour)
    assert f"got {colour!r}" in str(raised.value) and "None for gates that are smoothed whatever" in str(raised.value)


def test_colours_are_no_matter_where_nothing_is_smoothed():
    case = family_named("clip").build()
    method = MultiModalInfoBottleneck(case.forward)
    maps = [case.attribute(method, smoothing=0.0, smoothing_colour=colour, **FEW)[0] for colour in (None, 1, 0.2)]
    assert torch.equal(maps[0], maps[1]) and torch.equal(maps[0], maps[2])
    # Whole numbers are numbers.
    one, other = (case.attribute(method, smoothing_colour=colour, **FEW) for colour in (1, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_rivals_of_a_picture_are_gated_at_the_picture_too():
    pixels = torch.randn(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    method = ContrastiveInfoBottleneck(Vectors().eval(), [None, None])
    assert [layer.argument for layer in method.layers] == [0, 1, 2]
    maps = method.attribute(tuple(pixels), **FEW)
    assert all(bits.shape == (2, 3, 8, 8) and bool((bits > 0).any()) for bits in maps)


def test_narrowing_at_the_input_is_integrated_gradients_from_zero():
    case = family_named("clip").build().double()
    model = case.roots[0]
    method = NarrowingInfoBottleneck(case.forward, [None, model.text_model.encoder.layers[0]])
    image, _ = method.attribute(case.inputs, additional_forward_args=case.additional, n_steps=8)
    from captum.attr import IntegratedGradients

    pixels, ids = case.inputs
    expected = IntegratedGradients(case.forward).attribute(
        pixels, additional_forward_args=(ids, *case.additional), n_steps=8, method="riemann_right"
    )
    torch.testing.assert_close(image.sum(1), expected.sum(1))


def test_nothing_goes_round_the_pixels():
    case = family_named("clip").build()
    image, _ = measure_bypass(case.forward, case.inputs, case.additional, layers=[None, "text_model.embeddings"])
    assert image.layers == ("inputs[0]",) and image.choices == (None,)
    assert not image.kept.any() and float(image.share.abs().max()) < 1e-6


def test_no_warning_of_the_default(recwarn):
    case = family_named("clip").build()
    method = MultiModalInfoBottleneck(case.forward)
    assert not has_chosen_layers(method)
    assert has_chosen_layers(MultiModalInfoBottleneck(case.forward, [None, "text_model.encoder.layers.2"]))
    warn_of_bypass(method, case.inputs, case.additional)
    assert not recwarn.list


def test_the_model_is_left_as_found_and_needs_no_gradient_of_its_own():
    case = family_named("clip").build()
    encoder: DualEncoder = case.forward
    before = [parameter.clone() for parameter in encoder.parameters()]
    with torch.inference_mode():
        case.attribute(MultiModalInfoBottleneck(encoder))
    assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in encoder.parameters())
