"""Perturbations of pairs, alone and inside Captum's infidelity and sensitivity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from captum.metrics import infidelity, sensitivity_max
from families import family_named
from torch import Tensor

from captum_m2ib.metrics import infidelity_perturbation, sensitivity_perturbation

PIXELS = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
IDS = torch.tensor([[62, 5, 7, 5, 9, 63], [62, 4, 8, 63, 1, 1]])
MASKABLE = torch.tensor([[False, True, True, True, True, False], [False, True, True, False, False, False]])
OPTIONS: dict[str, Any] = {"maskable": MASKABLE, "vocabulary": range(3, 60)}


def repeated(tensor: Tensor, count: int) -> Tensor:
    return tensor.repeat_interleave(count, 0)


def test_infidelity_perturbations_are_what_was_taken_away():
    perturb = infidelity_perturbation(noise=0.3, token_share=0.5, **OPTIONS)
    (noise, replaced), (pixels, ids) = perturb((repeated(PIXELS, 500), repeated(IDS, 500)))
    torch.testing.assert_close(repeated(PIXELS, 500) - noise, pixels)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.02) and float(noise.mean()) == pytest.approx(0, abs=0.01)
    before, open_to_change = repeated(IDS, 500), repeated(MASKABLE, 500)
    assert bool((ids[~open_to_change] == before[~open_to_change]).all())
    assert replaced.is_floating_point() and bool((replaced == (ids != before)).all()) and ids.dtype == IDS.dtype
    count = int(open_to_change.sum())
    share = float(replaced[open_to_change].mean())
    assert share == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(count))
    drawn = ids[replaced.bool()]
    assert int(drawn.min()) >= 3 and int(drawn.max()) < 60 and len(drawn.unique()) == 57


def test_replacements_are_drawn_evenly_from_all_other_words():
    perturb = sensitivity_perturbation(maskable=torch.ones(1, 1, dtype=torch.bool), vocabulary=(3, 5, 8, 9))
    (ids,) = perturb(torch.full((3000, 1), 5), 1.0)
    counts = torch.bincount(ids.flatten(), minlength=10)[[3, 5, 8, 9]].tolist()
    assert counts[1] == 0
    for count in (counts[0], *counts[2:]):
        assert count == pytest.approx(1000, abs=4 * math.sqrt(3000 * 2 / 9))


def test_sensitivity_perturbations_grow_with_the_radius():
    rows = 400
    inputs = (repeated(PIXELS, rows), repeated(IDS, rows))
    pixels, ids = sensitivity_perturbation(**OPTIONS)(inputs, 0.0)
    assert torch.equal(pixels, inputs[0]) and torch.equal(ids, inputs[1])
    pixels, ids = sensitivity_perturbation(token_share=2.0, **OPTIONS)(inputs, 0.2)
    change = pixels - inputs[0]
    assert float(change.abs().max()) <= 0.2 + 1e-6 and float(change.std()) == pytest.approx(
        0.2 / math.sqrt(3), rel=0.03
    )
    where = repeated(MASKABLE, rows)
    share = float((ids != inputs[1])[where].float().mean())
    assert share == pytest.approx(0.4, abs=4 * math.sqrt(0.24 / int(where.sum())))
    assert bool((ids == inputs[1])[~where].all())
    _, ids = sensitivity_perturbation(token_share=0.0, **OPTIONS)(inputs, 5.0)
    assert torch.equal(ids, inputs[1])
    _, ids = sensitivity_perturbation(**OPTIONS)(inputs, 5.0)
    assert bool((ids != inputs[1])[where].all())


@pytest.mark.parametrize("make", [infidelity_perturbation, sensitivity_perturbation])
def test_the_seed_decides_and_the_global_state_is_left_alone(make):
    state = torch.get_rng_state()

    def draws(seed: int) -> list[Any]:
        perturb = make(seed=seed, **OPTIONS)
        return [perturb((PIXELS, IDS)) for _ in range(2)]

    first, again, other = draws(1), draws(1), draws(2)
    torch.testing.assert_close(first, again, rtol=0, atol=0)

    def pixels(found: Any) -> Tensor:
        return found[0][0] if isinstance(found[0], tuple) else found[0]

    assert not torch.equal(pixels(first[0]), pixels(first[1])) and not torch.equal(pixels(first[0]), pixels(other[0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_pictures_or_ids_alone():
    noise, pixels = infidelity_perturbation()(PIXELS)
    torch.testing.assert_close(PIXELS - noise, pixels)
    replaced, ids = infidelity_perturbation(token_share=1.0, **OPTIONS)(IDS)
    assert bool((replaced.bool() == MASKABLE).all()) and ids.shape == IDS.shape
    (pixels,) = sensitivity_perturbation()(PIXELS, 0.1)
    assert pixels.shape == PIXELS.shape
    half = infidelity_perturbation()(PIXELS.bfloat16())
    assert half[0].dtype == half[1].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: infidelity_perturbation(noise=-1), "noise: expected a number of at least 0"),
        (lambda: infidelity_perturbation(token_share=1.5), r"token_share: expected a probability in \[0, 1\]"),
        (lambda: sensitivity_perturbation(token_share=-1), "token_share: expected a number of at least 0"),
        (lambda: sensitivity_perturbation()(PIXELS, -1.0), "perturb_radius: expected a number of at least 0"),
        (lambda: infidelity_perturbation(maskable=MASKABLE.long()), r"maskable: expected a boolean tensor, \(N, L\)"),
        (lambda: infidelity_perturbation(vocabulary=[4, 4]), "vocabulary: expected at least two different ids"),
        (lambda: infidelity_perturbation()(IDS), "maskable: expected one because an input holds token ids"),
        (lambda: sensitivity_perturbation(maskable=MASKABLE)(IDS), "vocabulary: expected one because an input holds"),
        (lambda: infidelity_perturbation(**OPTIONS)(IDS.repeat(2, 1)[:3]), r"maskable: expected the shape .*\(3, 6\)"),
        (lambda: infidelity_perturbation(**OPTIONS)(IDS[:, :4]), r"maskable: expected the shape .*\(2, 4\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Setup:
    """The bottleneck on a tiny dual encoder, and perturbations that fit its captions."""

    def __init__(self, family: str) -> None:
        self.case = family_named(family).build()
        self.method = self.case.method()
        (mask,) = self.case.additional
        ids = self.case.inputs[1]
        special = (ids >= 60) | (mask == 0)
        self.options: dict[str, Any] = {"maskable": ~special, "vocabulary": range(3, 60), "seed": 4}
        self.settings = {"n_steps": 3, "n_samples": 2}


@pytest.fixture(scope="module", params=["clip", "closure"])
def setup(request: pytest.FixtureRequest) -> Setup:
    return Setup(request.param)


def test_infidelity_of_pairs(setup):
    case = setup.case
    attributions = case.attribute(setup.method, **setup.settings)
    options = {"additional_forward_args": case.additional, "n_perturb_samples": 6, "normalize": True}

    def measure(**more: Any) -> Tensor:
        perturb = infidelity_perturbation(**setup.options)
        return infidelity(case.forward, perturb, case.inputs, attributions, **options, **more)

    found = measure()
    assert found.shape == (3,) and bool((found.isfinite() & (found >= 0)).all())
    assert torch.equal(found, measure())
    # Captum may split the samples; the pairs are whole in every part.
    assert measure(max_examples_per_batch=6).shape == (3,)


def test_infidelity_is_zero_for_a_sum_and_its_gradient():
    """The oracle: for a sum of pixels and of words that are known, the map predicts every change."""
    values = torch.zeros(70, dtype=torch.float64)
    values[[5, 7, 9, 4, 8]] = torch.tensor([1.0, 2, 3, 4, 5], dtype=torch.float64)
    pixels = PIXELS.double()

    def score(pixels: Tensor, ids: Tensor) -> Tensor:
        return 2 * pixels.sum((1, 2, 3)) + values[ids].sum(1)

    # Replacements are worth nothing, so that replacing a word takes away what it was worth.
    options = {"maskable": MASKABLE, "vocabulary": range(20, 60)}
    attributions = (torch.full_like(pixels, 2.0), values[IDS])
    found = infidelity(score, infidelity_perturbation(**options), (pixels, IDS), attributions, n_perturb_samples=20)
    torch.testing.assert_close(found, torch.zeros(2, dtype=torch.float64), atol=1e-12, rtol=0)
    wrong = (torch.full_like(pixels, 2.0), values[IDS].flip(1))
    found = infidelity(score, infidelity_perturbation(**options), (pixels, IDS), wrong, n_perturb_samples=20)
    assert bool((found > 0.1).all())


def test_infidelity_of_pictures_with_the_caption_as_additional_argument(setup):
    case = setup.case
    pixels, ids = case.inputs
    additional = (ids, *case.additional)
    bits = setup.method.attribute(pixels, additional_forward_args=additional, **setup.settings)
    found = infidelity(
        case.forward,
        infidelity_perturbation(seed=1),
        pixels,
        bits,
        additional_forward_args=additional,
        n_perturb_samples=4,
        normalize=True,
    )
    assert found.shape == (3,) and bool((found.isfinite() & (found >= 0)).all())


# All passes have one batch size, so that nothing but the perturbation can change a map.
@pytest.mark.parametrize("samples", [1, 2])
def test_sensitivity_of_pairs(setup, samples):
    case = setup.case

    def measure(radius: float) -> Tensor:
        return sensitivity_max(
            setup.method.attribute,
            case.inputs,
            sensitivity_perturbation(**setup.options),
            perturb_radius=radius,
            n_perturb_samples=samples,
            max_examples_per_batch=3,
            additional_forward_args=case.additional,
            **setup.settings,
        )

    assert measure(0.0).tolist() == [0, 0, 0]
    small, large = measure(0.01), measure(1.0)
    assert bool((large > 0).all()) and float(large.mean()) > float(small.mean())
    assert torch.equal(small, measure(0.01))


@pytest.mark.parametrize("samples", [1, 2])
def test_sensitivity_of_pictures_with_the_caption_as_additional_argument(setup, samples):
    pixels, ids = setup.case.inputs

    def measure(radius: float) -> Tensor:
        return sensitivity_max(
            setup.method.attribute,
            pixels,
            sensitivity_perturbation(),
            perturb_radius=radius,
            n_perturb_samples=samples,
            max_examples_per_batch=3,
            additional_forward_args=(ids, *setup.case.additional),
            **setup.settings,
        )

    assert measure(0.0).tolist() == [0, 0, 0]
    assert bool((measure(0.5) > 0).all())
