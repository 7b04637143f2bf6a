"""A grid is found in a hidden state by its shape, whichever way its cells lie."""

from __future__ import annotations

import pytest
import torch

from captum_m2ib.engine.grids import channel_axis
from captum_m2ib.engine.layouts import HALVINGS, PatchLayout
from captum_m2ib.engine.units import to_input, to_units


def picture(*size: int, pairs: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.zeros(pairs, channels, *size)


def test_grid_is_filled_row_by_row():
    elements = torch.arange(7.0).view(1, 7, 1)
    grid = to_units(PatchLayout((4, 4), prefix=1), elements, picture(8, 12))
    assert grid.tolist() == [[[1, 2, 3], [4, 5, 6]]]


def test_a_convolutional_map_brings_its_own_grid():
    elements = torch.rand(2, 5, 3, 4)
    inputs = picture(12, 16, pairs=2)
    grid = to_units(PatchLayout((16, 16)), elements, inputs)
    torch.testing.assert_close(grid, elements.sum(1))
    pixels = to_input(PatchLayout((16, 16)), grid, inputs)
    torch.testing.assert_close(pixels.sum((1, 2, 3)), elements.sum((1, 2, 3)))


@pytest.mark.parametrize(("side", "map_side"), [(35, 17), (35, 18), (35, 16), (64, 31)])
def test_a_convolution_may_pad_in_its_own_way(side, map_side):
    elements = torch.rand(1, 5, map_side, map_side)
    layout = PatchLayout((1, 1), coarser=HALVINGS)
    assert torch.equal(to_units(layout, elements, picture(side, side)), elements.sum(1))


def test_maps_of_attention_are_no_grid():
    with pytest.raises(ValueError, match="layouts: expected"):
        to_units(PatchLayout((8, 8), prefix=1), torch.ones(1, 2, 17, 8), picture(32, 32))


def test_channels_may_come_last():
    elements = torch.rand(2, 4, 6, 5)
    layout, inputs = PatchLayout((8, 8)), picture(32, 48, pairs=2)
    assert channel_axis(layout, elements, inputs) == 3
    torch.testing.assert_close(to_units(layout, elements, inputs), elements.sum(-1))
    first = elements.movedim(3, 1)
    assert channel_axis(layout, first, inputs) == 1
    torch.testing.assert_close(to_units(layout, first, inputs), elements.sum(-1))
    assert channel_axis(None, elements, None) == 1 and channel_axis(None, elements[:, 0], None) == 2


def test_a_map_that_fits_both_readings_has_its_channels_first():
    layout, inputs = PatchLayout((4, 4), coarser=(1, 2, 4)), picture(32, 16)
    elements = torch.rand(1, 8, 4, 2)
    assert channel_axis(layout, elements, inputs) == 1
    assert torch.equal(to_units(layout, elements, inputs), elements.sum(1))


@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("form", ["tokens", "first", "last"])
def test_a_hierarchical_tower_has_coarser_grids(factor, form):
    layout, inputs = PatchLayout((4, 4), coarser=(1, 2, 4)), picture(32, 48)
    rows, columns = 8 // factor, 12 // factor
    elements = torch.rand(1, rows, columns, 7)
    given = {"tokens": elements.flatten(1, 2), "first": elements.movedim(3, 1), "last": elements}[form]
    assert torch.allclose(to_units(layout, given, inputs), elements.sum(-1))


def test_grids_that_do_not_divide_are_rounded_up():
    layout = PatchLayout((4, 4), coarser=(1, 2))
    elements = torch.rand(1, 3 * 5, 2)
    grid = to_units(layout, elements, picture(20, 36))
    assert grid.shape == (1, 3, 5)
    pixels = to_input(layout, grid, picture(20, 36))
    assert bool((pixels > 0).all()), "what is rounded up covers the margin"


def test_windows_are_joined_and_shifted_back():
    """Cut a grid as windowed attention does, and find it again."""
    side, shift, rows, columns = 3, 1, 5, 7
    grid = torch.rand(2, rows, columns, 4)
    padded = torch.nn.functional.pad(grid, (0, 0, 0, 9 - columns, 0, 6 - rows))
    moved = padded.roll((-shift, -shift), (1, 2))
    windows = torch.stack(
        [moved[:, i : i + side, j : j + side].flatten(1, 2) for i in range(0, 6, side) for j in range(0, 9, side)],
        1,
    )
    layout = PatchLayout((4, 4), window=side, shift=shift)
    found = to_units(layout, windows, picture(4 * rows, 4 * columns, pairs=2))
    assert torch.allclose(found, grid.sum(-1))
    whole = PatchLayout((4, 4), window=7, shift=3)
    one = torch.rand(1, 1, 25, 4)
    assert torch.allclose(to_units(whole, one, picture(20, 20)), one.sum(-1).view(1, 5, 5)), "one window is not shifted"


def test_a_folded_spectrogram_is_unfolded():
    """Fold time into frequency as HTS-AT does with a spectrogram, and find it again."""
    fold, time, frequency = 4, 16, 2
    grid = torch.rand(2, time, frequency)
    pieces = grid.view(2, fold, time // fold, frequency).transpose(2, 3)
    tokens = pieces.reshape(2, fold * frequency * (time // fold), 1)
    layout = PatchLayout((4, 4), size=(64, 8), fold=fold, coarser=(1, 2, 4, 8))
    inputs = torch.zeros(2, 1, 50, 8)
    assert torch.allclose(to_units(layout, tokens, inputs), grid)
    spread = to_input(layout, grid, inputs)
    assert spread.shape == inputs.shape and bool((spread > 0).all())
    torch.testing.assert_close(spread.sum((1, 2, 3)), grid.sum((1, 2)))
    half = grid[:, :8, :1]
    folded = half.view(2, fold, 2, 1).transpose(2, 3).reshape(2, 8, 1)
    assert torch.allclose(to_units(layout, folded, inputs), half)


def test_a_video_is_frames_of_patches():
    layout = PatchLayout((1, 8, 8), prefix=1, suffix=1, axes=(1, 3, 4))
    video = torch.zeros(2, 3, 5, 16, 24)
    elements = torch.rand(2, 3, 1 + 6, 4)
    units = to_units(layout, elements, video)
    assert units.shape == (2, 3, 2, 3)
    torch.testing.assert_close(units.flatten(2), elements[:, :, 1:].sum(-1))
    with_message = torch.cat([elements, torch.rand(2, 3, 1, 4)], 2)
    assert torch.equal(to_units(layout, with_message, video), units)
    spread = to_input(layout, units, video)
    assert spread.shape == video.shape
    torch.testing.assert_close(spread.sum((2, 3, 4)), units.sum((2, 3)))


def test_tubes_of_a_video():
    layout = PatchLayout((2, 8, 8), axes=(2, 3, 4))
    video = torch.zeros(1, 3, 4, 16, 24)
    elements = torch.rand(1, 2 * 2 * 3, 4)
    units = to_units(layout, elements, video)
    torch.testing.assert_close(units, elements.sum(-1).view(1, 2, 2, 3))
    spread = to_input(layout, units, video)
    torch.testing.assert_close(spread.sum(), units.sum())
    assert torch.equal(spread[:, 0], spread[:, 2])


def test_a_waveform_is_a_row_of_frames():
    layout, waves = PatchLayout((10,)), torch.zeros(2, 45)
    units = to_units(layout, torch.rand(2, 4, 3), waves)
    assert units.shape == (2, 4)
    spread = to_input(layout, units, waves)
    assert spread.shape == waves.shape and not spread[:, 40:].any()
    torch.testing.assert_close(spread.sum(1), units.sum(1))


def test_prefix_tokens_may_be_missing_already():
    layout = PatchLayout((4, 4), prefix=1)
    assert to_units(layout, torch.ones(1, 4, 2), picture(8, 8)).tolist() == [[[2, 2], [2, 2]]]


def test_tokens_that_are_not_the_grid_are_an_error():
    with pytest.raises(ValueError, match=r"layouts: expected 1 prefix tokens and a grid of 2 x 2 .*\(1, 7, 2\)"):
        to_units(PatchLayout((4, 4), prefix=1), torch.ones(1, 7, 2), picture(8, 8))
    with pytest.raises(ValueError, match="layouts: expected"):
        to_units(PatchLayout((4, 4)), torch.ones(1, 4), picture(8, 8))
    with pytest.raises(ValueError, match="a grid with at least one patch"):
        to_units(PatchLayout((4, 4), size=(2, 2), fold=4), torch.ones(1, 7, 2), picture(8, 8))
