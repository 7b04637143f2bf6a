"""Pairs that score as high with everything closed: named in a warning, with few and finite bits."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from families import family_named
from torch import Tensor, nn

import captum_m2ib
from captum_m2ib import (
    ContrastiveInfoBottleneck,
    InfoBottleneck,
    LayerMultiModalInfoBottleneck,
    MultiModalInfoBottleneck,
    NothingToExplainWarning,
    PatchLayout,
)


@contextmanager
def silent() -> Iterator[None]:
    """Nothing may be warned of here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def warned_of(which: str) -> Iterator[None]:
    """One warning, of these pairs, that points at a line of a test."""
    with pytest.warns(NothingToExplainWarning) as caught:
        yield
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}
    told = [str(warning.message) for warning in caught if warning.category is NothingToExplainWarning]
    assert len(told) == 1 and told[0].startswith(f"inputs: the score of pair {which} is about as high"), told


def pictures(count: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    """Grey texture on white."""
    drawn = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn[..., 8:] = 1.0
    return drawn.to(dtype)


def darkness(given: Tensor, sign: Tensor) -> Tensor:
    """How dark a corner is, or, where the sign is -1, how bright."""
    return sign * torch.tanh(1 - given[..., :5, :5].mean((1, 2, 3)))


def ignoring(given: Tensor) -> Tensor:
    return 0.3 + 0.0 * given.mean((1, 2, 3))


def test_it_is_a_user_warning_of_the_package():
    assert issubclass(NothingToExplainWarning, UserWarning) and "NothingToExplainWarning" in captum_m2ib.__all__


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_score_that_ignores_what_it_is_given(dtype: torch.dtype):
    given = pictures(3, dtype)
    method = MultiModalInfoBottleneck(ignoring, [None])
    with warned_of("0, 1, 2"):
        bits, record = method.attribute_with_record(given, n_steps=30)
    (found,) = record.modalities
    assert found.score_range.tolist() == [0.0] * 3 and found.score_closed.tolist() == pytest.approx([0.3] * 3)
    # Only the information is descended upon, so that everything closes, fully.
    assert not bits.any() and found.bits.tolist() == [0.0] * 3
    assert bool((found.information.diff(dim=0) < 0).all())
    with warned_of("0, 1, 2"):
        soon = method.attribute(given)
    assert bool(soon.isfinite().all()) and float(soon.sum()) < 0.01 * float(found.information[0].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prior", [None, "pair"])
def test_the_same_at_a_layer(dtype: torch.dtype, prior):
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 4, 4, 4).to(dtype).eval()

    def score(given: Tensor) -> Tensor:
        return 0.3 + 0.0 * stem(given).mean((1, 2, 3))

    bits = {}
    for n_steps in (1, 30):
        method = MultiModalInfoBottleneck(score, [stem], [PatchLayout((4, 4))], statistics=[prior])
        with warned_of("0, 1, 2"):
            maps, record = method.attribute_with_record(pictures(3, dtype), n_steps=n_steps, lr=0.5)
        assert record.modalities[0].score_range.tolist() == [0.0] * 3
        assert bool(maps.isfinite().all()) and bool((maps >= 0).all())
        bits[n_steps] = float(maps.sum())
    assert bits[30] < 1e-3 * bits[1]


@pytest.mark.parametrize("noise", [1e-7, 1e-9])
def test_rounding_is_not_explained(noise: float):
    def score(given: Tensor) -> Tensor:
        return 1.0 + noise * given.mean((1, 2, 3))

    with warned_of("0, 1, 2"):
        bits, record = MultiModalInfoBottleneck(score, [None]).attribute_with_record(pictures(3), n_steps=30)
    assert record.modalities[0].score_range.tolist() == [0.0] * 3 and not bits.any()


def test_a_score_that_is_higher_with_everything_closed():
    given = pictures(3)
    with warned_of("0, 1, 2"):
        bits, record = MultiModalInfoBottleneck(darkness, [None]).attribute_with_record(
            given, additional_forward_args=-torch.ones(3)
        )
    (found,) = record.modalities
    assert bool((found.score_closed > found.score_before).all())
    # The unit is then how far the score varies over what may be closed; it is no excuse for maps without bound.
    assert bool((found.score_range > 0).all()) and bool((found.score_range < 1).all())
    assert bool(bits.isfinite().all()) and float(bits.sum()) < 0.01 * float(found.information[0].sum())
    with silent():
        other = MultiModalInfoBottleneck(darkness, [None]).attribute(given, additional_forward_args=torch.ones(3))
    assert bool((other.flatten(1).sum(1) > bits.flatten(1).sum(1)).all())


def test_an_empty_map_is_told():
    generator = torch.Generator().manual_seed(0)
    given = torch.rand(3, 3, 16, 16, generator=generator)

    def score(pictures: Tensor) -> Tensor:
        return pictures.mean((1, 2, 3))

    method = MultiModalInfoBottleneck(score, [None])
    with pytest.warns(NothingToExplainWarning, match="beta: no part of pair 0, 1, 2 was worth its bits"):
        bits = method.attribute(given, score_range=[10.0, 20.0, 30.0])
    assert not bits.any()
    with silent():
        bits = method.attribute(given, score_range=0.01)
    assert bool(bits.flatten(1).any(1).all())


@pytest.mark.parametrize("internal_batch_size", [None, 1, 10, 20, 30, 1000])
@pytest.mark.parametrize(("hopeless", "told"), [([1, 3], "1, 3"), ([4], "4"), ([0, 2, 3, 4], "0, 2, 3, 4")])
def test_the_pairs_are_named(internal_batch_size: int | None, hopeless: list[int], told: str):
    signs = torch.ones(5)
    signs[hopeless] = -1.0
    method = MultiModalInfoBottleneck(darkness, [None])
    with warned_of(told):
        method.attribute(pictures(), additional_forward_args=signs, n_steps=1, internal_batch_size=internal_batch_size)


def test_no_more_than_five_are_named():
    method = MultiModalInfoBottleneck(darkness, [None])
    with warned_of("0, 1, 2, 3, 4, ..."):
        method.attribute(pictures(7), additional_forward_args=-torch.ones(7), n_steps=1, internal_batch_size=20)


@pytest.mark.parametrize("joint", [False, True])
def test_a_pair_is_named_once_for_all_its_modalities(joint: bool):
    def score(first: Tensor, second: Tensor, sign: Tensor) -> Tensor:
        return darkness(first, sign) + darkness(second, sign)

    signs = torch.tensor([1.0, -1.0, 1.0])
    method = MultiModalInfoBottleneck(score, [None, None])
    with warned_of("1"):
        method.attribute((pictures(3), pictures(3).flip(2)), additional_forward_args=signs, joint=joint, n_steps=1)


def test_one_modality_that_counts_for_nothing_is_enough():
    def score(first: Tensor, second: Tensor) -> Tensor:
        return darkness(first, torch.ones(())) + 0.0 * second.mean((1, 2, 3))

    pair = pictures(2), pictures(2).flip(2)
    method = MultiModalInfoBottleneck(score, [None, None])
    with warned_of("0, 1"):
        _, record = method.attribute_with_record(pair, n_steps=1)
    first, second = record.modalities
    assert bool((first.score_range > 0.1).all()) and second.score_range.tolist() == [0.0, 0.0]
    # Against one score it shares the other's range, and closes all the same.
    with pytest.warns(NothingToExplainWarning, match="beta: no part of pair 0, 1 was worth its bits"):
        bits = method.attribute(pair, joint=True)
    assert bool(bits[0].flatten(1).any(1).all()) and not bits[1].any()


def test_other_methods_warn_too():
    torch.manual_seed(0)
    stem = nn.Conv2d(3, 4, 4, 4).eval()

    def score(given: Tensor) -> Tensor:
        return 0.3 + 0.0 * stem(given).mean((1, 2, 3))

    with warned_of("0, 1"):
        LayerMultiModalInfoBottleneck(score, stem).attribute(pictures(2), n_steps=1)
    with warned_of("0, 1"):
        InfoBottleneck(score, [stem], [PatchLayout((4, 4))]).attribute(pictures(2), n_steps=1)
    case = family_named("clip").build()
    ids, mask = case.inputs[1], case.additional[0]
    # A rival that is the pair itself takes everything away.
    contrast = ContrastiveInfoBottleneck(case.forward, floor=None)
    with warned_of("0, 1, 2"):
        contrast.attribute(case.inputs[0], additional_forward_args=(ids, ids, mask, mask), n_steps=1)


def test_nothing_is_said_of_pairs_with_something_to_lose():
    with silent():
        method = MultiModalInfoBottleneck(darkness, [None])
        bits, record = method.attribute_with_record(pictures(), additional_forward_args=torch.ones(5))
    (found,) = record.modalities
    assert bool((found.score_before - found.score_closed > 0.1 * found.score_range).all())
    assert bool((bits.flatten(1).sum(1) > 0.1).all())


def test_nothing_is_said_where_nothing_was_measured():
    case = family_named("clip").build()
    with silent():
        given = {"additional_forward_args": -torch.ones(5), "n_steps": 1}
        _, record = MultiModalInfoBottleneck(darkness, [None]).attribute_with_record(
            pictures(), score_range=0.2, **given
        )
        case.attribute(MultiModalInfoBottleneck.published(case.forward), n_steps=1)
        classifier = nn.Sequential(nn.Conv2d(3, 2, 4, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        InfoBottleneck(classifier, ["0"]).attribute(pictures(), target=0, n_steps=1)
    assert record.modalities[0].score_closed is None


def test_long_descents_upon_a_score_that_is_flat():
    def score(given: Tensor) -> Tensor:
        return 0.3 + 1e-5 * torch.tanh(50 * (given[:, 0, 3, 3] - 0.5))

    bits = MultiModalInfoBottleneck(score, [None]).attribute(pictures(), n_steps=200, n_samples=2)
    assert bool(bits.isfinite().all()) and float(bits.sum()) / 5 < 16 * 16 * 3 * math.log2(16)
