"""The sub-command ``captum-m2ib benchmark roar``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from captum_m2ib.benchmark.options import add_scenes_model, print_written

if TYPE_CHECKING:
    from captum_m2ib.benchmark.loading import Load


def add_roar(benchmarks: Any, load: Load) -> None:
    r"""Add ``captum-m2ib benchmark roar`` to the command line.

    Args:

        benchmarks: What ``ArgumentParser.add_subparsers`` returned for ``benchmark``.
        load (Callable): From arguments with ``model`` to an encoder.
    """
    parser = benchmarks.add_parser(
        "roar",
        help="remove and retrain (ROAR, ROAR+) on scenes",
        description="Fine-tune the compact model on scenes without what each method calls most relevant, and measure "
        "how much worse it becomes than by a random ranking. The same command again goes on where an interrupted one "
        "stopped. --output receives roar.csv and roar.png.",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for maps, fits, table and figure")
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="NAME",
        help="beside the truth and a random ranking (default: m2ib m2ib-published relevance-all-blocks grad-eclip)",
    )
    parser.add_argument("--fractions", nargs="+", type=float, help="shares that are replaced (default: 0.1 0.2 0.3)")
    parser.add_argument("--seeds", type=int, help="fits of each, at least 2 (default: 5)")
    parser.add_argument("--training", type=int, help="pairs to fine-tune on (default: 1024)")
    parser.add_argument("--held-out", type=int, help="pairs to measure on (default: 256)")
    parser.add_argument("--scenes", type=int, help="which pairs (default: 0)")
    add_scenes_model(parser)
    parser.add_argument("--quick", action="store_true", help="a small run of two minutes, to see how it goes")
    parser.set_defaults(run=lambda given: run_command(given, load))


def run_command(given: argparse.Namespace, load: Load) -> None:
    """Measure what was asked for, and print it."""
    from captum_m2ib.benchmark.roar.report import render
    from captum_m2ib.benchmark.roar.run import QUICK, Settings, run

    named: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name in ("methods", "fractions", "seeds", "training", "held_out", "scenes")
        if (value := getattr(given, name)) is not None
    }
    settings = replace(QUICK if given.quick else Settings(), **named)
    print(render(run(load(given), given.output, settings, show_progress=sys.stderr.isatty())))
    print_written(given.output, ("roar.csv", "roar.png"))
