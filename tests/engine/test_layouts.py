"""Bits are moved from hidden-state units to input units, never made or lost."""

from __future__ import annotations

import pytest
import torch
from families import clip_case
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_m2ib.engine.layouts import (
    HALVINGS,
    PackedLayout,
    PatchLayout,
    TextLayout,
    channel_axis,
    packed_grid,
    real_elements,
    real_tokens,
    to_input,
    to_units,
)

sizes = st.integers(1, 5)


def picture(*size: int, pairs: int = 1, channels: int = 3) -> torch.Tensor:
    return torch.zeros(pairs, channels, *size)


@settings(max_examples=100, deadline=None)
@given(
    rows=sizes,
    columns=sizes,
    patch=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    prefix=st.integers(0, 3),
    suffix=st.integers(0, 2),
    margin=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    channels=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_bits_are_conserved(rows, columns, patch, prefix, suffix, margin, channels, seed):
    height, width = (n * p + min(m, p - 1) for n, p, m in zip((rows, columns), patch, margin, strict=True))
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + rows * columns + suffix
    elements = torch.rand(2, tokens, 3, generator=generator, dtype=torch.float64)
    layout, inputs = PatchLayout(patch, prefix, suffix), picture(height, width, pairs=2, channels=channels)
    grid = to_units(layout, elements, inputs)
    assert grid.shape == (2, rows, columns)
    patches = elements[:, prefix : tokens - suffix]
    torch.testing.assert_close(grid.sum((1, 2)), patches.sum((1, 2)))
    pixels = to_input(layout, grid, inputs)
    assert pixels.shape == inputs.shape and pixels.is_contiguous() and bool((pixels >= 0).all())
    torch.testing.assert_close(pixels.sum((1, 2, 3)), grid.sum((1, 2)))
    torch.testing.assert_close(pixels, pixels[:, :1].expand_as(pixels))
    assert not pixels[:, :, rows * patch[0] :].any() and not pixels[:, :, :, columns * patch[1] :].any()


def test_grid_is_filled_row_by_row():
    elements = torch.arange(7.0).view(1, 7, 1)
    grid = to_units(PatchLayout((4, 4), prefix=1), elements, picture(8, 12))
    assert grid.tolist() == [[[1, 2, 3], [4, 5, 6]]]


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 3), (1, 1), (1, 3)])
def test_one_patch_lights_its_own_place(row, column):
    grid = torch.zeros(1, 2, 4)
    grid[0, row, column] = 8.0
    pixels = to_input(PatchLayout((8, 6)), grid, picture(16, 24))[0].sum(0)
    place = divmod(int(pixels.argmax()), 24)
    assert (place[0] // 8, place[1] // 6) == (row, column)
    inside = pixels[row * 8 : row * 8 + 8, column * 6 : column * 6 + 6].sum()
    assert float(inside) > 0.5 * 8.0


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


def test_packed_patches_block_by_block_without_their_padding():
    # Two blocks of 2 x 2 on a grid of 2 rows and 4 columns, and two places of padding.
    layout = PackedLayout(shapes_argument=1, merge=2, drops_padding=True)
    inputs, shapes = torch.zeros(1, 10, 6), torch.tensor([[1, 2, 4]])
    real = real_tokens(layout, inputs, (inputs, shapes))
    assert real.tolist() == [[True] * 8 + [False] * 2]
    hidden = torch.arange(8.0).view(1, 8, 1).expand(1, 8, 3)
    units = to_units(layout, hidden, inputs)
    assert units.tolist() == [[0, 3, 6, 9, 12, 15, 18, 21, 0, 0]]
    assert packed_grid(layout, units, (inputs, shapes), 0).tolist() == [[0, 3, 12, 15], [6, 9, 18, 21]]
    assert float(to_input(layout, units, inputs).sum()) == float(hidden.sum())


def test_packed_patches():
    layout, inputs = PackedLayout(mask_argument=2, shapes_argument=3, prefix=1), torch.zeros(2, 5, 12)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
    arguments = (inputs, None, mask, torch.tensor([[2, 2], [1, 2]]))
    elements = torch.rand(2, 6, 3)
    real = real_elements(layout, elements, 0, arguments)
    assert real[..., 0].tolist() == [[True, *row] for row in mask.bool().tolist()]
    units = to_units(layout, elements, inputs, real)
    torch.testing.assert_close(units, elements[:, 1:].sum(-1) * mask)
    spread = to_input(layout, units, inputs)
    torch.testing.assert_close(spread, (units / 12)[..., None].expand(2, 5, 12))
    with pytest.raises(ValueError, match="layouts: expected a hidden state with 5 tokens, one per packed patch"):
        to_units(layout, torch.rand(2, 9, 3), inputs)


def test_units_of_both_signs_keep_both_sums():
    grid = torch.tensor([[[3.0, -5.0], [0.0, 1.0]], [[-1.0, -2.0], [-3.0, 0.0]]])
    pixels = to_input(PatchLayout((4, 4)), grid, picture(8, 8, pairs=2)).sum(1)
    torch.testing.assert_close(pixels.sum((1, 2)), grid.sum((1, 2)))
    assert float(pixels[0, 1, 1]) > 0 > float(pixels[0, 1, 6]) and bool((pixels[1] <= 0).all())


def test_no_bits_stay_no_bits():
    assert not to_input(PatchLayout((4, 4)), torch.zeros(1, 2, 2), picture(8, 8)).any()


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


def test_real_tokens_from_mask_end_or_nothing():
    ids = torch.tensor([[5, 6, 9, 1, 9], [5, 9, 9, 9, 9]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    arguments = (None, ids, mask)
    assert real_tokens(TextLayout(mask_argument=2), ids, arguments).tolist() == mask.bool().tolist()
    by_end = real_tokens(TextLayout(end_token_id=9), ids, arguments)
    assert by_end.int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]
    assert real_tokens(TextLayout(mask_argument=2, end_token_id=9), ids, (None, ids)).equal(by_end)
    assert real_tokens(TextLayout(mask_argument=2, end_token_id=9), ids, (None, ids, "no tensor")).equal(by_end)
    assert real_tokens(TextLayout(), ids, arguments) is None
    assert real_tokens(TextLayout(end_token_id=7), ids, arguments).all()


def test_real_elements_follow_the_tokens():
    ids, mask = torch.ones(2, 3, dtype=torch.long), torch.tensor([[1, 1, 0], [1, 0, 0]])
    layout, arguments = TextLayout(mask_argument=2), (None, ids, mask)
    real = real_elements(layout, torch.zeros(2, 3, 4), 1, arguments)
    assert real.shape == (2, 3, 1) and real.squeeze(-1).equal(mask.bool())
    assert real_elements(layout, torch.zeros(2, 4), 1, arguments) is None
    assert real_elements(layout, torch.zeros(2, 5, 4), 1, arguments) is None
    assert real_elements(PatchLayout((1, 1)), torch.zeros(2, 3, 4), 1, arguments) is None
    assert real_elements(None, torch.zeros(2, 3, 4), 1, arguments) is None


def test_tokens_get_their_channels_sum_and_padding_nothing():
    elements = torch.arange(12.0).view(2, 3, 2)
    ids = torch.zeros(2, 3, dtype=torch.long)
    real = torch.tensor([[True, True, True], [True, False, False]])[..., None]
    assert to_units(TextLayout(), elements, ids, real).tolist() == [[1, 5, 9], [13, 0, 0]]
    assert to_units(TextLayout(), elements, ids).tolist() == [[1, 5, 9], [13, 17, 21]]
    with pytest.raises(ValueError, match="layouts: expected a hidden state with 4 tokens"):
        to_units(TextLayout(), elements, torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="layouts: expected a hidden state with 3 tokens"):
        to_units(TextLayout(), torch.zeros(2, 3), ids)


def test_tokens_that_the_tower_adds_are_real_and_left_out():
    ids = torch.tensor([[5, 6, 0], [5, 0, 0]])
    layout = TextLayout(pad_token_id=0, suffix=1)
    elements = torch.rand(2, 4, 2)
    real = real_elements(layout, elements, 1, (None, ids))
    assert real[..., 0].tolist() == [[True, True, False, True], [True, False, False, True]]
    expected = elements[:, :3].sum(-1) * (ids != 0)
    torch.testing.assert_close(to_units(layout, elements, ids, real), expected)


def test_the_highest_id_ends_a_caption_of_the_first_vocabulary():
    ids = torch.tensor([[5, 9, 3, 1], [5, 2, 9, 9], [9, 1, 1, 1]])
    real = real_tokens(TextLayout(ends_at_highest=True), ids, (None, ids))
    assert real.tolist() == [[True, True, False, False], [True, True, True, False], [True, False, False, False]]
    mask = torch.tensor([[1, 1, 1, 0]]).expand(3, 4)
    assert torch.equal(real_tokens(TextLayout(0, ends_at_highest=True), ids, (mask,)), mask.bool())


def test_a_legacy_configuration_says_so():
    layouts = clip_case(end=2).forward.layouts
    assert layouts[1] == TextLayout(mask_argument=2, end_token_id=None, ends_at_highest=True)
