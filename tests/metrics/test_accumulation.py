"""A metric fed batch by batch is the metric of all examples."""

from __future__ import annotations

import pytest
import torch

from captum_m2ib.metrics import Accumulated, pointing_game, relevance_mass, summarise


def test_batches_sum_up_to_the_whole():
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(7, 6, 5, generator=generator)
    masks = torch.rand(7, 6, 5, generator=generator) > 0.6
    whole = relevance_mass(maps, masks)
    found = Accumulated(relevance_mass)
    for rows in (slice(0, 3), slice(3, 4), slice(4, 7)):
        torch.testing.assert_close(found.update(maps[rows], masks[rows]), whole[rows])
    torch.testing.assert_close(found.values, whole.double())
    assert found.compute() == summarise(whole)
    other = Accumulated(relevance_mass)
    other.update(maps[:2], masks[:2])
    other.merge(found)
    assert other.compute().count == 9
    found.reset()
    assert not len(found.values)
    with pytest.raises(ValueError, match="at least one"):
        found.compute()


def test_settings_hold_for_every_batch_and_missing_values_are_counted():
    maps, masks = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    maps[:, 0, 0], masks[0, 0, 1] = 1.0, True
    near, exact = Accumulated(pointing_game, tolerance=1.0), Accumulated(pointing_game)
    assert near.update(maps[:1], masks[:1]).item() == 1 and exact.update(maps[:1], masks[:1]).item() == 0
    exact.update(maps[1:], masks[1:])
    assert (exact.compute().count, exact.compute().omitted) == (1, 1)


def test_what_is_no_value_per_example_is_refused():
    for metric, got in ((lambda x: x.mean(), r"shape \(\)"), (lambda x: 1.0, "float")):
        with pytest.raises(ValueError, match=f"^metric: expected one value per example, a tensor .N,., got {got}"):
            Accumulated(metric).update(torch.ones(3))
