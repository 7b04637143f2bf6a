"""What the benchmarks' commands have in common: options that mean the same in each, and what is said at the end."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def add_model(parser: argparse.ArgumentParser, is_required: bool = False) -> None:
    """Add ``--model``, any that ``captum-m2ib explain`` takes, ``--revision`` and ``--device``."""
    shipped = "" if is_required else " (default: shipped model)"
    parser.add_argument(
        "--model",
        metavar="NAME",
        required=is_required,
        help="hub id, checkpoint directory, or module:function, a Python function that returns a DualEncoder with a "
        f"processor; its code is run{shipped}",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    add_device(parser)


def add_scenes_model(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, one that knows the scenes."""
    parser.add_argument("--model", metavar="DIR", help="checkpoint trained on scenes (default: shipped model)")


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add ``--device``."""
    parser.add_argument("--device", help="for example cuda (default: cpu)")


def add_methods(parser: argparse.ArgumentParser, told: str) -> None:
    """Add ``--method``, of which several may be named, once or in turn."""
    parser.add_argument("--method", action="extend", nargs="+", metavar="NAME", help=told)


def add_faithfulness(parser: argparse.ArgumentParser) -> None:
    """Add ``--steps`` and ``--without-faithfulness``."""
    parser.add_argument("--steps", type=int, default=50, help="of insertion and deletion (default: %(default)s)")
    parser.add_argument("--without-faithfulness", action="store_true", help="leave out what masks and asks again")


def add_output(parser: argparse.ArgumentParser, folder: str, is_resumed: bool = True) -> None:
    """Add ``--output``, a folder with a default."""
    told = "resumed if it is there" if is_resumed else "a folder"
    parser.add_argument("--output", metavar="DIR", default=folder, help=f"{told} (default: %(default)s)")


def check_least(given: argparse.Namespace, **least: int) -> None:
    r"""Refuse options that are too small.

    Args:

        given (argparse.Namespace): What was parsed.
        least: Per option the smallest number that it can be.

    Raises:
        ValueError: if one is smaller.

    Examples::

        >>> check_least(argparse.Namespace(probes=0), probes=1)
        Traceback (most recent call last):
        ...
        ValueError: --probes: expected at least 1, got 0.
    """
    for name, smallest in least.items():
        if getattr(given, name) < smallest:
            raise ValueError(f"--{name}: expected at least {smallest}, got {getattr(given, name)}.")


@contextmanager
def resumable(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Whoever interrupts this is told how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"to go on from here, give the same command again: {folder} keeps what is done", file=sys.stderr)
        raise


def print_written(folder: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Say which files there are now."""
    print(f"\nwritten  {', '.join(os.fspath(Path(folder) / name) for name in names)}")
