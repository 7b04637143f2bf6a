"""Statistics merged batch by batch equal those of all the data at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import clip_case, unpack
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_m2ib.engine.statistics import (
    MINIMUM_STD,
    ChannelStatistics,
    RunningStatistics,
    estimate_statistics,
    floor_std,
    load_statistics,
    positions_of,
    save_statistics,
)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=2, max_size=8).filter(lambda counts: sum(counts) >= 2),
    offset=st.sampled_from([0.0, 1e3, -1e5]),
    seed=st.integers(0, 99),
)
def test_merged_batches_equal_all_data_at_once(counts, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(sum(counts), 3, generator=generator, dtype=torch.float64) + offset
    running = RunningStatistics()
    for batch in data.split(counts):
        running.update(batch)
    result = running.result()
    assert result.count == len(data)
    torch.testing.assert_close(result.mean, data.mean(0).float())
    torch.testing.assert_close(result.std, floor_std(data.std(0)).float(), rtol=1e-5, atol=1e-7)


def test_float32_data_keep_their_digits():
    data = torch.randn(10_000, 2, generator=torch.Generator().manual_seed(0)) + 1000
    running = RunningStatistics()
    for batch in data.split(777):
        running.update(batch)
    torch.testing.assert_close(running.result().std, data.double().std(0).float(), rtol=1e-6, atol=0)


def test_too_little_data_is_an_error():
    running = RunningStatistics()
    for count in (0, 1):
        with pytest.raises(ValueError, match=f"statistics: expected at least 2 positions.* got {count}"):
            running.result()
        running.update(torch.zeros(1, 2))


def test_channels_that_hardly_vary_are_floored():
    std = floor_std(torch.tensor([[10.0, 0.0, 5.0], [0.0, 0.0, 0.0]]))
    assert std.tolist() == [[10.0, pytest.approx(10 * MINIMUM_STD), 5.0], [1.0, 1.0, 1.0]]
    running = RunningStatistics()
    running.update(torch.full((4, 3), 2.0))
    assert running.result().std.tolist() == [1.0, 1.0, 1.0]


def test_positions_are_rows_of_channels_without_padding():
    tokens = torch.arange(12.0).view(2, 3, 2)
    assert positions_of(tokens, 2).tolist() == tokens.reshape(6, 2).tolist()
    real = torch.tensor([[True, True, False], [True, False, False]])[..., None]
    assert positions_of(tokens, 2, real).tolist() == [[0, 1], [2, 3], [6, 7]]
    maps = torch.arange(16.0).view(2, 2, 2, 2)
    expected = [maps[n, :, i, j].tolist() for n in range(2) for i in range(2) for j in range(2)]
    assert positions_of(maps, 1).tolist() == expected
    assert positions_of(torch.zeros(4, 5), 1).shape == (4, 5)


def test_saved_and_loaded_are_equal(tmp_path):
    one = ChannelStatistics(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]), 12)
    two = ChannelStatistics(torch.randn(6)[::2], torch.rand(3) + 0.1)
    path = tmp_path / "statistics.safetensors"
    save_statistics(path, {"vision.layers.0": one})
    save_statistics(path, {"vision.layers.0": one, "text.mean": two})
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    loaded = load_statistics(path)
    assert set(loaded) == {"vision.layers.0", "text.mean"}
    for name, expected in (("vision.layers.0", one), ("text.mean", two)):
        assert torch.equal(loaded[name].mean, expected.mean) and torch.equal(loaded[name].std, expected.std)
        assert loaded[name].count == expected.count


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(2), torch.ones(3), "one shape"),
        (torch.zeros(2, 2), torch.ones(2, 2), "one shape"),
        (torch.zeros(2), torch.zeros(2), "positive"),
        (torch.zeros(2), torch.tensor([1.0, float("nan")]), "positive"),
        (torch.tensor([0.0, float("inf")]), torch.ones(2), "finite means"),
    ],
)
def test_impossible_statistics_are_refused(mean, std, message):
    with pytest.raises(ValueError, match=f"statistics: .*{message}"):
        ChannelStatistics(mean, std)


def test_estimate_equals_statistics_of_all_real_positions():
    case = clip_case()
    model, (pixels, ids), mask = case.roots[0], case.inputs, case.additional[0]
    layers = [model.vision_model.encoder.layers[0], "text_model.embeddings"]
    batches = [(pixels[:2], ids[:2], mask[:2]), (pixels[2:], ids[2:], mask[2:])]
    found = estimate_statistics(case.forward, layers, batches)
    assert list(found) == ["vision_model.encoder.layers.0", "text_model.embeddings"]
    held: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: held.__setitem__(name, unpack(output)))
        for name, module in (("image", layers[0]), ("text", model.text_model.embeddings))
    ]
    with torch.no_grad():
        case.forward(pixels, ids, mask)
    for handle in handles:
        handle.remove()
    assert not mask.bool().all()
    for name, units in (("image", held["image"].flatten(0, 1)), ("text", held["text"][mask.bool()])):
        estimate = found["vision_model.encoder.layers.0" if name == "image" else "text_model.embeddings"]
        assert estimate.count == len(units)
        torch.testing.assert_close(estimate.mean, units.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(estimate.std, units.std(0), rtol=1e-4, atol=1e-6)


def test_estimate_reads_prepared_pairs_and_the_input_side():
    case = clip_case()
    pairs = SimpleNamespace(inputs=case.inputs, additional_forward_args=case.additional)
    layer = "vision_model.encoder.layers.1"
    (at_input,) = estimate_statistics(case.forward, [layer], [pairs], attribute_to_layer_input=True).values()
    (before,) = estimate_statistics(case.forward, ["vision_model.encoder.layers.0"], [pairs]).values()
    torch.testing.assert_close(at_input.mean, before.mean)
    torch.testing.assert_close(at_input.std, before.std)


def test_estimate_of_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"^statistics: expected at least 2 positions to estimate from, got 0"):
        estimate_statistics(clip_case().forward, ["text_model.embeddings"], [])


def test_damaged_file_is_an_error(tmp_path):
    path = tmp_path / "statistics.safetensors"
    path.write_bytes(b"no statistics")
    with pytest.raises(OSError, match=r"^statistics: .*is damaged"):
        load_statistics(path)
