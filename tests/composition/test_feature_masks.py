"""Feature masks against masks written by hand and against one made pixel by pixel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from captum_m2ib.composition import feature_masks, token_baselines
from captum_m2ib.engine.layouts import HALVINGS, PackedLayout, PatchLayout, TextLayout

WORDS = torch.tensor([[False, True, True, True, False], [False, True, True, False, False]])
IDS = torch.tensor([[62, 7, 8, 9, 63], [62, 5, 6, 63, 1]])


def test_patches_then_words_by_hand():
    pixels = torch.zeros(2, 3, 4, 5)
    layouts = (PatchLayout((2, 2), prefix=1), TextLayout())
    picture, text = feature_masks(layouts, (pixels, IDS), None, WORDS)
    # The fifth column lies in no patch.
    expected = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 1, 1, 1], [2, 2, 3, 3, 3], [2, 2, 3, 3, 3]])
    assert torch.equal(picture, expected.expand(2, 3, 4, 5))
    assert text.tolist() == [[4, 5, 6, 7, 4], [4, 5, 6, 4, 4]]
    for mask in (picture, text):
        assert mask.is_contiguous() and mask.dtype == torch.long


def test_text_first():
    layouts = (TextLayout(), PatchLayout((2, 2)))
    text, picture = feature_masks(layouts, (IDS, torch.zeros(2, 1, 4, 2)), None, WORDS)
    assert text.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]]
    assert picture[1, 0].tolist() == [[4, 4], [4, 4], [5, 5], [5, 5]]


def test_padding_stays_whatever_is_called_maskable():
    everything = torch.ones_like(WORDS)
    attention = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    by_mask = feature_masks((TextLayout(mask_argument=1),), (IDS,), (attention,), everything)
    assert by_mask[0].tolist() == [[0, 1, 2, 3, 4], [1, 2, 3, 4, 0]]
    by_end = feature_masks((TextLayout(end_token_id=63),), IDS, None, everything)
    assert torch.equal(by_end, by_mask[0])


def test_one_input_gives_a_tensor_and_embeddings_share_their_tokens_feature():
    mask = feature_masks((TextLayout(),), torch.zeros(2, 5, 3), None, WORDS)
    assert torch.equal(mask, torch.tensor([[0, 1, 2, 3, 0], [0, 1, 2, 0, 0]])[..., None].expand(2, 5, 3))
    alone = feature_masks((PatchLayout((2, 2)), TextLayout()), torch.zeros(2, 3, 4, 4), (IDS,))
    assert alone.shape == (2, 3, 4, 4) and alone.max() == 3


def test_larger_cells():
    mask = feature_masks((PatchLayout((2, 2)),), torch.zeros(1, 1, 4, 8), cell=(4, 4))
    assert mask[0, 0].tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 4
    hierarchical = PatchLayout((1, 1), coarser=HALVINGS)
    assert int(feature_masks((hierarchical,), torch.zeros(1, 1, 4, 8), cell=(2, 2)).max()) == 7


def test_videos_count_frames_first():
    mask = feature_masks((PatchLayout((1, 2, 2), axes=(1, 3, 4)),), torch.zeros(1, 2, 3, 2, 4))
    assert mask.shape == (1, 2, 3, 2, 4)
    assert mask[0, :, 0].tolist() == [[[0, 0, 1, 1]] * 2, [[2, 2, 3, 3]] * 2]


def test_a_tower_that_resizes_its_input():
    # 4 rows seen as 8, in patches of 4: two rows of the input to a patch.
    mask = feature_masks((PatchLayout((4, 1), size=(8, 2)),), torch.zeros(1, 1, 4, 2))
    assert mask[0, 0].tolist() == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_packed_patches():
    real = torch.tensor([[1, 1, 1], [1, 1, 0]])
    mask = feature_masks((PackedLayout(mask_argument=1),), torch.zeros(2, 3, 4), (real,))
    assert mask[:, :, 0].tolist() == [[0, 1, 2], [1, 2, 0]] and mask.shape == (2, 3, 4)


@given(
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(st.integers(1, 19), st.integers(1, 19)),
    st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=3),
)
def test_any_grid_and_any_words(patch: tuple[int, int], size: tuple[int, int], words: list[list[bool]]):
    pixels, ids = torch.zeros(len(words), 2, *size), torch.zeros(len(words), 4, dtype=torch.long)
    picture, text = feature_masks((PatchLayout(patch), TextLayout()), (pixels, ids), None, torch.tensor(words))
    rows, columns = max(size[0] // patch[0], 1), max(size[1] // patch[1], 1)
    for y in range(size[0]):
        for x in range(size[1]):
            expected = min(y // patch[0], rows - 1) * columns + min(x // patch[1], columns - 1)
            assert picture[:, :, y, x].unique().tolist() == [expected]
    for row, chosen in zip(text.tolist(), words, strict=True):
        # No number is left out, nothing is shared but what stays.
        assert sorted(set(row)) == list(range(rows * columns, rows * columns + len(set(row))))
        kept = [number for number, is_word in zip(row, chosen, strict=True) if not is_word]
        assert len(set(kept)) <= 1 and len(set(row)) == sum(chosen) + bool(kept)


def test_baselines_keep_what_must_stay():
    baseline = token_baselines(IDS.int(), WORDS, 3)
    assert baseline.tolist() == [[62, 3, 3, 3, 63], [62, 3, 3, 63, 1]] and baseline.dtype == torch.int32
    assert IDS.tolist() == [[62, 7, 8, 9, 63], [62, 5, 6, 63, 1]]


PATCHES = PatchLayout((2, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: feature_masks((TextLayout(),), IDS), r"maskable: expected a boolean tensor of shape \(2, 5\).*None"),
        (lambda: feature_masks((TextLayout(),), IDS, None, WORDS[:, :4]), r"maskable: .*\(2, 5\).*\(2, 4\)"),
        (lambda: feature_masks((TextLayout(),), IDS, None, WORDS.long()), "maskable: .*torch.int64"),
        (lambda: feature_masks((PATCHES,), (torch.zeros(2, 1, 4, 4), IDS), None, WORDS), r"layouts: .*inputs\[1\]"),
        (lambda: feature_masks((None,), IDS), r"layouts: .*inputs\[0\]"),
        (lambda: feature_masks((TextLayout(), TextLayout()), (IDS, IDS), None, WORDS), "layouts: .*at most one"),
        (lambda: feature_masks((PATCHES,), torch.zeros(1, 1, 4, 4), cell=(2,)), "cell: expected 2 whole numbers"),
        (lambda: feature_masks((PATCHES,), torch.zeros(1, 1, 4, 4), cell=(0, 2)), "cell: expected 2 whole numbers"),
        (lambda: feature_masks((PatchLayout((1, 1), coarser=HALVINGS),), torch.zeros(1, 1, 4, 4)), "cell: .*None"),
        (lambda: token_baselines(IDS.float(), WORDS, 3), r"ids: expected integer token ids, \(N, L\)"),
        (lambda: token_baselines(IDS, WORDS[:1], 3), r"maskable: expected .*\(2, 5\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
