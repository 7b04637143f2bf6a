"""The sub-command ``captum-m2ib benchmark pairs``."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from captum_m2ib.benchmark.options import (
    add_faithfulness,
    add_methods,
    add_model,
    add_output,
    print_written,
    resumable,
)

if TYPE_CHECKING:
    from captum_m2ib.benchmark.loading import Load

DEFAULT = ("m2ib", "m2ib-published", "nib", "grad-eclip", "relevance", "legrad", "saliency", "centre", "random")
"""Methods that are compared where none is named."""


def add_pairs(benchmarks: Any, load: Load) -> None:
    r"""Add ``captum-m2ib benchmark pairs`` to the command line.

    Args:

        benchmarks: What ``ArgumentParser.add_subparsers`` returned for ``benchmark``.
        load (Callable): From arguments with ``model``, ``revision`` and ``device`` to an encoder.
    """
    parser = benchmarks.add_parser(
        "pairs",
        help="methods on pairs of your own",
        description="Faithfulness, stability and cost of methods on the pairs of a table, and localisation where it "
        "has a column of boxes or masks. The same command again goes on where an interrupted one stopped. --output "
        "receives rows.csv, summary.csv and table.md.",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        help=".parquet, .csv, .tsv, .jsonl, .arrow or .tar; or a folder of pictures, or a data set on disk",
    )
    add_model(parser)
    add_methods(parser, f"default: {', '.join(DEFAULT)}; others: see docs")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="for example caption=title")
    parser.add_argument("--images", metavar="DIR", help="where relative paths start (default: FILE's folder)")
    parser.add_argument("--limit", type=int, help="the first so many rows (default: all)")
    add_faithfulness(parser)
    parser.add_argument("--without-stability", action="store_true", help="leave out the second seed")
    add_output(parser, "benchmark-pairs")
    parser.set_defaults(run=lambda given: run(given, load))


def run(given: argparse.Namespace, load: Load) -> None:
    r"""Run the command.

    Args:

        given (argparse.Namespace): What :func:`add_pairs` parsed.
        load (Callable): As for :func:`add_pairs`.

    Raises:
        ValueError: if an option or the manifest cannot be used, or no method works on the model.
    """
    from captum_m2ib.audit.command import parse_columns
    from captum_m2ib.audit.manifest import Manifest
    from captum_m2ib.benchmark.choice import named, usable
    from captum_m2ib.benchmark.methods import METHODS
    from captum_m2ib.benchmark.pairs.measures import Plan, measure, run_settings, write_tables
    from captum_m2ib.benchmark.store import Store
    from captum_m2ib.benchmark.tables import terminal

    asked = named(given.method or DEFAULT, METHODS)
    plan = Plan(given.steps, not given.without_faithfulness, not given.without_stability, given.limit)
    manifest = Manifest(given.file, parse_columns(given.columns), given.images)
    encoder = load(given)
    chosen = usable(asked, encoder)
    store = Store(given.output, run_settings(manifest, encoder, plan))
    with resumable(given.output):
        found = measure(manifest, encoder, chosen, store, plan, show_progress=sys.stderr.isatty())
    floors = [method.name for method in chosen if method.is_floor]
    print(terminal(write_tables(store.folder, found, floors)))
    rows = len(found[chosen[0].name].ids)
    for name, outcome in found.items():
        kinds = [error[0] for error in outcome.errors if error]
        if kinds:
            told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
            print(f"{name}: {len(kinds)} of {rows} rows are errors ({told}), see rows.csv")
    print_written(store.folder, ("rows.csv", "summary.csv", "table.md"))
