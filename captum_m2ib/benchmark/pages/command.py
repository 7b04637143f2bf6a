"""The sub-command ``captum-m2ib benchmark pages``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from captum_m2ib.benchmark.options import add_device, add_methods, add_output, print_written, resumable

if TYPE_CHECKING:
    from captum_m2ib.benchmark.loading import Load

DEFAULT = ("m2ib", "similarity-map", "saliency", "occlusion", "centre", "random")
"""Methods that are compared where none is named."""


def add_pages(benchmarks: Any, load: Load) -> None:
    r"""Add ``captum-m2ib benchmark pages`` to the command line.

    Args:

        benchmarks: What ``ArgumentParser.add_subparsers`` returned for ``benchmark``.
        load (Callable): From arguments with ``model`` and ``device`` to an encoder.
    """
    parser = benchmarks.add_parser(
        "pages",
        help="late interaction on drawn pages",
        description="Whether maps of drawn pages fall on what a query names, for the words that name it and for the "
        "whole query, with a compact late-interaction model. The same command again goes on where an interrupted one "
        "stopped. --output receives figures.csv, summary.csv, table.md and examples.png.",
    )
    parser.add_argument(
        "--model", metavar="NAME", help="a checkpoint of late interaction trained on such pages (default: shipped)"
    )
    add_device(parser)
    add_methods(parser, f"default: {', '.join(DEFAULT)}; others: see docs")
    parser.add_argument("--probes", type=int, default=200, help="held-out pages (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which pages (default: %(default)s)")
    add_output(parser, "benchmark-pages")
    parser.set_defaults(run=lambda given: run(given, load))


def run(given: argparse.Namespace, load: Load) -> None:
    r"""Run the command.

    Args:

        given (argparse.Namespace): What :func:`add_pages` parsed.
        load (Callable): As for :func:`add_pages`.

    Raises:
        ValueError: if an option cannot be used, the model is none of late interaction, or no method works on it.
    """
    from captum_m2ib.benchmark.choice import named
    from captum_m2ib.benchmark.figure_page import write_page
    from captum_m2ib.benchmark.methods import METHODS
    from captum_m2ib.benchmark.pages.measures import FIGURES, Plan, examples_of, measure_all, run_settings
    from captum_m2ib.benchmark.parts import TABLES, Model, write_comparison
    from captum_m2ib.benchmark.store import Store
    from captum_m2ib.benchmark.tables import terminal
    from captum_m2ib.scenes.pages import PAGES_CHECKPOINT

    asked, plan = named(given.method or DEFAULT, METHODS), Plan(given.probes, given.seed)
    given.model = given.model or os.fspath(PAGES_CHECKPOINT)
    encoder = load(given)
    if not encoder.has_terms:
        raise ValueError(f"--model: expected one of late interaction, such as ColPali, got {given.model}.")
    model = Model("pages", given.model, encoder)
    store = Store(given.output, run_settings(model, plan))
    with resumable(given.output):
        values = measure_all(model, asked, plan, store, show_progress=sys.stderr.isatty())
    measured = [method for method in asked if method.name in values]
    print(terminal(write_comparison(store.folder, [model.name], measured, values, FIGURES)))
    drawn = [method for method in measured if not method.is_floor]
    write_page(store.folder / "examples.png", examples_of(encoder, drawn, plan), "maps of the words that name an item")
    print_written(store.folder, (*TABLES, "examples.png"))
