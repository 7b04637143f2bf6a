"""The sub-command ``captum-m2ib train-scenes``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_train(commands: Any, check_device: Callable[[str | None], str | None]) -> None:
    r"""Add ``train-scenes`` to the command line.

    Args:

        commands: What ``ArgumentParser.add_subparsers`` returned. The command's function is the default ``run``.
        check_device (Callable): Refuses a device that is not there.
    """
    parser = commands.add_parser(
        "train-scenes",
        help="train the compact dual encoder on drawn scenes",
        description="Train the compact dual encoder that is shipped, from nothing; an interrupted run resumes.",
    )
    parser.add_argument("--output", metavar="DIR", required=True, help="checkpoint directory to write")
    parser.add_argument("--steps", type=int, help="updates (default: as for the shipped model)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and scenes (default: %(default)s)")
    parser.add_argument(
        "--ground",
        choices=("textured", "plain", "white", "black", "grey"),
        default="textured",
        help="what the objects lie on; plain: white, black or grey in turn (default: %(default)s)",
    )
    parser.add_argument("--device", help="for example cuda (default: cuda where there is one)")
    parser.add_argument("--restart", action="store_true", help="ignore the saved state of an interrupted run")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that is already there")

    def run(given: argparse.Namespace) -> None:
        from captum_m2ib.scenes import train

        steps = {} if given.steps is None else {"steps": given.steps}
        train(
            given.output,
            seed=given.seed,
            ground=given.ground,
            device=check_device(given.device),
            resume=not given.restart,
            overwrite=given.overwrite,
            **steps,
        )

    parser.set_defaults(run=run)
