"""The sub-command ``captum-m2ib benchmark concepts``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from captum_m2ib.benchmark.options import add_output, check_least, print_written
from captum_m2ib.benchmark.photos.command import add_coco


def add_concepts(benchmarks: Any) -> None:
    r"""Add ``captum-m2ib benchmark concepts`` to the command line.

    Args:

        benchmarks: What ``ArgumentParser.add_subparsers`` returned for ``benchmark``.
    """
    parser = benchmarks.add_parser(
        "concepts",
        help="InfoDisent's maps of a classifier on photographs with masks",
        description="Where InfoDisent, Grad-CAM and Integrated Gradients look in photographs with masks, for one "
        "classifier. The head learns the classifier's own decisions on parts of the photographs, without labels. "
        "--output receives figures.csv, summary.csv and table.md.",
    )
    add_coco(parser)
    parser.add_argument(
        "--backbone",
        required=True,
        metavar="NAME",
        help="a classifier as captum-m2ib disent takes it; the code of module:function is run",
    )
    parser.add_argument(
        "--layer", required=True, metavar="NAME", help="the last before positions are pooled, NAME:1 its second call"
    )
    parser.add_argument("--weights", metavar="FILE", help="safetensors file (default: the library's own)")
    parser.add_argument(
        "--classes", metavar="FILE", help="a line per class, synonyms behind commas (default: ImageNet's, from timm)"
    )
    parser.add_argument(
        "--rank", type=int, default=10, help="ask about what is among so many first classes (default: %(default)s)"
    )
    parser.add_argument(
        "--crops", type=int, default=16, help="parts of each photograph to learn from (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=60, help="most of the head (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of parts and head (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="the first so many photographs of each split (default: all)")
    add_output(parser, "benchmark-concepts", is_resumed=False)
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> None:
    r"""Run the command.

    Args:

        given (argparse.Namespace): What :func:`add_concepts` parsed.

    Raises:
        ValueError: if an option or the data cannot be used, or nothing can be asked.
        ImportError: if what masks or the classifier need is not installed.
    """
    from captum_m2ib.benchmark.concepts.questions import questions_about
    from captum_m2ib.benchmark.concepts.run import FIGURES, OURS, agreement, fit_on_decisions, measure_all, methods_on
    from captum_m2ib.benchmark.parts import TABLES, write_tables
    from captum_m2ib.benchmark.photos.coco import SPLITS, read_photos
    from captum_m2ib.benchmark.tables import compare, terminal
    from captum_m2ib.disent.named import load_backbone, named_place

    check_least(given, rank=1, crops=1, epochs=1)
    photos = [
        photo for split in SPLITS for photo in read_photos(given.data, given.annotations, split, given.limit).photos
    ]
    backbone = load_backbone(given.backbone, weights=given.weights)
    classes = _classes(given.classes)
    questions = questions_about(photos, backbone, classes, given.rank)
    if not questions:
        raise ValueError(
            f"--rank: the classifier names nothing that has a mask of fitting size among its first {given.rank} "
            "classes; expected one that knows what the photographs hold, or a higher rank."
        )
    show = sys.stderr.isatty()
    print(
        f"asked     {len(questions)} things in {len({one.photo.id for one in questions})} of {len(photos)} photographs"
    )
    model = fit_on_decisions(
        backbone,
        named_place(given.layer),
        len(classes),
        photos,
        crops=given.crops,
        seed=given.seed,
        epochs=given.epochs,
        show_progress=show,
    )
    print(
        f"agreement {agreement(model, questions):.0%} of the head's decisions on whole photographs are the classifier's"
    )
    values = measure_all(methods_on(model), questions, show)
    compared = compare(values, FIGURES, OURS, [name for name in values if not name.startswith(OURS)])
    write_tables(Path(given.output), [given.backbone], values, compared)
    print(f"\n{terminal(compared)}")
    print_written(given.output, TABLES)


def _classes(path: str | None) -> list[str]:
    if path is None:
        from captum_m2ib.benchmark.photos.two_parts import class_names

        return class_names()
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--classes: cannot read {path} ({error}).") from None
