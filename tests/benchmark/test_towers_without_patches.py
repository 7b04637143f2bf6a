"""Methods that take out parts of a picture, on a convolutional tower, which has no patches: cells of 16 pixels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.adapters import Ablation, OcclusionWindow, smoothed


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.table(ids).mean(1)


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Conv2d(width, 4, 3, stride=2, padding=1), nn.ReLU()) for width in (3, 4, 4)]
    image = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return DualEncoder(image, Words()).eval()


def test_a_cell_s_value_is_the_loss_of_score_without_it(encoder: DualEncoder):
    pixels, ids = (
        torch.rand(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([[1, 2]]).repeat(2, 1),
    )
    found = Ablation(encoder).attribute(pixels, ids).sum(1)
    alone = OcclusionWindow(encoder, window=1).attribute(pixels, ids).sum(1)
    with torch.no_grad():
        whole = encoder(pixels, ids)
        for row in range(3):
            for column in range(4):
                cell = (..., slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
                without = pixels.clone()
                without[cell] = 0
                loss = (whole - encoder(without, ids)).view(2, 1, 1).expand(2, 16, 16)
                torch.testing.assert_close(found[cell], loss, atol=1e-6, rtol=1e-4)
                torch.testing.assert_close(alone[cell], loss, atol=1e-6, rtol=1e-4)


def test_a_window_is_two_cells_wide_and_smoothing_keeps_sums(encoder: DualEncoder):
    pixels, ids = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)), torch.tensor([[3]])
    found = OcclusionWindow(encoder).attribute(pixels, ids)
    assert len(found.sum(1)[0, ::16, ::16].unique()) > 4
    assert all(len(cell.unique()) == 1 for cell in found[0, 0].unfold(0, 16, 16).unfold(1, 16, 16).flatten(0, 1))
    torch.testing.assert_close(smoothed(encoder, found.clamp(min=0)).sum(), found.clamp(min=0).sum())


@pytest.mark.parametrize("method", [Ablation, OcclusionWindow])
def test_large_pictures_go_through_the_model_a_few_at_a_time(encoder: DualEncoder, method: type):
    pixels, ids = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(2)), torch.tensor([[3], [4]])
    seen: list[int] = []
    handle = encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[0]))
    try:
        method(encoder).attribute(pixels, ids)
    finally:
        handle.remove()
    # Captum asks for the whole pairs' score first; four pictures of this size are 2 ** 18 pixels.
    assert max(seen) == 4 and sum(seen) >= 2 * 15 * 15
