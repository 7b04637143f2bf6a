"""The sub-command ``captum-m2ib benchmark pairs``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

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
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="hub id, checkpoint directory, or module:function, a Python function that returns a DualEncoder with a "
        "processor; its code is run (default: shipped model)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--device", help="for example cuda (default: cpu)")
    parser.add_argument(
        "--method", action="extend", nargs="+", metavar="NAME", help=f"default: {', '.join(DEFAULT)}; others: see docs"
    )
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="for example caption=title")
    parser.add_argument("--images", metavar="DIR", help="where relative paths start (default: FILE's folder)")
    parser.add_argument("--limit", type=int, help="the first so many rows (default: all)")
    parser.add_argument("--steps", type=int, default=50, help="of insertion and deletion (default: %(default)s)")
    parser.add_argument("--without-faithfulness", action="store_true", help="leave out what masks and asks again")
    parser.add_argument("--without-stability", action="store_true", help="leave out the second seed")
    parser.add_argument(
        "--output", metavar="DIR", default="benchmark-pairs", help="resumed if it is there (default: %(default)s)"
    )
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
    try:
        found = measure(manifest, encoder, chosen, store, plan, show_progress=sys.stderr.isatty())
    except KeyboardInterrupt:
        print(f"to go on from here, give the same command again: {given.output} keeps what is done", file=sys.stderr)
        raise
    floors = [method.name for method in chosen if method.is_floor]
    print(terminal(write_tables(store.folder, found, floors)))
    rows = len(found[chosen[0].name].ids)
    for name, outcome in found.items():
        kinds = [error[0] for error in outcome.errors if error]
        if kinds:
            told = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
            print(f"{name}: {len(kinds)} of {rows} rows are errors ({told}), see rows.csv")
    written = (os.fspath(store.folder / name) for name in ("rows.csv", "summary.csv", "table.md"))
    print(f"\nwritten  {', '.join(written)}")
