"""The sub-command ``captum-m2ib benchmark interactions``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_m2ib.benchmark.options import add_output, add_scenes_model, check_least, print_written

if TYPE_CHECKING:
    from captum_m2ib.benchmark.loading import Load


def add_interactions(benchmarks: Any, load: Load) -> None:
    r"""Add ``captum-m2ib benchmark interactions`` to the command line.

    Args:

        benchmarks: What ``ArgumentParser.add_subparsers`` returned for ``benchmark``.
        load (Callable): From arguments with ``model`` to an encoder.
    """
    parser = benchmarks.add_parser(
        "interactions",
        help="each name's map where a caption names two objects",
        description="Interactions of words with patches beside PairInteraction and methods of first order, on "
        "held-out scenes whose caption names two objects. --output receives figures.csv, summary.csv and table.md.",
    )
    add_scenes_model(parser)
    parser.add_argument("--probes", type=int, default=40, help="scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which scenes (default: %(default)s)")
    parser.add_argument(
        "--within",
        type=int,
        metavar="N",
        help="beside them interactions of two patches and of two words as well, from so many masked pictures",
    )
    parser.add_argument(
        "--shapiq",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="beside them shapiq's regression with so many coalitions, each of them a masked picture",
    )
    add_output(parser, "benchmark-interactions", is_resumed=False)
    parser.set_defaults(run=lambda given: _run(given, load))


def _run(given: argparse.Namespace, load: Load) -> None:
    from captum_m2ib.benchmark.interactions.measures import FIGURES, OURS, measure, methods_of
    from captum_m2ib.benchmark.parts import TABLES, write_tables
    from captum_m2ib.benchmark.tables import compare, terminal
    from captum_m2ib.scenes import CHECKPOINT

    check_least(given, probes=1, seed=0)
    if given.shapiq and min(given.shapiq) < 2:
        raise ValueError(f"--shapiq: expected at least 2 coalitions, got {min(given.shapiq)}.")
    given.model = given.model or os.fspath(CHECKPOINT)
    values = measure(
        load(given),
        given.probes,
        given.seed,
        within=given.within,
        shapiq=given.shapiq,
        show_progress=sys.stderr.isatty(),
    )
    compared = compare(values, FIGURES, OURS, methods_of(values))
    write_tables(Path(given.output), ["scenes"], values, compared)
    print(terminal(compared))
    print_written(given.output, TABLES)
