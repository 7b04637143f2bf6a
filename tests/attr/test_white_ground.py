"""A score that wants a clean ground, as models of product photographs do: bits must lie on the object all the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib import MultiModalInfoBottleneck, NothingToExplainWarning
from captum_m2ib.engine import gates

SIDE, BAR, PICTURES = 64, 8, 6


def photographs(turned: bool = False) -> tuple[Tensor, Tensor]:
    """Blue discs on white between black bars, (N, 3, 64, 64), and where they are."""
    generator = torch.Generator().manual_seed(7)
    pictures, places = torch.ones(PICTURES, 3, SIDE, SIDE), torch.zeros(PICTURES, SIDE, SIDE, dtype=torch.bool)
    pictures[:, :, :BAR], pictures[:, :, -BAR:] = 0.0, 0.0
    rows, columns = torch.arange(SIDE).view(-1, 1), torch.arange(SIDE).view(1, -1)
    for picture, place in zip(pictures, places, strict=True):
        row, column = torch.randint(20, 44, (2,), generator=generator).tolist()
        place |= (rows - row).square() + (columns - column).square() < 11**2
        blue = torch.tensor([0.15, 0.1, 0.75]).view(3, 1) + 0.04 * torch.randn(3, int(place.sum()), generator=generator)
        picture[:, place] = blue
    return (pictures.transpose(2, 3), places.transpose(1, 2)) if turned else (pictures, places)


def catalogue_score(pictures: Tensor) -> Tensor:
    """Something blue, times how clean everything is that is not blue, between the bars: a tint all over costs most."""
    cells = F.avg_pool2d(pictures, 4)
    blue = torch.sigmoid(20 * (cells[:, 2] - cells[:, 0] - 0.35))
    dirt = ((1 - blue) * (1 - cells.mean(1)).abs())[:, 2:-2, 2:-2].flatten(1)
    return torch.tanh(10 * blue.mean((1, 2))) * torch.exp(-16 * dirt.mean(1))


def share_on(places: Tensor, bits: Tensor) -> Tensor:
    pixels = bits.sum(1)
    return (pixels * places).sum((1, 2)) / pixels.sum((1, 2))


@pytest.mark.parametrize("turned", [False, True])
def test_most_bits_are_on_the_object(turned: bool):
    pictures, places = photographs(turned)
    method = MultiModalInfoBottleneck(catalogue_score, [None])
    bits, record = method.attribute_with_record(pictures)
    found = share_on(places, bits)
    assert float(places.float().mean()) < 0.1 and float(found.mean()) >= 0.6 and float(found.min()) >= 0.4, found
    # The ground is what closed gates show: without the object, and clean.
    (modality,) = record.modalities
    assert bool((modality.score_closed < 0.2 * modality.score_before).all())
    most = bits.sum(1).flatten(1).argmax(1)
    assert bool(places.flatten(1).gather(1, most.unsqueeze(1)).all())


def test_a_mean_color_would_leave_nothing_to_see(monkeypatch: pytest.MonkeyPatch):
    pictures, places = photographs()
    monkeypatch.setattr(gates, "ground_of", lambda hidden, real, channels: hidden.mean((2, 3), keepdim=True))
    method = MultiModalInfoBottleneck(catalogue_score, [None])
    with pytest.warns(NothingToExplainWarning, match="beta: no part of pair"):
        bits, record = method.attribute_with_record(pictures, beta=1.2)
    (modality,) = record.modalities
    assert float(share_on(places, bits).nan_to_num().mean()) < 0.6
    assert bool((modality.score_after < 0.1 * modality.score_before).all())
    # With the default beta there is a map, but of next to nothing of the score.
    (modality,) = method.attribute_with_record(pictures)[1].modalities
    assert bool((modality.score_after < 0.1 * modality.score_before).all())


def test_the_same_in_the_models_own_colors():
    """Preprocessed pictures have other numbers for white; maps are those of the same picture."""
    pictures, _ = photographs()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.48, 0.46, 0.41], [0.27, 0.26, 0.28]))
    pictures, mean, std = pictures.double(), mean.double(), std.double()
    plain = MultiModalInfoBottleneck(catalogue_score, [None]).attribute(pictures)
    method = MultiModalInfoBottleneck(lambda given: catalogue_score(given * std + mean), [None])
    found = method.attribute((pictures - mean) / std)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-6 * float(plain.max()))


def test_a_black_ground_likewise():
    pictures, places = photographs()
    method = MultiModalInfoBottleneck(lambda given: catalogue_score(1 - given), [None])
    assert float(share_on(places, method.attribute(1 - pictures)).mean()) >= 0.6
