"""The sub-command ``captum-m2ib benchmark photos``."""

from __future__ import annotations

import argparse
import os
import re
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


def add_coco(parser: argparse.ArgumentParser) -> None:
    """Add what names a data set in COCO's format: ``--data`` and ``--annotations``."""
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="where the pictures lie, or the folder above their folder images"
    )
    parser.add_argument(
        "--annotations",
        metavar="FILE",
        default="instances.json",
        help="in COCO's format: a path, or a name in DIR (default: %(default)s)",
    )


def add_photos(benchmarks: Any, load: Load) -> None:
    r"""Add ``captum-m2ib benchmark photos`` to the command line.

    Args:

        benchmarks: What ``ArgumentParser.add_subparsers`` returned for ``benchmark``.
        load (Callable): From arguments with ``model``, ``revision`` and ``device`` to an encoder.
    """
    parser = benchmarks.add_parser(
        "photos",
        help="methods on photographs with masks",
        description="Image localisation against the masks of a data set in COCO's format, alone and in mosaics of four "
        "photographs, and faithfulness of every method. The same command again goes on where an interrupted one "
        "stopped. --output receives figures.csv, summary.csv, table.md, names.csv and examples.png.",
    )
    add_coco(parser)
    add_model(parser, is_required=True)
    add_methods(
        parser,
        "m2ib, m2ib-published, each rival as published, centre and random (default: all but m2ib-guided, "
        "m2ib-fine, m2ib-late and rise)",
    )
    parser.add_argument(
        "--ablation",
        action="store_true",
        help="in the place of methods: m2ib with one of its choices for pictures changed at a time",
    )
    parser.add_argument("--settings", metavar="FILE", help="a settings.json for -tuned (default: the package's)")
    parser.add_argument(
        "--split", choices=("test", "validation"), default="test", help="odd or even picture ids (default: %(default)s)"
    )
    parser.add_argument(
        "--rank", type=int, default=5, help="ask about what is among so many first names (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="the first so many photographs of the split (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="which mosaics (default: %(default)s)")
    add_faithfulness(parser)
    add_output(parser, "benchmark-photos")
    parser.set_defaults(run=lambda given: run(given, load))


def run(given: argparse.Namespace, load: Load) -> None:
    r"""Run the command.

    Args:

        given (argparse.Namespace): What :func:`add_photos` parsed.
        load (Callable): As for :func:`add_photos`.

    Raises:
        ValueError: if an option or the data cannot be used, or no method works on the model.
        ImportError: if what masks or the model need is not installed.
    """
    from captum_m2ib.benchmark.choice import named, usable
    from captum_m2ib.benchmark.figure_page import write_page
    from captum_m2ib.benchmark.methods import FAMILIES, ON_REQUEST, SETTINGS_FILE, methods
    from captum_m2ib.benchmark.parts import TABLES, Model, write_comparison
    from captum_m2ib.benchmark.photos.ablation import ABLATION
    from captum_m2ib.benchmark.photos.coco import read_photos
    from captum_m2ib.benchmark.photos.measures import FIGURES
    from captum_m2ib.benchmark.photos.probes import name_photos
    from captum_m2ib.benchmark.photos.run import (
        Plan,
        choose_probes,
        examples_of,
        measure_all,
        run_settings,
        write_names,
    )
    from captum_m2ib.benchmark.store import Store
    from captum_m2ib.benchmark.tables import terminal

    if given.ablation and given.method:
        raise ValueError(f"--ablation: brings its own methods, got --method {' '.join(given.method)}; leave out one.")
    known = {method.name: method for method in ABLATION} if given.ablation else methods(given.settings or SETTINGS_FILE)
    usual = list(known) if given.ablation else [name for name in FAMILIES if name not in ON_REQUEST]
    asked = named(given.method or usual, known)
    plan = Plan(given.split, given.rank, given.limit, given.seed, given.steps, not given.without_faithfulness)
    photos = read_photos(given.data, given.annotations, plan.split, plan.limit)
    encoder = load(given)
    model = Model(_called(given.model), given.model, encoder)
    chosen = usable(asked, encoder)
    probes = choose_probes(name_photos(encoder, photos, plan.rank), plan)
    store = Store(given.output, run_settings(photos, model, plan))
    print(probes)
    with resumable(given.output):
        values = measure_all(model, chosen, probes, plan, store, show_progress=sys.stderr.isatty())
    measured = [method for method in chosen if method.name in values]
    write_names(store.folder, probes)
    print(f"\n{terminal(write_comparison(store.folder, [model.name], measured, values, FIGURES))}")
    examples = examples_of(encoder, measured, probes)
    write_page(store.folder / "examples.png", examples, f"{model.name}: example maps of every method")
    print_written(store.folder, (*TABLES, "names.csv", "examples.png"))


def _called(model: str) -> str:
    """A name for a model that a folder may have."""
    last = re.split(r"[\\/:]+", os.fspath(model).rstrip("\\/"))[-1]
    return re.sub(r"[^\w.-]", "_", last).strip(".") or "model"
