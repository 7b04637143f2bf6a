"""The sub-command ``captum-m2ib benchmark interactions``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    parser.add_argument("--model", metavar="DIR", help="checkpoint trained on scenes (default: shipped model)")
    parser.add_argument("--probes", type=int, default=40, help="scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which scenes (default: %(default)s)")
    parser.add_argument(
        "--output", metavar="DIR", default="benchmark-interactions", help="a folder (default: %(default)s)"
    )
    parser.set_defaults(run=lambda given: _run(given, load))


def _run(given: argparse.Namespace, load: Load) -> None:
    from captum_m2ib.benchmark.interactions.measures import FIGURES, OURS, measure, methods_of
    from captum_m2ib.benchmark.tables import compare, figures_csv, markdown, summary_csv, terminal
    from captum_m2ib.scenes import CHECKPOINT

    for name, least in (("probes", 1), ("seed", 0)):
        if getattr(given, name) < least:
            raise ValueError(f"--{name}: expected at least {least}, got {getattr(given, name)}.")
    given.model = given.model or os.fspath(CHECKPOINT)
    output = Path(given.output)
    output.mkdir(parents=True, exist_ok=True)
    values = measure(load(given), given.probes, given.seed, show_progress=sys.stderr.isatty())
    comparison = compare(values, FIGURES, OURS, methods_of(values))
    written = {
        "figures.csv": figures_csv(values, ["scenes"], FIGURES),
        "summary.csv": summary_csv(comparison),
        "table.md": markdown(comparison),
    }
    for name, text in written.items():
        (output / name).write_text(text, encoding="utf-8")
    print(terminal(comparison))
    print(f"\nwritten  {', '.join(os.fspath(output / name) for name in written)}")
