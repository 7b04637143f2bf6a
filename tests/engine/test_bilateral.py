"""The bilateral filter of low rank: against its formula pixel by pixel, against the exact kernel, and what it keeps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from captum_m2ib import MultiModalInfoBottleneck, PatchLayout
from captum_m2ib.engine.bilateral import COLOURS, Bilateral
from captum_m2ib.engine.smoothing import COLOUR, SHARE, blur, over_neighbours

PALETTE = torch.tensor([[0.1, 0.9, 0.3], [0.8, 0.2, 0.4], [0.5, 0.5, 0.9]], dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def painted(high: int, wide: int, palette: Tensor = PALETTE, seed: int = 0) -> Tensor:
    """A picture whose pixels have colours of a palette, at random, (1, C, h, w)."""
    which = torch.randint(len(palette), (high, wide), generator=torch.Generator().manual_seed(seed))
    which.view(-1)[: len(palette)] = torch.arange(len(palette))
    return palette[which].permute(2, 0, 1).unsqueeze(0)


def shaded(side: int, seed: int = 0) -> Tensor:
    """A picture without edges, (1, 3, side, side)."""
    return blur(uniform(1, 3, side, side, seed=seed), side / 6)


def places_in_common(count: int, sigma: float) -> list[list[float]]:
    """What two places on an axis have in common, cell by cell of a grid at most ``sigma / sqrt(2)`` wide."""
    last = count - 1
    cells = min(max(1, math.ceil(last * math.sqrt(2) / sigma)), max(1, 2 * last))
    grid = [last * cell / cells for cell in range(cells + 1)]
    return [
        [
            sum(math.exp(-((x - cell) ** 2) / sigma**2 - (y - cell) ** 2 / sigma**2) for cell in grid)
            for y in range(count)
        ]
        for x in range(count)
    ]


def by_formula(picture: Tensor, palette: Tensor, sigma: float, colour: float) -> Tensor:
    """The dense kernel, (pixels, pixels), of a picture, (C, h, w), that is painted with a palette, (colours, C)."""
    high, wide = picture.shape[1:]
    pixels = picture.flatten(1).T.tolist()
    palette_ = palette.tolist()
    means = [sum(channel) / len(pixels) for channel in zip(*pixels, strict=True)]
    stds = [
        math.sqrt(sum((value - mean) ** 2 for value in channel) / len(pixels))
        for channel, mean in zip(zip(*pixels, strict=True), means, strict=True)
    ]
    shares = []
    for pixel in pixels:
        distances = [
            sum(((a - b) / std) ** 2 for a, b, std in zip(pixel, other, stds, strict=True)) / len(stds)
            for other in palette_
        ]
        likeness = [math.exp(-distance / colour**2) for distance in distances]
        shares.append([one / sum(likeness) for one in likeness])
    down, across = places_in_common(high, sigma), places_in_common(wide, sigma)
    kernel = torch.empty(len(pixels), len(pixels), dtype=torch.float64)
    for one in range(len(pixels)):
        for other in range(len(pixels)):
            alike = sum(a * b for a, b in zip(shares[one], shares[other], strict=True))
            near = down[one // wide][other // wide] * across[one % wide][other % wide]
            kernel[one, other] = near * alike
    return kernel / kernel.sum(1, keepdim=True)


def exact(picture: Tensor, sigma: float, colour: float) -> Tensor:
    """The kernel that low rank stands for, (pixels, pixels), of a picture, (C, h, w)."""
    high, wide = picture.shape[1:]
    places = torch.cartesian_prod(torch.arange(high).double(), torch.arange(wide).double())
    pixels = (picture / picture.std((1, 2), correction=0, keepdim=True)).flatten(1).T
    far = (places.unsqueeze(1) - places).square().sum(2) / (2 * sigma**2)
    unlike = (pixels.unsqueeze(1) - pixels).square().mean(2) / (2 * colour**2)
    kernel = torch.exp(-far - unlike)
    return kernel / kernel.sum(1, keepdim=True)


def only_places(high: int, wide: int, sigma: float) -> Tensor:
    down, across = (torch.tensor(places_in_common(n, sigma), dtype=torch.float64) for n in (high, wide))
    kernel = torch.kron(down, across)
    return kernel / kernel.sum(1, keepdim=True)


def matrix_of(found: Bilateral, high: int, wide: int) -> Tensor:
    """What a filter of one picture does, (pixels, pixels), told by what it makes of each pixel alone."""
    ones = torch.eye(high * wide, dtype=torch.float64)
    return torch.stack([found(one.view(1, 1, high, wide)).flatten() for one in ones], 1)


def correlation(one: Tensor, other: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])


@pytest.mark.parametrize(("high", "wide", "sigma", "colour"), [(5, 7, 1.0, 1.0), (4, 4, 0.3, 0.5), (3, 8, 2.0, 2.0)])
def test_equals_the_formula_pixel_by_pixel(high: int, wide: int, sigma: float, colour: float):
    picture = painted(high, wide)
    found = matrix_of(Bilateral(picture, sigma, colour), high, wide)
    torch.testing.assert_close(found, by_formula(picture[0], PALETTE, sigma, colour), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 6])
def test_equals_the_formula_whatever_the_channels(channels: int):
    palette = uniform(4, channels, seed=3)
    picture = painted(5, 5, palette)
    found = matrix_of(Bilateral(picture, 1.5, 1.0), 5, 5)
    torch.testing.assert_close(found, by_formula(picture[0], palette, 1.5, 1.0), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("colour", [0.5, 0.7])
def test_near_the_exact_kernel_where_colours_change_slowly(colour: float):
    for seed in range(3):
        picture, values = shaded(24, seed), blur(uniform(1, 1, 24, 24, seed=seed + 10), 2.0)
        found = Bilateral(picture, 2.4, colour)(values)
        expected = exact(picture[0], 2.4, colour) @ values.flatten()
        assert correlation(found, expected) > 0.98
        # Places alone come near on such pictures, but not as near.
        assert correlation(found, expected) > correlation(only_places(24, 24, 2.4) @ values.flatten(), expected)


def test_values_that_are_all_the_same_stay():
    found = Bilateral(uniform(2, 3, 17, 23), 2.0, 1.0)
    for value in (0.0, 1.3862943611198906, -30.0, 1e6):
        same = torch.full((2, 1, 17, 23), value, dtype=torch.float64)
        torch.testing.assert_close(found(same), same, rtol=1e-12, atol=0)


def test_values_stay_between_the_least_and_the_greatest():
    values = uniform(3, 1, 16, 16) * 20 - 10
    found = Bilateral(uniform(3, 3, 16, 16, seed=1), 1.6, 0.5)(values)
    for one, given in zip(found, values, strict=True):
        assert float(given.min()) < float(one.min()) < float(one.max()) < float(given.max())


def test_linear():
    found = Bilateral(uniform(1, 3, 12, 12), 1.2, 1.0)
    one, other = uniform(2, 1, 1, 12, 12, seed=2)
    torch.testing.assert_close(found(3 * one - 2 * other), 3 * found(one) - 2 * found(other), rtol=0, atol=1e-12)


def test_every_pixel_counts_most_for_itself_and_none_counts_for_less_than_nothing():
    kernel = matrix_of(Bilateral(uniform(1, 3, 6, 9), 0.9, 0.5), 6, 9)
    assert bool((kernel >= 0).all())
    torch.testing.assert_close(kernel.sum(1), torch.ones(54, dtype=torch.float64))
    assert bool((kernel.argmax(1) == torch.arange(54)).all())


def test_two_halves_do_not_mix():
    picture = torch.zeros(1, 3, 10, 12, dtype=torch.float64)
    picture[..., 6:] = torch.tensor([0.4, 0.7, 1.0]).view(3, 1, 1)
    left = torch.zeros(1, 1, 10, 12, dtype=torch.float64)
    left[..., :6] = 1
    torch.testing.assert_close(Bilateral(picture, 2.0, 0.5)(left), left, rtol=0, atol=1e-6)
    # In units of the default colours are nearer, and still nine tenths stay on their side at the very border.
    near = Bilateral(picture, 2.0, COLOUR)(left)
    assert float((near - left).abs().max()) < 0.1
    mixed = (only_places(10, 12, 2.0) @ left.flatten()).view(10, 12)
    assert float((mixed - left[0, 0]).abs().max()) > 0.35


def test_halves_mix_alike_wherever_the_first_pixel_lies():
    """A mirrored drawing has the mirrored filter, though colours are told apart in the order of its pixels."""
    picture = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    picture[..., 3:] = 1.0
    values = uniform(1, 1, 8, 8)
    found = Bilateral(picture, 2.0, 1.0)(values)
    for axes in ((3,), (2,), (2, 3)):
        torch.testing.assert_close(Bilateral(picture.flip(axes), 2.0, 1.0)(values.flip(axes)).flip(axes), found)
    torch.testing.assert_close(Bilateral(1 - picture, 2.0, 1.0)(values), found)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.7, 1e-30, 1e4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_picture_of_one_colour_tells_places_only(value: float, dtype: torch.dtype):
    picture = torch.full((1, 3, 7, 9), value, dtype=dtype)
    picture[:, 1] *= 0.3
    values = uniform(1, 1, 7, 9)
    found = Bilateral(picture, 1.4, 1.0)(values)
    expected = (only_places(7, 9, 1.4) @ values.flatten()).view(1, 1, 7, 9)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("sigma", [0.2, 0.7, 1.5, 4.0])
def test_places_only_are_a_gaussian(sigma: float):
    """Away from the border a pixel takes of others as a Gaussian says, however wide cells are."""
    kernel = matrix_of(Bilateral(torch.ones(1, 1, 1, 41), sigma, 1.0), 1, 41)[20]
    expected = torch.exp(-(torch.arange(41, dtype=torch.float64) - 20).square() / (2 * sigma**2))
    torch.testing.assert_close(kernel, expected / expected.sum(), rtol=0, atol=0.002)


def test_contrast_and_offset_do_not_matter():
    picture, values = uniform(2, 3, 14, 10), uniform(2, 1, 14, 10, seed=1)
    found = Bilateral(picture, 1.4, 1.0)(values)
    for factor, offset in ((255.0, 0.0), (1e-3, 5.0), (2.0, -1.0), (-1.0, 1.0)):
        torch.testing.assert_close(Bilateral(picture * factor + offset, 1.4, 1.0)(values), found, rtol=0, atol=1e-9)


def test_units_of_channels_do_not_matter():
    """Models take channels in units of their own, and a picture is the same in any."""
    picture, values = uniform(2, 3, 14, 10), uniform(2, 1, 14, 10, seed=1)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.48, 0.46, 0.41], [0.9, 0.26, 3.0]))
    found = Bilateral((picture - mean) / std, 1.4, 1.0)(values)
    torch.testing.assert_close(found, Bilateral(picture, 1.4, 1.0)(values), rtol=0, atol=1e-9)


def test_the_order_of_channels_does_not_matter():
    picture, values = uniform(1, 3, 14, 10), uniform(1, 1, 14, 10, seed=1)
    found = Bilateral(picture[:, [2, 0, 1]], 1.4, 1.0)(values)
    torch.testing.assert_close(found, Bilateral(picture, 1.4, 1.0)(values), rtol=0, atol=1e-12)


def test_pictures_of_a_batch_are_each_for_themselves():
    pictures, values = uniform(4, 3, 20, 16), uniform(4, 1, 20, 16, seed=1)
    pictures[1] = pictures[1] * 1000
    pictures[2] = 0.5
    whole = Bilateral(pictures, 1.6, 1.0)(values)
    for one in range(4):
        alone = Bilateral(pictures[one : one + 1], 1.6, 1.0)(values[one : one + 1])
        assert torch.equal(alone[0], whole[one])
    turned = Bilateral(pictures.flip(0), 1.6, 1.0)(values.flip(0))
    assert torch.equal(turned.flip(0), whole)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (2, 1), (3, 40), (40, 3), (1, 300)])
def test_pictures_of_any_size(size: tuple[int, int]):
    picture, values = uniform(2, 3, *size), uniform(2, 1, *size, seed=1)
    share = over_neighbours(SHARE, COLOUR, picture, picture, None)
    assert share is not None
    found = share(values)
    assert found.shape == values.shape and bool(found.isfinite().all())
    assert float(found.min()) >= float(values.min()) - 1e-12 and float(found.max()) <= float(values.max()) + 1e-12
    same = torch.full_like(values, 1.5)
    torch.testing.assert_close(share(same), same, rtol=1e-12, atol=0)


def test_fewer_pixels_than_colours():
    picture = uniform(1, 3, 2, 3)
    assert picture[0, 0].numel() < COLOURS
    palette = picture[0].flatten(1).T
    found = matrix_of(Bilateral(picture, 0.8, 1.0), 2, 3)
    torch.testing.assert_close(found, by_formula(picture[0], palette, 0.8, 1.0), rtol=1e-10, atol=1e-12)


def test_a_share_next_to_nothing_changes_nothing_and_costs_nothing():
    """There are no more cells than a grid of half pixels has, however near to nothing sigma is."""
    picture, values = uniform(1, 3, 64, 64), uniform(1, 1, 64, 64, seed=1)
    found = Bilateral(picture, 1e-7, 1.0)
    assert found._down.shape == (64, 127)
    torch.testing.assert_close(found(values), values, rtol=0, atol=1e-12)
    torch.testing.assert_close(Bilateral(picture, 0.25, 1.0)(values), values, rtol=0, atol=2e-3)


@pytest.mark.parametrize("side", [128, 224, 256, 336, 512])
def test_an_object_keeps_its_gates_wherever_it_lies(side: int):
    """Colours are looked for in some of many pixels, and some lie on every object that is not tiny."""
    values = torch.zeros(1, 1, side, side, dtype=torch.float64)
    for row, column in ((17, 1), (side // 2 + 1, side // 2 + 1), (33, side - 16)):
        place = slice(row, row + 14), slice(column, column + 14)
        picture = torch.full((1, 3, side, side), 0.5, dtype=torch.float64)
        picture[(..., *place)] = torch.tensor([0.9, 0.1, 0.2], dtype=torch.float64).view(3, 1, 1)
        values.zero_()[(..., *place)] = 1
        found = Bilateral(picture, 0.1 * side, 1.0)(values)
        assert float(found[(..., *place)].min()) > 0.99 and float(found[values == 0].max()) < 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype):
    picture, values = uniform(2, 3, 12, 16), uniform(2, 1, 12, 16, seed=1)
    found = Bilateral(picture.to(dtype), 1.2, 1.0)(values.to(dtype))
    assert found.dtype == dtype
    expected = Bilateral(picture.to(dtype).double(), 1.2, 1.0)(values.to(dtype).double())
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4 * eps)
    same = torch.full_like(values, 1.375).to(dtype)
    assert torch.equal(Bilateral(picture.to(dtype), 1.2, 1.0)(same), same)


def test_gradients_flow_to_values_and_none_to_pictures():
    picture = uniform(2, 3, 4, 5).requires_grad_()
    found = Bilateral(picture, 1.0, 1.0)
    values = uniform(2, 1, 4, 5, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(found, (values,))
    found(values).square().sum().backward()
    assert picture.grad is None and values.grad is not None and bool((values.grad != 0).all())


def test_what_is_not_real_takes_no_part():
    picture, values = uniform(2, 3, 10, 12), uniform(2, 1, 10, 12, seed=1)
    real = torch.zeros(2, 1, 10, 12, dtype=torch.bool)
    real[0, :, :8, :9], real[1, :, 2:, :] = True, True
    found = Bilateral(picture, 1.2, 1.0, real)
    expected = found(values)
    assert not expected[~real].any()
    same = found(torch.ones_like(values))
    torch.testing.assert_close(same[real], torch.ones_like(same[real]), rtol=0, atol=1e-12)
    whole = torch.where(real, values, 1e6), torch.where(real, picture, 1e6)
    torch.testing.assert_close(Bilateral(whole[1], 1.2, 1.0, real)(whole[0]), expected, rtol=0, atol=1e-12)
    cut = Bilateral(picture[:1, :, :8, :9], 1.2, 1.0)(values[:1, :, :8, :9])
    assert correlation(cut, expected[:1, :, :8, :9]) > 0.99
    kept = torch.ones(1, 1, 10, 12, dtype=torch.bool)
    assert torch.equal(Bilateral(picture, 1.2, 1.0, kept)(values), Bilateral(picture, 1.2, 1.0)(values))


def test_a_picture_without_anything_real():
    picture, values = uniform(2, 3, 6, 6), uniform(2, 1, 6, 6, seed=1)
    real = torch.tensor([True, False]).view(2, 1, 1, 1).expand(2, 1, 6, 6)
    found = Bilateral(picture, 1.2, 1.0, real)(values)
    assert not found[1].any()
    assert torch.equal(found[0], Bilateral(picture[:1], 1.2, 1.0)(values[:1])[0])


def test_a_real_strip_between_the_pixels_that_are_looked_at():
    picture, values = uniform(1, 3, 300, 300), uniform(1, 1, 300, 300, seed=1)
    real = torch.zeros(1, 1, 300, 300, dtype=torch.bool)
    real[..., 7:8, 3:5] = True
    found = Bilateral(picture, 3.0, 1.0, real)(values)
    assert bool(found.isfinite().all()) and bool((found[real] > 0).all()) and not found[~real].any()


def test_which_filter_gates_go_through():
    picture = uniform(1, 3, 10, 20)
    values = uniform(1, 1, 10, 20, seed=1)

    def smoothed(share: float, colour: float | None) -> Tensor:
        found = over_neighbours(share, colour, picture, picture, None)
        assert found is not None
        return found(values)

    assert torch.equal(smoothed(0.2, None), blur(values, 2.0))
    assert torch.equal(smoothed(0.2, 0.7), Bilateral(picture, 2.0, 0.7)(values))
    for colour in (None, 1.0):
        assert over_neighbours(0.0, colour, picture, picture, None) is None
        assert over_neighbours(0.1, colour, picture[0], picture[0], None) is None


def test_a_margin_that_no_patch_covers_does_not_matter():
    """What no tower sees has no part in a map, whatever its colours."""
    pixels = uniform(2, 3, 18, 21).float()
    other = pixels.clone()
    other[:, :, 16:], other[..., 20:] = 7.0, -3.0
    assert not torch.equal(other, pixels)
    method = MultiModalInfoBottleneck(lambda given: given[:, 0, 4:9, 5:12].mean((1, 2)), [None], [PatchLayout((4, 4))])
    bits = method.attribute(pixels)
    assert bool(bits.any())
    assert torch.equal(method.attribute(other), bits)


def test_what_a_mask_calls_padding_does_not_matter():
    """Such as the rest of a sound's spectrogram, of the length of the longest of its batch."""
    sounds, mask = uniform(2, 1, 24, 8).float(), torch.ones(2, 24)
    mask[1, 12:] = 0
    other = torch.where(mask.view(2, 1, 24, 1) > 0, sounds, 9 * uniform(2, 1, 24, 8, seed=1).float())
    layout = PatchLayout((4, 4), mask_argument=1)
    method = MultiModalInfoBottleneck(lambda given, _: given[:, 0, 4:9, 2:6].mean((1, 2)), [None], [layout])
    bits = method.attribute(sounds, additional_forward_args=mask)
    assert bool(bits[1, :, :12].any()) and not bits[1, :, 12:].any()
    assert torch.equal(method.attribute(other, additional_forward_args=mask), bits)


def planted(side: int = 48) -> tuple[Tensor, Tensor]:
    """Pictures of an object on a ground, both of slightly uneven colours, and where it is."""
    place = torch.zeros(side, side, dtype=torch.bool)
    place[14:30, 20:34] = True
    ground, own = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in ([0.2, 0.3, 0.25], [0.8, 0.4, 0.1]))
    pictures = torch.where(place, own, ground) + 0.03 * (uniform(3, 3, side, side) - 0.5)
    return pictures, place


@pytest.mark.parametrize("settings", [{}, {"n_steps": 10}, {"seed": 1}])
def test_maps_end_where_colours_do(settings: dict[str, Any]):
    """A score that reads an object up to its border: without colours, gates beyond it open as well."""
    pictures, place = planted()

    def red_of_the_object(given: Tensor) -> Tensor:
        return torch.tanh(given[:, 0, 14:30, 20:34].mean((1, 2)))

    method = MultiModalInfoBottleneck(red_of_the_object, [None])
    default = method.attribute(pictures, **settings).sum(1)
    plain = method.attribute(pictures, smoothing_colour=None, **settings).sum(1)
    beyond, spilled = (bits[:, ~place].sum(1) / bits.flatten(1).sum(1) for bits in (default, plain))
    assert float(beyond.max()) < 0.01 and float(spilled.min()) > 0.03
    # Nor do they peak in its middle as much.
    even, peaked = (bits[:, place].amin(1) / bits[:, place].amax(1) for bits in (default, plain))
    assert bool((even > peaked + 0.1).all())
