"""IBA: the shared engine with a classifier's log-probability, its prior, its smoothing, and planted evidence."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib import ChannelStatistics, MultiModalInfoBottleneck, PatchLayout, TextLayout
from captum_m2ib.attr.info_bottleneck import InfoBottleneck, _smoothing
from captum_m2ib.engine.gates import noise
from captum_m2ib.engine.smoothing import blur, smooth_logits
from captum_m2ib.engine.units import to_input

FEW = {"n_steps": 5, "n_samples": 3}
PAPER = {"beta": 10.0, "lr": 1.0, "initial_gate": 1 / (1 + math.exp(-5)), "antithetic": False, "score_range": 1.0}
PAPER["noiseless"] = 0.0


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
    # Bilinear resizing carries a cell's bits half a cell beyond its border.
    near = cells[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2]
    assert bool((near.sum((1, 2)) > 0.9 * cells.sum((1, 2))).all())
    smoothed = F.avg_pool2d(iba.attribute(given, **settings).sum(1), 4)
    for map_, sharp in zip(smoothed, cells, strict=True):
        # The gate opens with its neighbours, so they carry bits that nothing needs.
        assert divmod(int(map_.argmax()), 6) == place
        assert float(map_.max() / map_.sum()) < 0.95 * float(sharp.max() / sharp.sum())


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


def gaussian(sigma: float) -> Tensor:
    """The published kernel, as a square: 2 * round(2 * sigma) + 1 cells a side."""
    reach = round(2 * sigma)
    offsets = torch.arange(-reach, reach + 1).double()
    square = torch.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    return square / square.sum()


def published_bits(model: Classifier, picture: Tensor, target: int, prior: ChannelStatistics, sigma: float) -> Tensor:
    """The paper's loop for one picture: bits per element after the last step, (C, h, w)."""
    hidden = model.stem(picture[None]).detach()
    mean, std = (part.double().view(1, -1, 1, 1) for part in (prior.mean, prior.std))
    channels = hidden.shape[1]
    kernel = gaussian(sigma).expand(channels, 1, -1, -1)
    reach = kernel.shape[-1] // 2
    alpha = torch.full_like(hidden, 5.0, requires_grad=True)
    adam = torch.optim.Adam([alpha], lr=1.0)

    def gates() -> Tensor:
        return F.conv2d(F.pad(torch.sigmoid(alpha), (reach,) * 4, mode="reflect"), kernel, groups=channels)

    def divergence(gate: Tensor) -> Tensor:
        prior_, posterior = (
            torch.distributions.Normal(torch.zeros_like(hidden), torch.ones_like(hidden)),
            torch.distributions.Normal(gate * (hidden - mean) / std, 1 - gate),
        )
        return torch.distributions.kl_divergence(posterior, prior_)

    for step in range(FEW["n_steps"]):
        gate = gates()
        drawn = noise(0, 0, step, FEW["n_samples"], hidden.shape[1:]).double()
        mixed = gate * hidden + (1 - gate) * (mean + std * drawn)
        logits = model.head(mixed.flatten(2).mean(2))
        loss = F.cross_entropy(logits, torch.full((len(drawn),), target)) + 10.0 * divergence(gate).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return (divergence(gates()).detach() / math.log(2))[0]


@pytest.mark.parametrize("sigma", [0.5, 1.0])
def test_smoothed_gates_give_the_published_recipe(sigma: float):
    model = Classifier().double().eval()
    prior = ChannelStatistics(torch.linspace(-0.2, 0.3, 8), torch.linspace(0.3, 0.9, 8))
    iba = InfoBottleneck(model, ["stem"], statistics=[prior])
    targets = [2, 0, 1]
    found = iba.attribute(pictures(), target=targets, smoothing=sigma, **FEW)
    units = torch.stack(
        [published_bits(model, given, t, prior, sigma) for given, t in zip(pictures(), targets, strict=True)]
    ).sum(1)
    expected = to_input(PatchLayout((4, 4)), units, pictures())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.max()))
    plain = iba.attribute(pictures(), target=targets, smoothing=None, **FEW)
    assert float((found - plain).abs().max()) > 1e-3 * float(expected.max())


def test_the_default_is_the_published_kernel():
    model = Classifier().double().eval()
    iba = InfoBottleneck(model, ["stem"])
    default, one = (iba.attribute(pictures(), target=0, **FEW, **more) for more in ({}, {"smoothing": 1.0}))
    torch.testing.assert_close(default, one, rtol=0, atol=0)


def test_blurring_is_a_gaussian_mirrored_at_the_border():
    maps = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0)).double()
    for sigma in (0.3, 1.0, 1.4):
        kernel = gaussian(sigma).expand(3, 1, -1, -1)
        padded = F.pad(maps, (kernel.shape[-1] // 2,) * 4, mode="reflect")
        torch.testing.assert_close(blur(maps, sigma), F.conv2d(padded, kernel, groups=3), rtol=0, atol=1e-12)
    line = torch.exp(torch.tensor([-2.0, -0.5, 0.0, -0.5, -2.0]).double())
    line = line / line.sum()
    for row, weights in ((0, (line[2], line[1])), (1, (2 * line[1], line[0] + line[2]))):
        point = torch.zeros(1, 1, 5, 9).double()
        point[0, 0, row, 4] = 1.0
        found = blur(point, 1.0)[0, 0, :, 2:7]
        # By hand: the border row is its own mirror, and what the next one holds is met a second time beyond it.
        torch.testing.assert_close(found[0], weights[0] * line)
        torch.testing.assert_close(found[1], weights[1] * line)
    flat = torch.full((1, 1, 2, 1), 0.7).double()
    torch.testing.assert_close(blur(flat, 3.0), flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_smoothed_gates_stay_finite_however_far_they_are_driven(dtype: torch.dtype):
    # Wide enough that some cells have only open, and some only closed neighbours.
    alpha = torch.full((1, 1, 4, 12), 400.0, dtype=dtype)
    alpha[..., 6:] = -400.0
    alpha.requires_grad_()
    logits = smooth_logits(alpha, 1.0)
    logits.sum().backward()
    assert bool(logits.isfinite().all()) and bool(alpha.grad.isfinite().all())
    torch.testing.assert_close(torch.sigmoid(logits), blur(torch.sigmoid(alpha), 1.0))


def test_gates_of_patches_are_smoothed_over_their_grid_and_no_others():
    layout, given = PatchLayout((4, 4), prefix=1), torch.zeros(2, 3, 16, 24).double()
    hidden = torch.zeros(2, 25, 8).double()
    alpha = torch.randn(2, 25, 8, generator=torch.Generator().manual_seed(1)).double()
    found = _smoothing(layout, 1.0, hidden, given, None)(alpha)
    torch.testing.assert_close(found[:, 0], alpha[:, 0], rtol=0, atol=0)
    grid = torch.sigmoid(alpha[:, 1:]).unflatten(1, (4, 6)).movedim(-1, 1)
    expected = torch.logit(blur(grid, 1.0)).movedim(1, -1).flatten(1, 2)
    torch.testing.assert_close(found[:, 1:], expected, rtol=0, atol=1e-9)
    assert _smoothing(TextLayout(), 1.0, hidden, torch.zeros(2, 25).long(), None) is None
    assert _smoothing(None, 1.0, hidden, given, None) is None


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
