"""Contract 5: a pair's bits do not depend on the batch it comes in, and the seed decides them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from families import Case, Family, family_named

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.engine.statistics import ChannelStatistics


def close(found: tuple, expected: tuple, family: Family | None = None, exact: bool = False) -> None:
    half = family is not None and "half" in family.features
    share = 1e-6 if exact else (0.1 if half else 1e-3)
    for one, other in zip(found, expected, strict=True):
        difference = (one - other).abs().flatten(1).amax(1)
        assert bool((difference <= share * other.abs().flatten(1).amax(1)).all()), difference


def rows(attributions: tuple, index) -> tuple:
    return tuple(attribution[index] for attribution in attributions)


SETTINGS = {"n_steps": 3, "n_samples": 2}


def test_batch_equals_single_and_order_does_not_matter(distinct: Family):
    case = distinct.build()
    exact = "half" not in distinct.features
    case = case.double() if exact else case
    whole = case.attribute(**SETTINGS)
    # The second caption is the one with padding.
    for index in ([1], [2, 0, 1]):
        close(case.select(index).attribute(**SETTINGS), rows(whole, index), distinct, exact)


@pytest.mark.parametrize("name", ["clip", "conv_maps", "torch_encoder", "xclip"])
def test_batch_equals_single_in_float32(name: str):
    case = family_named(name).build()
    whole, row = case.attribute(**SETTINGS), slice(1, 2)
    close(case.select(row).attribute(**SETTINGS), rows(whole, row))


@pytest.mark.parametrize("name", ["clip", "closure", "conv_maps", "sequence_first", "shared_tower"])
def test_internal_batch_size_changes_nothing(name: str):
    case = family_named(name).build().double()
    expected = case.attribute(n_steps=2, n_samples=3)
    # Some draws of a pair, all of one and a part of the next, and two pairs.
    for rows_at_once in (1, 4, 7):
        close(case.attribute(n_steps=2, n_samples=3, internal_batch_size=rows_at_once), expected, exact=True)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("prior", [None, "pair"])
def test_settings_keep_pairs_apart(prior, joint: bool):
    case = family_named("clip").build().double()
    method = case.method(statistics=[prior, prior])
    whole = case.attribute(method, joint=joint, **SETTINGS)
    chunked = case.attribute(method, joint=joint, internal_batch_size=3, **SETTINGS)
    close(chunked, whole, exact=True)
    alone = case.select(slice(1, 2)).attribute(method, joint=joint, **SETTINGS)
    close(alone, rows(whole, slice(1, 2)), exact=True)


@pytest.mark.parametrize("name", ["clip", "closure", "torch_encoder", "sequence_first"])
@pytest.mark.parametrize("prior", [None, "pair", "given"])
def test_padding_length_changes_nothing(name: str, prior):
    case = family_named(name).build().double()
    if prior == "given":
        width = 32 if name == "clip" else 16
        prior = ChannelStatistics(torch.linspace(-1, 1, width), torch.linspace(0.5, 2, width))
    method = case.method(statistics=[prior, prior])
    pixels, ids = case.inputs
    mask = case.additional[0]
    filler, none = torch.full((3, 4), 1), torch.zeros(3, 4, dtype=mask.dtype)
    padded = case.with_inputs((pixels, torch.cat([ids, filler], 1)), (torch.cat([mask, none], 1),))
    short, long = case.attribute(method, **SETTINGS), padded.attribute(method, **SETTINGS)
    assert not long[1][:, 6:].any()
    close((long[0], long[1][:, :6]), short, exact=True)
    trimmed = case.with_inputs((pixels[1:2], ids[1:2, :4]), (mask[1:2, :4],)).attribute(method, **SETTINGS)
    close((trimmed[0], trimmed[1]), (short[0][1:2], short[1][1:2, :4]), exact=True)


def test_padding_without_mask():
    case = family_named("clip").build().double()
    pixels, ids = case.inputs
    padded = torch.cat([ids, torch.full((3, 3), 1)], 1)
    short = case.with_inputs((pixels, ids), ()).attribute(**SETTINGS)
    long = case.with_inputs((pixels, padded), ()).attribute(**SETTINGS)
    close((long[0], long[1][:, :6]), short, exact=True)


def test_modalities_and_steps_draw_their_own_noise():
    from captum_m2ib.engine.gates import noise

    drawn = [noise(seed, layer, step, 4, (5, 6)) for seed in (0, 1) for layer in (0, 1) for step in (0, 1)]
    for index, one in enumerate(drawn):
        assert one.shape == (4, 5, 6) and one.dtype == torch.float32
        assert all(not torch.equal(one, other) for other in drawn[index + 1 :])
        assert not torch.equal(one[0], one[1])
    many = noise(0, 0, 0, 50, (40, 30)).double()
    assert abs(float(many.mean())) < 0.02 and abs(float(many.std()) - 1) < 0.02
    assert torch.equal(noise(0, 0, 0, 4, (9, 6))[:, :5], drawn[0])


def legacy_state() -> list:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global state is what is watched
    return [name, keys.tolist(), *rest]


def test_the_seed_decides_the_bits_and_the_global_random_state_is_neither_read_nor_changed(distinct: Family):
    case = distinct.build()
    torch.manual_seed(11)
    before = torch.get_rng_state(), legacy_state(), random.getstate()
    first = case.attribute(seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert legacy_state() == before[1] and random.getstate() == before[2]
    torch.manual_seed(12)
    assert all(map(torch.equal, case.attribute(seed=3), first))


@pytest.mark.parametrize("name", ["clip", "closure", "conv_maps"])
def test_another_seed_gives_other_bits(name: str):
    case = family_named(name).build()
    assert not any(map(torch.equal, case.attribute(seed=3), case.attribute(seed=4)))


def test_a_repeated_pair_gets_the_same_bits_twice():
    case = family_named("clip").build().double()
    twice = case.select([0, 0, 1]).attribute(**SETTINGS)
    close(rows(twice, slice(0, 1)), rows(twice, slice(1, 2)), exact=True)


def test_batch_as_long_as_the_caption():
    """Five pairs and a planted copy are six rows, like the six tokens."""
    for name in ("clip", "sequence_first", "closure"):
        case = family_named(name).build().double()
        many = case.select([0, 1, 2, 0, 1])
        close(rows(many.attribute(**SETTINGS), slice(0, 3)), case.attribute(**SETTINGS), exact=True)


def test_recommended_method_keeps_pairs_apart():
    case = family_named("clip").build().double()
    method = MultiModalInfoBottleneck(DualEncoder(case.roots[0]))
    whole = case.attribute(method, **SETTINGS)
    alone = case.select(slice(2, 3)).attribute(method, **SETTINGS)
    close(alone, rows(whole, slice(2, 3)), exact=True)


MEASURED = ("score_range", "score_closed")


def measure(case: Case, method: MultiModalInfoBottleneck | None = None, **settings) -> list:
    """What was measured of every pair's score before the descent, per modality."""
    method = method or case.method()
    given = {"additional_forward_args": case.additional or None, "n_steps": 1, "n_samples": 3, **settings}
    _, record = method.attribute_with_record(case.inputs, **given)
    return [torch.stack([getattr(modality, name) for name in MEASURED], 1) for modality in record.modalities]


def equal(found: list, expected: list) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


RANGES = ["clip", "conv_maps", "sequence_first", "shared_tower", "siglip2_naflex"]


@pytest.mark.parametrize(
    ("name", "joint"), [*((name, False) for name in RANGES), *((name, True) for name in ("clip", "shared_tower"))]
)
def test_the_measured_range_is_the_pairs_own(name: str, joint: bool):
    case = family_named(name).build().double()
    whole = measure(case, joint=joint)
    for index in ([2, 0, 1], [1]):
        equal(measure(case.select(index), joint=joint), rows(whole, index))
    for settings in ({"internal_batch_size": 1}, {"internal_batch_size": 4}, {"seed": 8, "n_samples": 7}):
        equal(measure(case, joint=joint, **settings), whole)
    assert all(float(part[:, 0].std()) > 0 and bool((part[:, 0] > 0).all()) for part in whole)


@pytest.mark.parametrize("name", ["clip", "siglip2_naflex", "xclip", "open_clip_resnet"])
def test_the_measured_range_of_gated_inputs_is_the_pairs_own(name: str):
    case = family_named(name).build().double()
    method = MultiModalInfoBottleneck(case.forward)
    whole = measure(case, method)
    equal(measure(case.select([1, 2, 0]), method), rows(whole, [1, 2, 0]))
    equal(measure(case.select(slice(1, 2)), method), rows(whole, slice(1, 2)))
    equal(measure(case, method, internal_batch_size=3), whole)


@pytest.mark.parametrize("name", ["clip", "closure", "torch_encoder", "sequence_first"])
@pytest.mark.parametrize("prior", [None, "pair"])
def test_padding_length_does_not_change_the_measured_range(name: str, prior):
    case = family_named(name).build().double()
    method = case.method(statistics=[prior, prior])
    pixels, ids = case.inputs
    mask = case.additional[0]
    filler, none = torch.full((3, 4), 1), torch.zeros(3, 4, dtype=mask.dtype)
    padded = case.with_inputs((pixels, torch.cat([ids, filler], 1)), (torch.cat([mask, none], 1),))
    whole = measure(case, method)
    equal(measure(padded, method), whole)
    trimmed = case.with_inputs((pixels[1:2], ids[1:2, :4]), (mask[1:2, :4],))
    equal(measure(trimmed, method), rows(whole, slice(1, 2)))


def test_given_ranges_belong_to_their_pairs():
    case = family_named("clip").build().double()
    ranges = torch.tensor([0.1, 0.4, 2.0])
    whole = case.attribute(score_range=ranges, **SETTINGS)
    for chunk in (1, 3, 4):
        close(case.attribute(score_range=ranges, internal_batch_size=chunk, **SETTINGS), whole, exact=True)
    for pair in range(3):
        alone = case.select(slice(pair, pair + 1)).attribute(score_range=float(ranges[pair]), **SETTINGS)
        close(alone, rows(whole, slice(pair, pair + 1)), exact=True)
    order = [2, 0, 1]
    close(case.select(order).attribute(score_range=ranges[order], **SETTINGS), rows(whole, order), exact=True)
