"""The sub-commands of ``captum-m2ib disent``: InfoDisent and EPIC on a folder of photographs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_m2ib.disent.study import Study

_BACKBONE = "timm:NAME, torchvision:NAME, hf:ID, or module:function, a Python function that returns a torch module "
_BACKBONE += "(and a captum_m2ib.disent.named.Preparation); its code is run"


def add_disent(commands: Any) -> None:
    r"""Add ``disent`` to the command line.

    Args:

        commands: What ``ArgumentParser.add_subparsers`` returned. Each command's function is the default ``run``.
    """
    parser = commands.add_parser(
        "disent",
        help="InfoDisent and EPIC on a folder of photographs",
        description="Break a classifier's decisions on photographs into atomic concepts.",
    )
    kinds = parser.add_subparsers(required=True, metavar="STEP")
    _add_fit(kinds)
    _add_explain(kinds)
    _add_prototypes(kinds)
    _add_report(kinds)
    _add_zero_shot(kinds)


def _add_fit(commands: Any) -> None:
    parser = commands.add_parser(
        "fit",
        help="fit a linear probe, InfoDisent and EPIC, and measure them",
        description="Fit a linear probe, InfoDisent, EPIC and two ablations on the cached features of photographs. The "
        "same command again goes on where an interrupted one stopped.",
    )
    parser.add_argument(
        "--data",
        metavar="DIR",
        required=True,
        help="folder with a folder of pictures per class, or train/ and test/ above these; or a data set that datasets "
        "saved, or hf:NAME of one on the hub",
    )
    parser.add_argument("--backbone", metavar="NAME", required=True, help=_BACKBONE)
    parser.add_argument(
        "--layer",
        metavar="NAME",
        required=True,
        help="the last before positions are pooled; NAME:1 is the second call of a module that is called more often",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for features, heads and figures")
    parser.add_argument("--weights", metavar="FILE", help="safetensors file (default: the library's own)")
    parser.add_argument("--options", nargs="+", default=[], metavar="NAME=VALUE", help="of the backbone's constructor")
    parser.add_argument("--side", type=int, help="of the pictures in pixels (default: the backbone's)")
    parser.add_argument(
        "--train-backbone",
        type=int,
        default=0,
        metavar="EPOCHS",
        help="train it from nothing on the training pictures first (default: no)",
    )
    parser.add_argument("--test-share", type=float, default=0.3, help="held out per class (default: %(default)s)")
    parser.add_argument("--split-seed", type=int, default=0, help="of that choice (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="fits of each head (default: %(default)s)")
    parser.add_argument(
        "--epochs",
        type=int,
        default=200,
        help="most of a head, which ends when it has converged (default: %(default)s)",
    )
    parser.add_argument(
        "--estimator",
        default="gumbel",
        help="how heads learn places: gumbel, gumbel_soft, or max, the fastest (default: %(default)s)",
    )
    parser.add_argument(
        "--choose", action="store_true", help="choose each head's settings on pictures held back from training"
    )
    parser.add_argument("--epic-epochs", type=int, default=20, help="epochs of EPIC (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64, help="examples per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-2, help="rate of the classifier (default: %(default)s)")
    parser.add_argument("--transform-lr", type=float, default=5e-3, help="of the transform (default: %(default)s)")
    parser.set_defaults(run=_fit)


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser("explain", help="explain one picture", description="Explain a decision on a picture.")
    _add_study(parser)
    parser.add_argument("picture", metavar="PICTURE", help="JPEG, PNG, WebP, BMP, GIF or TIFF")
    parser.add_argument("--class", dest="kind", metavar="NAME", help="class to explain (default: the predicted one)")
    parser.add_argument("--halves", type=int, default=4, help="halves of channels shown (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", default="explanation.png", help="default: %(default)s")
    parser.set_defaults(run=_explain)


def _add_prototypes(commands: Any) -> None:
    parser = commands.add_parser(
        "prototypes",
        help="what a class rests on",
        description="Draw the halves of channels that a class rests on, with the pictures where they are strongest.",
    )
    _add_study(parser)
    parser.add_argument("--class", dest="kind", metavar="NAME", required=True, help="the class")
    parser.add_argument("--halves", type=int, default=5, help="halves of channels shown (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", default="prototypes.png", help="default: %(default)s")
    parser.set_defaults(run=_prototypes)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report", help="a page about a study", description="Write one page that needs no other file and no network."
    )
    _add_study(parser)
    parser.add_argument("--halves", type=int, default=4, help="halves of channels per class (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in DIR")
    parser.set_defaults(run=_report)


def _add_zero_shot(commands: Any) -> None:
    parser = commands.add_parser(
        "zero-shot",
        help="a dual encoder's zero-shot decisions as named concepts",
        description="Learn a dual encoder's zero-shot decisions on photographs, and name what they rest on by "
        "captions. Names are chosen on training pictures and tried on test pictures.",
    )
    parser.add_argument("--data", metavar="DIR", required=True, help="as for fit")
    parser.add_argument(
        "--model",
        metavar="NAME",
        required=True,
        help="hub id, checkpoint directory, or module:function, a Python function that returns a DualEncoder with a "
        "processor; its code is run",
    )
    parser.add_argument("--layer", metavar="NAME", help="of the image tower (default: the block at three quarters)")
    parser.add_argument("--template", default="a photo of a {}", help="of the classes' captions (default: %(default)s)")
    parser.add_argument(
        "--names", metavar="FILE", help="captions to name concepts by, one a line (default: the classes')"
    )
    parser.add_argument("--limit", type=int, help="the first so many pictures per class and split (default: all)")
    parser.add_argument("--test-share", type=float, default=0.3, help="held out per class (default: %(default)s)")
    parser.add_argument("--split-seed", type=int, default=0, help="of that choice (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="fits (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=100, help="most of a fit (default: %(default)s)")
    parser.add_argument("--estimator", default="gumbel", help="as for fit (default: %(default)s)")
    parser.set_defaults(run=_zero_shot)


def _add_study(parser: Any) -> None:
    parser.add_argument("study", metavar="DIR", help="what captum-m2ib disent fit wrote")
    parser.add_argument("--backbone", metavar="NAME", help="again, to allow a Python function's code to run")
    parser.add_argument("--data", metavar="DIR", help="where the photographs are now (default: where they were)")
    parser.add_argument("--head", default="infodisent", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="which fit of the head (default: %(default)s)")


def _fit(given: argparse.Namespace) -> None:
    from captum_m2ib.disent.named import as_arguments
    from captum_m2ib.disent.study import Study
    from captum_m2ib.disent.study_settings import StudySettings

    names = ["side", "test_share", "split_seed", "train_backbone", "seeds", "epochs", "epic_epochs"]
    names += ["estimator", "choose", "batch_size", "lr"]
    settings = StudySettings(
        _place(given.data),
        given.backbone,
        given.layer,
        weights=given.weights and os.path.abspath(given.weights),
        options=as_arguments(given.options),
        **{name: getattr(given, name) for name in names},
        transform_lr=given.transform_lr,
    )
    study = Study(given.output, settings, sys.stderr.isatty())
    study.collect(sys.stderr.isatty())
    for problem in study.problems:
        print(f"{problem.kind}: {problem.where}: {problem.reason}", file=sys.stderr)
    study.fit(sys.stderr.isatty(), print)
    print(f"written  {os.fspath(given.output)}")


def _open(given: argparse.Namespace) -> Study:
    from captum_m2ib.disent.study import Study

    return Study.open(given.study, given.backbone, given.data and _place(given.data))


def _place(data: str) -> str:
    """A folder wherever the next command runs; the hub's names stay as they are."""
    from captum_m2ib.disent.photographs import HUB

    return data if data.startswith(HUB) else os.path.abspath(data)


def _explain(given: argparse.Namespace) -> None:
    import numpy as np

    from captum_m2ib.disent.figures import local_figure
    from captum_m2ib.encoders.pictures import load_picture

    output, study = _figure_file(given.output), _open(given)
    model = study.model(given.head, given.seed)
    crop = study.backbone.preparation.crop(load_picture(given.picture, "PICTURE"))
    image = study.backbone.preparation.tensor(crop)[None]
    target = None if given.kind is None else study.class_index(given.kind)
    found = model.contributions(image, target)
    local_figure(model, image, np.asarray(crop), target, n_halves=given.halves).savefig(output)
    print(f"class    {model.name_of(int(found.target[0]))}, logit {float(found.logits[0, found.target[0]]):.2f}")
    for half in found.top(given.halves)[0]:
        sign = "+" if half.sign > 0 else "-"
        print(f"channel  {half.channel}{sign} at row {half.cell[0]}, column {half.cell[1]}: {half.contribution:+.2f}")
    print(f"picture  {os.fspath(output)}")


def _prototypes(given: argparse.Namespace) -> None:
    from captum_m2ib.disent.figures import class_figure
    from captum_m2ib.disent.prototypes import explain_class

    output, study = _figure_file(given.output), _open(given)
    model = study.model(given.head, given.seed)
    prototypes = study.prototypes(model)
    page = explain_class(model, study.train, study.class_index(given.kind), prototypes, given.halves)
    class_figure(model, page, prototypes, study.crops).savefig(output)
    print(f"picture  {os.fspath(output)}")


def _report(given: argparse.Namespace) -> None:
    from captum_m2ib.disent.page import write_page

    output = write_page(_open(given), given.output, head=given.head, seed=given.seed, n_halves=given.halves)
    print(f"written  {os.fspath(output)}")


def _zero_shot(given: argparse.Namespace) -> None:
    from captum_m2ib.disent.photographs import read_photographs
    from captum_m2ib.disent.zero_shot_study import ZeroShotSettings, read_names, told_lines, zero_shot_study
    from captum_m2ib.encoders.naming import load_named

    names = None if given.names is None else read_names(given.names)
    settings = ZeroShotSettings(
        given.layer, given.template, names, given.limit, given.seeds, given.epochs, given.estimator
    )
    photographs = read_photographs(_place(given.data), given.test_share, given.split_seed)
    found = zero_shot_study(load_named(given.model), photographs, settings, sys.stderr.isatty())
    print("\n".join(told_lines(found)))


def _figure_file(name: str) -> Path:
    path = Path(name)
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--output: expected a file name that ends in .png, .pdf or .svg, got {name!r}.")
    if not path.parent.is_dir():
        raise ValueError(f"--output: there is no folder {path.parent}; make it first.")
    return path
