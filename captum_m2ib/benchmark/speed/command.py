"""The sub-command ``captum-m2ib benchmark speed``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_m2ib.benchmark.loading import CheckDevice


def add_speed(benchmarks: Any, check_device: CheckDevice) -> None:
    r"""Add ``captum-m2ib benchmark speed`` to the command line.

    Args:

        benchmarks: What ``ArgumentParser.add_subparsers`` returned for ``benchmark``.
        check_device (Callable): Refuses a device that is not there.
    """
    parser = benchmarks.add_parser(
        "speed",
        help="FLOPs, time and memory beside the published loop and rivals",
        description="Both maps of a pair by the published optimisation loop, by this library and by rivals, on a CLIP "
        "of ViT-B/32 size with random weights: FLOPs, wall time, peak memory, and how far the loop's maps differ.",
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pairs in a batch of ours (default: %(default)s)")
    parser.add_argument("--layer", type=int, default=9, help="block, counted from 0 (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--csv", metavar="FILE", help="write the costs there, too")
    parser.set_defaults(run=lambda given: _run(given, check_device))


def _run(given: argparse.Namespace, check_device: CheckDevice) -> None:
    from captum_m2ib.benchmark.speed.ways import measure, render, write

    report = measure(given.repeats, given.batch, given.layer, check_device(given.device) or "cpu")
    print(render(report))
    if given.csv:
        write(report, given.csv)
