"""The sub-commands ``captum-m2ib audit`` and ``captum-m2ib report``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_m2ib.audit.run import Summary


def add_commands(commands: Any) -> None:
    r"""Add both to the command line.

    Args:

        commands: What ``ArgumentParser.add_subparsers`` returned. Each command's function is the default ``run``.
    """
    _add_audit(commands)
    _add_report(commands)


def _add_audit(commands: Any) -> None:
    parser = commands.add_parser(
        "audit",
        help="explain every pair of a manifest",
        description="Explain every pair of a manifest: one row each, errors included. The same command again goes on "
        "where an interrupted one stopped.",
    )
    parser.add_argument(
        "manifest",
        metavar="MANIFEST",
        help=".parquet, .csv, .tsv, .jsonl, .arrow or .tar; or a folder of pictures, of parquet or tar files, or a "
        "data set on disk",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for the table of explanations")
    parser.add_argument("--columns", nargs="+", default=[], metavar="NAME=COLUMN", help="for example caption=title")
    parser.add_argument("--images", metavar="DIR", help="where relative paths start (default: the manifest's folder)")
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="hub id, checkpoint directory, or module:function, a Python function that returns a DualEncoder with a "
        "processor; its code is run (default: shipped model)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--device", help="for example cuda (default: cpu)")
    parser.add_argument(
        "--layers",
        nargs=2,
        metavar=("IMAGE_LAYER", "TEXT_LAYER"),
        help="dotted names, or inputs[0] for the picture itself (default: what is recommended)",
    )
    parser.add_argument(
        "--method", metavar="NAME", default="m2ib", help="one that captum-m2ib explain names (default: %(default)s)"
    )
    parser.add_argument("--published", action="store_true", help="--method m2ib-published")
    parser.add_argument("--beta", type=float, help="weight of information (default: as measured for the prior)")
    parser.add_argument("--steps", type=int, help="optimisation steps (default: the method's)")
    parser.add_argument("--samples", type=int, help="draws per step (default: the method's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--joint", action="store_true", help="optimise both modalities against one score")
    parser.add_argument("--contrast", metavar="CAPTION", help="compare each map with the one for this caption")
    parser.add_argument("--halves", action="store_true", help="score each picture's best half and other half, too")
    parser.add_argument("--no-check", action="store_true", help="leave out the maps' check of themselves")
    parser.add_argument("--cut-captions", action="store_true", help="explain the beginning of captions too long")
    parser.add_argument("--thumbnail", type=int, default=128, help="side kept of each picture (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="pairs explained at once (default: %(default)s)")
    parser.add_argument("--shard-size", type=int, default=256, help="pairs in a file (default: %(default)s)")
    parser.add_argument("--engine", choices=("embedded", "ray"), default="embedded", help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=1, help="processes of the engine ray (default: %(default)s)")
    parser.add_argument("--gpus", type=float, default=0.0, help="GPUs for each of them (default: %(default)s)")
    parser.add_argument(
        "--decode-workers",
        type=int,
        default=1,
        metavar="N",
        help="threads of each worker that decode the next batch's pictures (default: %(default)s)",
    )
    parser.add_argument("--address", help="of a running Ray cluster (default: one on this machine)")
    parser.set_defaults(run=_audit)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="a page about an audit",
        description="Write one page about an audit that needs no other file and no network.",
    )
    parser.add_argument("audit", metavar="DIR", help="an audit's output")
    parser.add_argument("--compare", metavar="DIR", help="another audit of the same pairs, side by side")
    parser.add_argument("--output", metavar="FILE", help="default: report.html in DIR")
    parser.add_argument("--pairs", type=int, default=5000, help="most pairs shown (default: %(default)s)")
    parser.add_argument("--title", help="default: the model and the manifest")
    parser.set_defaults(run=_report)


def _audit(given: argparse.Namespace) -> None:
    from captum_m2ib.audit.run import run_audit

    # Also for the processes of Ray: nothing but the audit's own progress is shown.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        summary = run_audit(
            given.manifest,
            given.output,
            columns=parse_columns(given.columns),
            root=given.images,
            shard_size=given.shard_size,
            engine=given.engine,
            workers=given.workers,
            gpus=given.gpus,
            address=given.address,
            decode_workers=given.decode_workers,
            show_progress=sys.stderr.isatty(),
            model=given.model,
            revision=given.revision,
            device=given.device,
            layers=given.layers,
            method=given.method,
            published=given.published,
            beta=given.beta,
            n_steps=given.steps,
            n_samples=given.samples,
            seed=given.seed,
            joint=given.joint,
            contrast=given.contrast,
            halves=given.halves,
            check=not given.no_check,
            cut_captions=given.cut_captions,
            thumbnail=given.thumbnail,
            batch_size=given.batch,
        )
    except KeyboardInterrupt:
        print(_how_to_resume(), file=sys.stderr)
        raise
    print(_told(summary))
    if summary.interrupted:
        print(_how_to_resume(), file=sys.stderr)
        raise KeyboardInterrupt


def _report(given: argparse.Namespace) -> None:
    from captum_m2ib.audit.report import write_report

    output = write_report(given.audit, given.output, compare=given.compare, pairs=given.pairs, title=given.title)
    print(f"written  {os.fspath(output)}")


def parse_columns(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, separator, column = pair.partition("=")
        if not (name and separator and column):
            raise ValueError(f"--columns: expected NAME=COLUMN, such as caption=title, got {pair!r}.")
        found[name] = column
    return found


def _how_to_resume() -> str:
    return f"to go on from here: {shlex.join(['captum-m2ib', *sys.argv[1:]])}"


_PLURALS = {"holds": "hold", "fails": "fail"}


def _told(summary: Summary) -> str:
    failed = sum(summary.errors.values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in summary.errors.items())
    lines = [
        f"explained  {summary.finished - failed:,} of {summary.rows:,} pairs",
        f"errors     {failed:,}{f' ({kinds})' if kinds else ''}",
    ]
    for side, counts in summary.checks.items():
        name = summary.kind if side == "image" else side
        told = ", ".join(f"{count:,} {_PLURALS.get(verdict, verdict)}" for verdict, count in counts.items())
        lines.append(f"{f'{name} maps':10} {told}")
    if summary.explained_now:
        rate = summary.explained_now / max(summary.seconds, 1e-9)
        lines.append(f"rate       {rate:.2f} pairs/s ({summary.explained_now:,} in {summary.seconds:.1f} s)")
    if summary.finished:
        per_million = summary.size / summary.finished / 1000
        lines.append(f"storage    {summary.size / 1e6:.2f} MB ({per_million:.2f} GB per million pairs)")
    lines.append(f"written    {os.fspath(summary.output)}")
    if summary.finished == summary.rows:
        lines.append(f"next       captum-m2ib report {shlex.quote(os.fspath(summary.output))}")
    return "\n".join(lines)
