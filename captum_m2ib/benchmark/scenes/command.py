"""The sub-command ``captum-m2ib benchmark scenes``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from captum_m2ib.benchmark.options import add_methods, add_output, print_written, resumable

if TYPE_CHECKING:
    from captum_m2ib.benchmark.loading import Load
    from captum_m2ib.benchmark.methods import Method
    from captum_m2ib.benchmark.scenes.run import Plan

_TUNING_PROBES = 100


def add_scenes(benchmarks: Any, load: Load) -> None:
    r"""Add ``captum-m2ib benchmark scenes`` to the command line.

    Args:

        benchmarks: What ``ArgumentParser.add_subparsers`` returned for ``benchmark``.
        load (Callable): From arguments with ``model`` to an encoder.
    """
    parser = benchmarks.add_parser(
        "scenes",
        help="every method on held-out scenes whose truth is known",
        description="Image localisation and token relevance against ground truth, faithfulness, sanity, stability, "
        "robustness and cost of every method, on held-out scenes. The same command again goes on where an interrupted "
        "one stopped. --output receives figures.csv, probes.csv, summary.csv, table.md and examples.png.",
    )
    parser.add_argument(
        "--model",
        action="extend",
        nargs="+",
        metavar="DIR",
        help="checkpoints trained on scenes, over which figures are averaged (default: shipped model)",
    )
    add_methods(
        parser,
        "methods: m2ib, m2ib-published, each rival as published and with -tuned where it measures best on "
        "validation, centre and random (default: all but m2ib-guided, m2ib-fine, m2ib-late and rise)",
    )
    parser.add_argument("--probes", type=int, help=f"of each kind (default: 500; with --tune {_TUNING_PROBES})")
    parser.add_argument("--quick", action="store_true", help="fewer probes: about 10 minutes on 2 cores")
    parser.add_argument("--split", choices=("test", "validation"), help="default: test; with --tune validation")
    parser.add_argument("--seed", type=int, default=0, help="which scenes of the split (default: %(default)s)")
    parser.add_argument(
        "--ground",
        default="textured",
        help="what their objects lie on: textured, plain, white, black or grey (default: %(default)s)",
    )
    add_output(parser, "benchmark-scenes")
    parser.add_argument(
        "--tune",
        action="store_true",
        help="choose each rival's best setting on the validation split, and write settings.json and tuning.csv",
    )
    parser.add_argument("--settings", metavar="FILE", help="a settings.json for -tuned (default: the package's)")
    parser.add_argument(
        "--without-statistics",
        action="store_true",
        help="as for a model that ships none: the pair's own patches and the vocabulary",
    )
    parser.add_argument("--without-cost", action="store_true", help="leave out time, FLOPs and memory")
    parser.set_defaults(run=lambda given: _run(given, load))


def _run(given: argparse.Namespace, load: Load) -> None:
    from captum_m2ib.benchmark.scenes.run import load_models, run_settings
    from captum_m2ib.benchmark.store import Store
    from captum_m2ib.scenes import CHECKPOINT

    plan = _plan(given)
    chosen = _chosen(given)
    paths = [os.fspath(path) for path in given.model or [CHECKPOINT]]
    models = load_models(paths, lambda path: load(argparse.Namespace(model=path)), plan)
    store = Store(given.output, run_settings(plan, "tune" if given.tune else "measure"))
    with resumable(given.output):
        if given.tune:
            _tune(given, models, chosen, plan, store)
        else:
            _measure(models, chosen, plan, store)


def _plan(given: argparse.Namespace) -> Plan:
    from captum_m2ib.benchmark.scenes.run import Plan

    options: dict[str, Any] = {"seed": given.seed, "statistics": not given.without_statistics, "ground": given.ground}
    options["split"] = given.split or ("validation" if given.tune else "test")
    if given.tune:
        options["probes"] = _TUNING_PROBES
    if given.probes is not None:
        options["probes"] = given.probes
    if given.without_cost:
        options["repeats"] = 0
    return Plan.quick(**options) if given.quick else Plan(**options)


def _chosen(given: argparse.Namespace) -> list[Method]:
    from captum_m2ib.benchmark.choice import named
    from captum_m2ib.benchmark.methods import ON_REQUEST, SETTINGS_FILE, methods

    known = methods(given.settings or SETTINGS_FILE)
    return named(given.method or [name for name in known if name not in ON_REQUEST], known)


def _measure(models: Any, chosen: list[Method], plan: Plan, store: Any) -> None:
    from captum_m2ib.benchmark.figure_page import make_examples, write_page
    from captum_m2ib.benchmark.parts import TABLES
    from captum_m2ib.benchmark.scenes.run import measure_all, write_probes, write_tables
    from captum_m2ib.benchmark.tables import terminal

    values = measure_all(models, chosen, plan, store, show_progress=sys.stderr.isatty())
    print(terminal(write_tables(store.folder, models, chosen, values)))
    write_probes(store.folder, plan)
    examples = make_examples(models[0].encoder, chosen, plan.probes_seed, ground=plan.ground)
    write_page(store.folder / "examples.png", examples, f"{models[0].name}: example maps of every method")
    print_written(store.folder, (*TABLES, "probes.csv", "examples.png"))


def _tune(given: argparse.Namespace, models: Any, chosen: list[Method], plan: Plan, store: Any) -> None:
    from captum_m2ib.benchmark.scenes.run import tune

    families = list({method.family.name: method.family for method in chosen}.values())
    found = tune(models, families, plan, store, show_progress=sys.stderr.isatty())
    for name, settings in found.items():
        told = "; ".join(f"{kind}: {dict(setting) or 'as published'}" for kind, setting in settings.items())
        print(f"{name:22}  {told}")
    print(f"\nwritten  {store.folder / 'settings.json'}, {store.folder / 'tuning.csv'}")
    print(f"next     captum-m2ib benchmark scenes --settings {store.folder / 'settings.json'} --output OTHER_DIR")
