"""IBA: the shared engine with a classifier's log-probability, its prior, its smoothing, and planted evidence."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib import ChannelStatistics, MultiModalInfoBottleneck, PatchLayout
from captum_m2ib.attr.info_bottleneck import InfoBottleneck, smooth

FEW = {"n_steps": 5, "n_samples": 3}
PAPER = {"beta": 10.0, "lr": 1.0, "initial_gate": 1 / (1 + math.exp(-5)), "antithetic": False}


class Classifier(nn.Module):
    """Three classes, told from the mean of a map's cells."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.stem(pictures).flatten(2).mean(2))


class Spot(nn.Module):
    """Two classes: whether one cell is bright or dark."""

    def __init__(self, place: tuple[int, int]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 1, 4, 4)
        nn.init.constant_(self.stem.weight, 1 / 48)
        nn.init.zeros_(self.stem.bias)
        self.place = place

    def forward(self, pictures: Tensor) -> Tensor:
        cell = self.stem(pictures)[:, 0, self.place[0], self.place[1]]
        return torch.stack([4 * cell, -4 * cell], 1)


def pictures(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 24, generator=torch.Generator().manual_seed(0)).double()


@pytest.mark.parametrize("target", [1, torch.tensor([2, 0, 1]), [0, 0, 2]])
def test_equals_the_engine_on_the_log_probability(target):
    model = Classifier().double().eval()
    chosen = torch.as_tensor(target).expand(3)
    iba = InfoBottleneck(model, ["stem"])
    found = iba.attribute(pictures(), target=target, smoothing=None, **FEW)

    def score(given: Tensor, classes: Tensor) -> Tensor:
        return -F.cross_entropy(model(given), classes, reduction="none")

    engine = MultiModalInfoBottleneck(score, [model.stem], [PatchLayout((4, 4))], statistics=["pair"])
    expected = engine.attribute(pictures(), additional_forward_args=chosen, **PAPER, **FEW)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    other = iba.attribute(pictures(), target=(chosen + 1) % 3, smoothing=None, **FEW)
    assert not torch.allclose(found, other)


@pytest.mark.parametrize("place", [(0, 0), (1, 4), (3, 2)])
def test_the_only_cell_that_matters_gets_nearly_all_bits(place: tuple[int, int]):
    # Dark but for the cell that is read, and in the second picture for another cell too.
    given = -torch.ones(2, 3, 16, 24).double()
    row, column = place
    given[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    given[1, :, 8:12, 4:8] = 1
    iba = InfoBottleneck(Spot(place).double().eval(), ["stem"])
    settings = {"target": 0, "n_steps": 60, "n_samples": 8, "beta": 1.0}
    cells = F.avg_pool2d(iba.attribute(given, smoothing=None, **settings).sum(1), 4)
    for map_ in cells:
        assert divmod(int(map_.argmax()), 6) == place
    for map_ in cells:
        assert divmod(int(map_.argmax()), 6) == place
    # Bilinear resizing carries a cell's bits half a cell beyond its border.
    near = cells[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
    assert bool((near.sum((1, 2)) > 0.9 * cells.sum((1, 2))).all())
    blurred = F.avg_pool2d(iba.attribute(given, **settings).sum(1), 4)
    torch.testing.assert_close(blurred.sum((1, 2)), cells.sum((1, 2)))
    for map_, sharp in zip(blurred, cells, strict=True):
        assert float(map_.max()) < float(sharp.max())


def test_estimated_statistics_are_those_of_the_data():
    model = Classifier().double().eval()
    data = pictures(40)
    iba = InfoBottleneck(model, ["stem"])
    iba.estimate([(part,) for part in data.split(7)])
    cells = model.stem(data).detach().movedim(1, -1).flatten(0, 2)
    (prior,) = iba.priors
    torch.testing.assert_close(prior.mean.double(), cells.mean(0), rtol=0, atol=1e-6)
    torch.testing.assert_close(prior.std.double(), cells.std(0), rtol=0, atol=1e-6)
    given = InfoBottleneck(
        model, [model.stem], statistics=[ChannelStatistics(cells.mean(0).float(), cells.std(0).float())]
    )
    one, other = (method.attribute(pictures(), target=0, **FEW) for method in (iba, given))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(one, InfoBottleneck(model, ["stem"]).attribute(pictures(), target=0, **FEW))


def test_smoothing_is_a_gaussian_that_keeps_the_sum():
    point = torch.zeros(1, 9, 9).double()
    point[0, 4, 4] = 7.0
    found = smooth(point, 1.0)
    line = torch.exp(-(torch.arange(-2.0, 3.0).double() ** 2) / 2)
    line = line / line.sum()
    torch.testing.assert_close(found[0, 2:7, 2:7], 7 * torch.outer(line, line))
    maps = torch.rand(4, 5, 6).double()
    for sigma in (0.3, 1.0, 5.0):
        torch.testing.assert_close(smooth(maps, sigma).sum((1, 2)), maps.sum((1, 2)))
    flat = torch.ones(1, 2, 1).double()
    torch.testing.assert_close(smooth(flat, 3.0), flat)


def test_a_score_per_example_needs_no_target():
    model = Classifier().double().eval()
    method = InfoBottleneck(lambda given: model(given)[:, 0], [model.stem], [PatchLayout((4, 4))])
    bits = method.attribute(pictures(), **FEW)
    assert bits.shape == (3, 3, 16, 24) and float(bits.sum()) > 0


def test_targets_and_smoothing_are_checked():
    iba = InfoBottleneck(Classifier().double().eval(), ["stem"])
    with pytest.raises(ValueError, match=r"target: expected forward_func to return one score per example.*\(4, 3\)"):
        iba.attribute(pictures(3))
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="smoothing: expected a finite number of at least 0 or None"):
            iba.attribute(pictures(), target=0, smoothing=wrong)
    scores = InfoBottleneck(lambda given: iba.forward_func(given)[:, 0], [iba.forward_func.stem], [PatchLayout((4, 4))])
    with pytest.raises(ValueError, match=r"target: expected forward_func to return logits, \(N, classes\)"):
        scores.attribute(pictures(), target=0)
