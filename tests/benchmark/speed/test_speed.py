"""The speed benchmark: its published loop is the published one, and its report holds what was measured."""

from __future__ import annotations

import csv
import functools
import os
import re
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import captions, pictures, tiny_clip
from torch import nn
from torch.nn.functional import logsigmoid

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.methods import METHODS
from captum_m2ib.benchmark.speed import loops as speed
from captum_m2ib.benchmark.speed import ways
from captum_m2ib.benchmark.speed.loops import blocks, published_map, run_ours, run_published
from captum_m2ib.benchmark.speed.ways import WAYS, Cost, SpeedReport, measure, render, write

MEBIBYTE = 2**20


def tiny_encoder(seed: int = 0) -> DualEncoder:
    return DualEncoder(tiny_clip(seed=seed))


def tiny_pairs(count: int, tokens: int = 6, seed: int = 0) -> Any:
    ids, mask = captions(pairs=1)
    return pictures(pairs=count), ids.expand(count, -1).clone(), mask.expand(count, -1).clone()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The benchmark on a small model, with peak memory made up: it is taken in other processes."""
    monkeypatch.setattr(speed, "base32_encoder", tiny_encoder)
    monkeypatch.setattr(speed, "random_pairs", tiny_pairs)
    monkeypatch.setattr(ways, "_peak", lambda name, *_: 10.0 * list(WAYS).index(name))
    return monkeypatch


def reference_map(
    encoder: Any, inputs: Any, modality: int, layer: nn.Module, beta: float, steps: int, seed: int
) -> Any:
    """Gates after steps - 1 updates: Adam on -mean score + beta * mean of 1/2 (m^2 + v - 1 - log v), v = (1 - g)^2."""
    copies = [part.expand(10, *part.shape[1:]) for part in inputs]
    kept: dict[str, Any] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        kept["hidden"] = (output if isinstance(output, torch.Tensor) else output[0])[:1].detach()

    handle = layer.register_forward_hook(keep)
    encoder(*inputs)
    handle.remove()
    hidden = kept["hidden"]
    alpha, first, second = torch.full_like(hidden, 5.0), torch.zeros_like(hidden), torch.zeros_like(hidden)
    for step in range(steps):
        alpha.requires_grad_()
        gate = torch.sigmoid(alpha)
        nats = 0.5 * ((gate * hidden) ** 2 + torch.sigmoid(-alpha) ** 2 - 1) - logsigmoid(-alpha)
        draws = np.random.default_rng((seed, modality, step)).standard_normal(
            (hidden.shape[1], 10, hidden.shape[2]), "f4"
        )
        mixed = gate * hidden + torch.sigmoid(-alpha) * torch.from_numpy(draws).transpose(0, 1).to(hidden)
        put = functools.partial(
            lambda mixed, *a: mixed if isinstance(a[2], torch.Tensor) else (mixed, *a[2][1:]), mixed
        )
        handle = layer.register_forward_hook(put)
        (gradient,) = torch.autograd.grad(beta * nats.mean() - encoder(*copies).mean(), alpha)
        handle.remove()
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        update = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        alpha = alpha.detach() - update
    return nats[0].detach()


@pytest.mark.parametrize("modality", [0, 1])
@pytest.mark.parametrize(("beta", "steps", "seed"), [(0.1, 10, 0), (0.3, 4, 5), (0.1, 1, 2)])
def test_the_published_loop_against_its_formulas(modality: int, beta: float, steps: int, seed: int):
    encoder = DualEncoder(tiny_clip().double())
    pixels, ids, mask = tiny_pairs(1)
    inputs = (pixels.double(), ids, mask)
    layer = blocks(encoder, 1)[modality]
    found = published_map(encoder, inputs, modality, layer, steps, beta, seed=seed)
    expected = reference_map(encoder, inputs, modality, layer, beta, steps, seed)
    assert found.shape == expected.shape == ((17, 6)[modality], 32)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert not layer._forward_hooks


def test_the_published_loop_leaves_no_hook_after_an_error():
    encoder, (pixels, ids, mask) = tiny_encoder(), tiny_pairs(1)
    layer = blocks(encoder, 1)[0]
    with pytest.raises(ValueError, match="integer token ids"):
        published_map(encoder, (pixels, ids.float(), mask), 0, layer)
    assert not layer._forward_hooks


def test_ours_with_one_step_less_gives_the_published_maps():
    encoder = DualEncoder(tiny_clip().double())
    pixels, ids, mask = tiny_pairs(2)
    pairs = (pixels.double(), ids, mask)
    theirs, ours = run_published(encoder, pairs, 1), run_ours(encoder, pairs, 1, n_steps=9)
    for published, found in zip(theirs, ours, strict=True):
        assert found.shape == (2, *published.shape)
        torch.testing.assert_close(found[0], published, rtol=1e-5, atol=1e-7)


def test_blocks_are_those_of_both_towers():
    model = tiny_clip()
    image, text = blocks(DualEncoder(model), 2)
    assert image is model.vision_model.encoder.layers[2] and text is model.text_model.encoder.layers[2]
    for index in (-1, 4):
        with pytest.raises(ValueError, match=rf"^layer: expected a block from 0 to 3, got {index}"):
            blocks(DualEncoder(model), index)


def test_measure(tiny: pytest.MonkeyPatch):
    report = measure(repeats=2, batch=3, layer=1)
    assert (report.batch, report.device, list(report.costs)) == (3, "cpu", list(WAYS))
    for place, cost in enumerate(report.costs.values()):
        low, median, high = cost.seconds
        assert 0 < low <= median <= high and cost.peak_mebibytes == 10.0 * place and cost.gflop > 0
    flops = {name: cost.gflop for name, cost in report.costs.items()}
    assert flops["published"] > 2 * flops["ours"] and flops["fine"] > 3 * flops["default"] > 3 * flops["picture"]
    assert flops["batched"] <= flops["ours"] * (1 + 1e-9)
    assert flops["integrated"] > flops["picture"] > flops["grad-eclip"] > 0
    assert all(0 <= difference < 0.01 for difference in report.differences)
    assert_table(report)


def test_each_way_makes_the_maps_that_the_scenes_are_asked_about():
    encoder, pairs = tiny_encoder(), tiny_pairs(1)
    arguments = {"additional_forward_args": pairs[2]}
    for way in WAYS.values():
        if way.method is None or way.method in ("m2ib-published", "integrated-gradients"):
            continue
        expected = METHODS[way.method](encoder).attribute(pairs[:2], **arguments)
        assert all(map(torch.equal, way.run(encoder, pairs, 1), expected))
    assert {way.method for way in WAYS.values()} - {None} <= set(METHODS)


def test_the_model_is_made_without_touching_the_random_state(monkeypatch: pytest.MonkeyPatch):
    small = tiny_clip().config
    monkeypatch.setattr("transformers.CLIPConfig", lambda: small)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert isinstance(speed.base32_encoder(), DualEncoder)
    assert torch.equal(before, torch.get_rng_state())
    first, second, other = (speed.base32_encoder(seed).model.text_projection.weight for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_pairs_are_those_of_clip():
    pixels, ids, mask = speed.random_pairs(2)
    assert pixels.shape == (2, 3, 224, 224) and ids.shape == mask.shape == (2, 12)
    assert (ids[:, 0] == 49406).all() and (ids[:, -1] == 49407).all() and ids[:, 1:-1].max() < 49406
    assert torch.equal(speed.random_pairs(2)[1], ids) and torch.equal(speed.random_pairs(1)[1][0, :1], ids[0, :1])


@pytest.mark.parametrize(("name", "settings"), [("repeats", {"repeats": 0}), ("batch", {"batch": -1})])
def test_numbers_are_checked_before_any_work(monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, int]):
    monkeypatch.setattr(speed, "base32_encoder", lambda: pytest.fail("work before the check"))
    with pytest.raises(ValueError, match=rf"^{name}: expected at least 1, got {settings[name]}"):
        measure(**settings)


def assert_table(report: SpeedReport) -> None:
    lines = render(report).splitlines()
    assert len(lines) == 6 + len(WAYS)
    assert lines[0].startswith("Both maps of one pair, ") and lines[0].endswith(f" on {report.device}")
    assert re.split(r" {2,}", lines[1].strip()) == ["GFLOP", "seconds (min, max)", "peak MiB, whole run"]
    for line, way in zip(lines[2:], WAYS.values(), strict=False):
        found, flops, seconds, peak = re.split(r" {2,}", line)
        assert found == way.title.format(batch=report.batch) and flops.isdigit() and peak.lstrip("-").isdigit()
        assert re.fullmatch(r"\d+\.\d\d \(\d+\.\d\d, \d+\.\d\d\)", seconds)
    for line in lines[-4:-1]:
        assert re.fullmatch(r"[^:]+: \d+\.\d times fewer FLOPs, \d+\.\d times less time", line)
    assert re.fullmatch(r"largest difference .*: image \d\.\de-?\+?\d+, text \d\.\de-?\+?\d+", lines[-1])


def made_up() -> SpeedReport:
    costs = {name: Cost(900.0, (1, 2, 3), 70.0) for name in WAYS}
    costs |= {"published": Cost(1000.4, (2, 3, 4), 900.6), "ours": Cost(250.1, (1, 1.5, 2), 80.0)}
    return SpeedReport(costs, 8, (1.5e-6, 2e-7), "cpu")


def test_render():
    assert_table(made_up())
    lines = render(made_up()).splitlines()
    assert re.split(r" {2,}", lines[2]) == ["published loop", "1000", "3.00 (2.00, 4.00)", "901"]
    assert lines[-4] == "published loop and ours at its layer: 4.0 times fewer FLOPs, 2.0 times less time"
    assert (
        lines[-2] == "Integrated Gradients and our default, picture alone: 1.0 times fewer FLOPs, 1.0 times less time"
    )
    assert lines[-1].endswith("image 1.5e-06, text 2.0e-07")


def test_costs_are_written_for_other_programs(tmp_path: Path):
    write(made_up(), tmp_path / "costs.csv")
    with (tmp_path / "costs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == list(WAYS)
    assert rows[0] == {
        "way": "published",
        "method": "m2ib-published",
        "gflop": "1000.4",
        "seconds low": "2.000",
        "seconds": "3.000",
        "seconds high": "4.000",
        "mebibytes": "901",
    }


_take_peak = ways._peak_here


def use_memory(*_: Any, **__: Any) -> None:
    """What a run would do: hold 64 MiB for a moment."""
    assert np.ones(64 * MEBIBYTE, np.uint8).any()


def small_peak(name: str, layer: int, batch: int, device: str) -> float:
    """Runs in a process of its own, where nothing is patched yet."""
    speed.base32_encoder, speed.random_pairs = tiny_encoder, tiny_pairs
    ways.WAYS[name] = replace(ways.WAYS[name], run=use_memory)
    return _take_peak(name, layer, batch, device)


def test_peak_memory_does_not_depend_on_what_this_process_holds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ways, "_peak_here", small_peak)
    ballast = np.ones(1024 * MEBIBYTE, np.uint8)
    peak = ways._peak("published", 1, 1, "cpu")
    assert ballast[-1] == 1
    assert 60 <= peak <= 100


def die(*_: Any) -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0.0


def test_a_killed_process_is_an_error_and_no_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ways, "_peak_here", die)
    with pytest.raises(RuntimeError, match=r"^the process that ran die was killed before it answered"):
        ways._peak("published", 1, 1, "cpu")


@pytest.mark.parametrize("name", WAYS)
def test_peak_memory_of_each_run(tiny: pytest.MonkeyPatch, name: str):
    asked = []
    way = replace(WAYS[name], run=lambda encoder, pairs, layer: asked.append((len(pairs[0]), layer)))
    tiny.setitem(ways.WAYS, name, way)
    assert 0 <= ways._peak_here(name, 2, 3, "cpu") < 100
    assert asked == [(3 if name == "batched" else 1, 2)]
