"""What closed gates show of an input: by hand on pictures with a ground, without one, and of other shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_m2ib import MultiModalInfoBottleneck, PatchLayout
from captum_m2ib.engine.gates import prior_of
from captum_m2ib.engine.ground import BINS, LEAST_SHARE, ground_of
from captum_m2ib.engine.real_units import covered_elements

DTYPES = [torch.float32, torch.float64]


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def letterboxed(white: float = 1.0, bars: int = 10, dtype: torch.dtype = torch.float32) -> Tensor:
    """A red thing on white between black bars, (1, 3, 64, 64): the bars are less than the white."""
    picture = torch.full((1, 3, 64, 64), white, dtype=dtype)
    picture[..., :bars, :], picture[..., 64 - bars :, :] = 0.0, 0.0
    thing = torch.tensor([0.8, 0.1, 0.1], dtype=dtype).view(3, 1, 1) + 0.1 * drawn(3, 20, 16, dtype=dtype)
    picture[0, :, 20:40, 24:40] = thing
    return picture


@pytest.mark.parametrize("dtype", DTYPES)
def test_white_between_black_bars_is_white(dtype: torch.dtype):
    picture = letterboxed(dtype=dtype)
    found = ground_of(picture, None, 1)
    assert found.shape == (1, 3, 1, 1) and found.dtype == dtype
    assert found.flatten().tolist() == [1.0, 1.0, 1.0]
    # The mean colour, that of neither, is far from it.
    assert bool(((picture.mean((2, 3), keepdim=True) - found).abs() > 0.25).all())


def test_black_between_white_bars_is_black():
    assert ground_of(1 - letterboxed(), None, 1).flatten().tolist() == [0.0, 0.0, 0.0]


def test_what_fills_more_wins_whatever_it_is():
    picture = letterboxed(bars=24)
    assert ground_of(picture, None, 1).flatten().tolist() == [0.0, 0.0, 0.0]


def test_a_ground_of_one_color_among_channels_that_agree_singly():
    # In each channel by itself 1 is more common than 0, but (0, 0, 0) is what most positions are.
    picture = torch.zeros(1, 3, 10, 10)
    for channel, rows in enumerate((slice(4, 7), slice(7, 10), slice(4, 6))):
        picture[0, channel, rows] = 1.0
    picture[0, 2, 7:10] = 0.5
    assert ground_of(picture, None, 1).flatten().tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ground_that_is_not_quite_even_is_the_mean_of_its_bin(dtype: torch.dtype):
    picture = torch.zeros(1, 1, 8, 8, dtype=dtype)
    # Between 0 and 8 each bin is 1 wide: these are all in the fifth, and (4.0 + 4.25 + 4.75) / 3 is by hand 13 / 3.
    picture[0, 0, :3], picture[0, 0, 3], picture[0, 0, 4] = 4.0, 4.25, 4.75
    picture[0, 0, 5], picture[0, 0, 7, 0] = torch.tensor([3.9, 5.0, 5.1, 7.9, 1.2, 2.4, 3.3, 6.0]), 8.0
    expected = (24 * 4.0 + 8 * 4.25 + 8 * 4.75) / 40
    assert float(ground_of(picture, None, 1)) == pytest.approx(expected, rel=1e-6 if dtype == torch.float32 else 1e-15)


def test_the_largest_value_belongs_to_the_last_bin():
    picture = torch.zeros(1, 1, 4, 4)
    picture[..., 1:, :], picture[0, 0, 1] = 1.0, 0.9
    assert float(ground_of(picture, None, 1)) == pytest.approx((4 * 0.9 + 8 * 1.0) / 12)


def test_of_bins_that_are_equally_full_the_lowest():
    picture = torch.zeros(1, 2, 4, 4)
    picture[0, :, :, 2:] = 1.0
    for turned in (picture, picture.flip(3), picture.transpose(2, 3)):
        assert ground_of(turned, None, 1).flatten().tolist() == [0.0, 0.0]
    # The first channel decides before the second.
    picture[0, 0, :, :2], picture[0, 0, :, 2:] = 1.0, 0.0
    assert ground_of(picture, None, 1).flatten().tolist() == [0.0, 1.0]


def test_texture_without_a_ground_is_near_its_middle():
    texture = drawn(1, 3, 64, 64) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1)
    found = ground_of(texture, None, 1).flatten()
    # Of 512 bins the fullest of 4096 positions holds far less than a 32nd: the median of each channel, an own value.
    assert torch.equal(found, texture.flatten(2).median(2).values[0])
    assert bool((found - torch.tensor([0.5, 1.0, 1.5])).abs().div(torch.tensor([1.0, 2.0, 3.0])).lt(0.05).all())
    grey = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).double()
    # One channel always has a full bin; that of a bell is where it is highest, a bin's width at most from the middle.
    assert abs(float(ground_of(grey, None, 1))) < float(grey.max() - grey.min()) / BINS


@pytest.mark.parametrize("positions", [1, 2, 7, 24, 200])
def test_many_channels_have_no_full_bin(positions: int):
    inputs = drawn(2, positions, 40)
    assert torch.equal(ground_of(inputs, None, 2), inputs.median(1, keepdim=True).values)
    turned = inputs.transpose(1, 2)
    assert torch.equal(ground_of(turned, None, 1), turned.median(2, keepdim=True).values)


@pytest.mark.parametrize("filled", [31, 32, 33])
def test_how_much_a_ground_must_fill(filled: int):
    # 1024 positions of which so many are alike, and the others too far apart for any two to share a bin often.
    inputs = drawn(1024, 12)
    inputs[:filled] = 0.5
    inputs = inputs[torch.randperm(1024, generator=torch.Generator().manual_seed(1))][None]
    found = ground_of(inputs, None, 2).flatten()
    median = inputs[0].median(0).values
    assert LEAST_SHARE * 1024 == 32
    assert torch.equal(found, torch.full((12,), 0.5)) == (filled >= 32)
    assert torch.equal(found, median) == (filled < 32)


@pytest.mark.parametrize("constant", [0.0, -3.5, 255.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_constant_input_is_its_own_ground(constant: float, dtype: torch.dtype):
    for shape in ((2, 3, 5, 7), (2, 1, 4, 4), (2, 6, 9)):
        found = ground_of(torch.full(shape, constant, dtype=dtype), None, 1)
        assert found.isfinite().all() and torch.equal(found, torch.full_like(found, constant))


def test_a_constant_channel_among_others():
    picture = letterboxed()
    picture[:, 1] = 0.4
    assert ground_of(picture, None, 1).flatten().tolist() == pytest.approx([1.0, 0.4, 1.0])


def test_what_is_not_there_does_not_count():
    picture = torch.zeros(2, 3, 12, 16)
    picture[..., :5, :6] = drawn(3, 5, 6)
    real = torch.zeros(1, 1, 12, 16, dtype=torch.bool)
    real[..., :5, :6] = True
    alone = picture[..., :5, :6]
    assert torch.equal(ground_of(picture, real, 1), ground_of(alone, None, 1))
    assert ground_of(picture, None, 1).flatten().tolist() == [0.0] * 6
    # One long padding may be a length of its own for each.
    packed, mask = drawn(2, 10, 4), torch.zeros(2, 10, 1, dtype=torch.bool)
    mask[0, :7], mask[1, :3] = True, True
    found = ground_of(packed, mask, 2)
    assert found.shape == (2, 1, 4)
    for row, length in enumerate((7, 3)):
        expected = ground_of(packed[row : row + 1, :length], None, 2)
        assert torch.equal(found[row : row + 1], expected)
    assert ground_of(packed, torch.zeros_like(mask), 2).tolist() == torch.zeros(2, 1, 4).tolist()


def test_margins_that_no_patch_covers_are_left_out():
    picture = letterboxed()[..., 10:54, :]
    picture[..., 32:, :], picture[..., 48:] = 0.0, 0.0
    layout = PatchLayout((32, 48))
    covered = covered_elements(layout, picture)
    assert ground_of(picture, covered, 1).flatten().tolist() == [1.0] * 3

    def closed_score(layouts) -> float:
        def score(given: Tensor) -> Tensor:
            return given[:, 0, :32, :48].mean((1, 2))

        _, record = MultiModalInfoBottleneck(score, [None], layouts).attribute_with_record(picture, n_steps=1)
        return float(record.modalities[0].score_closed)

    # Antithetic noise cancels in a mean, so that what is left is the ground itself.
    assert closed_score([layout]) == pytest.approx(1.0, abs=1e-5)


def test_each_row_has_its_own():
    rows = torch.cat([letterboxed(), 1 - letterboxed(), letterboxed(0.6), drawn(1, 3, 64, 64)])
    whole = ground_of(rows, None, 1)
    for row in range(4):
        assert torch.equal(ground_of(rows[row : row + 1], None, 1), whole[row : row + 1])
    assert torch.equal(ground_of(rows.flip(0), None, 1), whole.flip(0))
    assert whole[:3].flatten().tolist() == pytest.approx([1.0] * 3 + [0.0] * 3 + [0.6] * 3)


def test_it_moves_and_stretches_with_the_values():
    for picture in (letterboxed(dtype=torch.float64), drawn(1, 3, 32, 32).double()):
        found = ground_of(picture, None, 1)
        mean, std = torch.tensor([0.48, 0.45, 0.4]).view(3, 1, 1).double(), torch.tensor([0.25]).double()
        torch.testing.assert_close(ground_of((picture - mean) / std, None, 1), (found - mean) / std)


@pytest.mark.parametrize(("shape", "channels"), [((2, 3, 8, 8), 1), ((2, 8, 8, 3), 3), ((2, 4, 3, 8, 8), 2)])
def test_channels_may_run_anywhere(shape: tuple[int, ...], channels: int):
    inputs = drawn(*shape)
    expected = ground_of(inputs.movedim(channels, -1), None, inputs.ndim - 1).movedim(-1, channels)
    assert torch.equal(ground_of(inputs, None, channels), expected)
    assert expected.numel() == 6 and expected.shape[channels] == 3


def test_only_inputs_are_closed_on_their_ground():
    hidden = letterboxed()
    at_layer, std = prior_of("pair", hidden, None, 4.0, 1)
    torch.testing.assert_close(at_layer, hidden.mean((2, 3), keepdim=True))
    at_input, same = prior_of("pair", hidden, None, 4.0, 1, is_input=True)
    assert at_input.flatten().tolist() == [1.0] * 3
    # The noise is that of all values round their mean in either case.
    assert torch.equal(std, same)
    torch.testing.assert_close(std, 2 * hidden.flatten(2).std(2, unbiased=False)[..., None, None])
    assert prior_of(None, hidden, None, 4.0, 1, is_input=True) == (0.0, 2.0)
