"""The head: its formula against one written out by hand, options that are refused, standardisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from captum_m2ib.disent.head import HeadOptions, InfoDisentHead

D, K = 5, 3


def made(**options) -> InfoDisentHead:
    head = InfoDisentHead(D, K, HeadOptions(**options)).eval().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return head


def features(count: int = 4) -> torch.Tensor:
    return torch.randn(count, D, 3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("standardise", ["scale", "centre", "none"])
def test_logits_are_the_formula(standardise, bias):
    head, given = made(standardise=standardise, bias=bias), features()
    head.calibrate(given * 3 + 1)
    centred = (given - head.mean[:, None, None]) / head.scale
    maps = torch.einsum("cd,ndhw->nchw", head.transform.weight, centred)
    extremes = maps.amax((2, 3)).clamp(min=0) + maps.amin((2, 3)).clamp(max=0)
    expected = extremes @ F.softplus(head.raw_weight).T + (head.bias if bias else 0)
    torch.testing.assert_close(head(given), expected)
    assert (standardise == "centre") == bool(head.mean.abs().max() > 0)
    assert (standardise == "none") == (float(head.scale) == 1)


def test_scale_makes_the_root_mean_square_one():
    head = made(standardise="scale", transform="none")
    head.calibrate(5 * features(600) + 2)
    maps = head.maps(5 * features(600) + 2)
    assert float(maps.square().mean()) == pytest.approx(1, rel=1e-6)
    head = made(standardise="centre", transform="none")
    head.calibrate(5 * features(600) + 2)
    assert float(head.maps(5 * features(600) + 2).mean((0, 2, 3)).abs().max()) < 1e-6


@pytest.mark.parametrize("weight", ["softplus", "abs", "relu"])
def test_classifier_is_never_negative(weight):
    assert float(made(weight=weight).class_weight.detach().min()) >= 0


def test_signed_weights_may_be_negative():
    assert float(made(weight="signed").class_weight.detach().min()) < 0


def test_training_draws_and_prediction_does_not():
    head, given = made(noise=1.0), features()
    torch.testing.assert_close(head(given), head(given), rtol=0, atol=0)
    head.train()
    drawn = [head(given, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    means = made(pooling="mean")
    assert torch.equal(means.train()(given), means.eval()(given))


def test_seed_decides_the_start_and_leaves_the_global_state_alone():
    before = torch.random.get_rng_state()
    starts = [InfoDisentHead(D, K, HeadOptions(seed=seed)).raw_weight for seed in (0, 0, 1)]
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
    assert torch.equal(before, torch.random.get_rng_state())


def test_gradients_of_every_parameter_are_checked_numerically():
    head, given = made(estimator="max", bias=True), features(2)
    parameters = tuple(head.parameters())
    names = [name for name, _ in head.named_parameters()]

    def logits(*values):
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), (given,))

    assert torch.autograd.gradcheck(logits, parameters, eps=1e-7, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, D + 1, 3, 3), (2, D, 3), (D, 3, 3)])
def test_features_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"^features: expected a tensor of shape \(N, 5, h, w\), got"):
        made().maps(torch.zeros(shape, dtype=torch.float64))


def test_constant_features_are_refused():
    with pytest.raises(ValueError, match=r"^features: expected features that vary"):
        made(standardise="centre").calibrate(torch.ones(3, D, 2, 2))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("transform", "qr"),
        ("pooling", "min"),
        ("estimator", "st"),
        ("weight", "exp"),
        ("standardise", "batch"),
        ("top_k", 0),
        ("temperature", 0.0),
        ("noise", -1.0),
        ("noise", float("nan")),
        ("seed", -1),
    ],
)
def test_options_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        HeadOptions(**{name: value})
