"""What the maps of a pair cost by several ways: the published loop, this library at each quality, and its rivals.

Costs are of a CLIP of ViT-B/32 size with random weights, which changes no cost; how right the maps of the same methods
are is measured by ``captum-m2ib benchmark scenes``.
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from captum.attr import IntegratedGradients
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib.attr import MultiModalInfoBottleneck
from captum_m2ib.benchmark.meters import count_flops, in_new_process, peak_of, seconds_of
from captum_m2ib.benchmark.methods import METHODS
from captum_m2ib.benchmark.speed import loops
from captum_m2ib.benchmark.speed.loops import Inputs
from captum_m2ib.encoders.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Way:
    r"""One way of making maps.

    Attributes:

        title (str): What the table calls it; ``{batch}`` is the number of pairs in a batch.
        run (Callable): ``run(encoder, pairs, layer)``.
        method (str or None): What ``captum-m2ib benchmark scenes`` calls the method whose maps these are.
        is_batched (bool): Whether it runs on a batch, whose cost is that of each pair.
    """

    title: str
    run: Callable[[DualEncoder, Inputs, int], Any]
    method: str | None = None
    is_batched: bool = False


@dataclass(frozen=True)
class Cost:
    """What one way costs: work and time per pair, memory for the whole run."""

    gflop: float
    seconds: tuple[float, float, float]
    peak_mebibytes: float


@dataclass(frozen=True)
class SpeedReport:
    """The cost of each way, and how far the maps of the published loop differ from this library's at its layer."""

    costs: Mapping[str, Cost]
    batch: int
    differences: tuple[float, float]
    device: str


def _by_name(name: str) -> Callable[[DualEncoder, Inputs, int], Any]:
    def run(encoder: DualEncoder, pairs: Inputs, layer: int) -> Any:
        return METHODS[name](encoder).attribute(pairs[:2], additional_forward_args=pairs[2])

    return run


def _of_the_picture(encoder: DualEncoder, pairs: Inputs, layer: int) -> Tensor:
    found: Tensor = MultiModalInfoBottleneck(encoder).attribute(pairs[0], additional_forward_args=pairs[1:])
    return found


def _integrated_gradients(encoder: DualEncoder, pairs: Inputs, layer: int) -> Tensor:
    found: Tensor = IntegratedGradients(encoder).attribute(pairs[0], additional_forward_args=pairs[1:], n_steps=50)
    return found


WAYS: dict[str, Way] = {
    "published": Way("published loop", loops.run_published, "m2ib-published"),
    "ours": Way("this library, the paper's layer and steps", loops.run_ours),
    "batched": Way("the same, batch of {batch}, per pair", loops.run_ours, is_batched=True),
    "default": Way("this library's default", _by_name("m2ib"), "m2ib"),
    "fine": Way("this library, 8 steps of 9 draws", _by_name("m2ib-fine"), "m2ib-fine"),
    "picture": Way("this library's default, picture alone", _of_the_picture),
    "integrated": Way("Integrated Gradients, 50 steps, picture alone", _integrated_gradients, "integrated-gradients"),
    "grad-eclip": Way("Grad-ECLIP", _by_name("grad-eclip"), "grad-eclip"),
    "legrad": Way("LeGrad", _by_name("legrad"), "legrad"),
}
"""Every way by its name, in the order of the table."""


def measure(repeats: int = 3, batch: int = 8, layer: int = 9, device: str = "cpu") -> SpeedReport:
    r"""Measure every way on the same pairs, run in turn.

    Args:

        repeats (int, optional): Timed runs of each. Default: 3
        batch (int, optional): Pairs in a batch of ours. Default: 8
        layer (int, optional): Block behind which the published loop's bottlenecks sit. Default: 9
        device (str, optional): Default: "cpu"

    Returns:
        SpeedReport: costs per pair; seconds as minimum, median and maximum.

    Raises:
        ValueError: if a number is below 1, or the towers have no such block.
    """
    for name, number in (("repeats", repeats), ("batch", batch)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}.")
    encoder = loops.base32_encoder().to(device)
    loops.blocks(encoder, layer)
    pixels, ids, mask = (part.to(device) for part in loops.random_pairs(batch))
    pairs, single = (pixels, ids, mask), (pixels[:1], ids[:1], mask[:1])

    def run(way: Way) -> Any:
        return way.run(encoder, pairs if way.is_batched else single, layer)

    share = {name: batch if way.is_batched else 1 for name, way in WAYS.items()}
    flops = {name: count_flops(partial(run, way)) / share[name] for name, way in WAYS.items()}
    times: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in tqdm(range(repeats), desc="Timing", unit="round", disable=None):
        for name, way in WAYS.items():
            times[name].append(seconds_of(partial(run, way), device) / share[name])
    peaks = {name: _peak(name, layer, batch, device) for name in WAYS}
    costs = {name: Cost(flops[name] / 1e9, _spread(times[name]), peaks[name]) for name in WAYS}
    theirs, ours = (make(encoder, single, layer) for make in (loops.run_published, _with_one_step_less))
    first, second = (float((b[0] - a).abs().max() / a.max()) for a, b in zip(theirs, ours, strict=True))
    return SpeedReport(costs, batch, (first, second), device)


def render(report: SpeedReport) -> str:
    """The report as a table, with the ratios that matter."""
    rows = [("", "GFLOP", "seconds (min, max)", "peak MiB, whole run")]
    for name, cost in report.costs.items():
        low, median, high = cost.seconds
        title = WAYS[name].title.format(batch=report.batch)
        rows.append((title, f"{cost.gflop:.0f}", f"{median:.2f} ({low:.2f}, {high:.2f})", f"{cost.peak_mebibytes:.0f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(
        [
            f"Both maps of one pair, CLIP of ViT-B/32 size with random weights, 12 tokens, on {report.device}",
            *lines,
            f"published loop and ours at its layer: {_ratio(report, 'published', 'ours')}",
            f"published loop and our default: {_ratio(report, 'published', 'default')}",
            f"Integrated Gradients and our default, picture alone: {_ratio(report, 'integrated', 'picture')}",
            "largest difference of the maps under the same noise, as a share of the maximum: "
            f"image {report.differences[0]:.1e}, text {report.differences[1]:.1e}",
        ]
    )


def write(report: SpeedReport, path: str | os.PathLike[str]) -> None:
    r"""Write the costs as a table of comma-separated values.

    Args:

        report (SpeedReport): What was measured.
        path (str or PathLike): The file: way, method, gflop, seconds (minimum, median, maximum), mebibytes.

    Raises:
        OSError: if the file cannot be written.
    """
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["way", "method", "gflop", "seconds low", "seconds", "seconds high", "mebibytes"])
        for name, cost in report.costs.items():
            seconds = (f"{one:.3f}" for one in cost.seconds)
            row = [name, WAYS[name].method or "", f"{cost.gflop:.1f}", *seconds, f"{cost.peak_mebibytes:.0f}"]
            table.writerow(row)


def _with_one_step_less(encoder: DualEncoder, pairs: Inputs, layer: int) -> list[Tensor]:
    return loops.run_ours(encoder, pairs, layer, n_steps=9)


def _ratio(report: SpeedReport, more: str, less: str) -> str:
    first, second = report.costs[more], report.costs[less]
    flops, seconds = first.gflop / second.gflop, first.seconds[1] / second.seconds[1]
    return f"{flops:.1f} times fewer FLOPs, {seconds:.1f} times less time"


def _spread(values: list[float]) -> tuple[float, float, float]:
    return min(values), statistics.median(values), max(values)


def _peak(name: str, layer: int, batch: int, device: str) -> float:
    """Peak memory above the loaded model, in MiB, in a process of its own: a peak can only be read once."""
    return in_new_process(_peak_here, name, layer, batch, device)


def _peak_here(name: str, layer: int, batch: int, device: str) -> float:
    encoder, way = loops.base32_encoder().to(device), WAYS[name]
    pixels, ids, mask = (part.to(device) for part in loops.random_pairs(batch if way.is_batched else 1))
    return peak_of(lambda: way.run(encoder, (pixels, ids, mask), layer), device)
