"""The command ``captum-m2ib``: its parser, to which the rooms bring their sub-commands, and how a model is chosen.

Whatever the user can get wrong ends in one line on stderr that says what and what to do, and exit status 2.
"""

from __future__ import annotations

import argparse
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import captum_m2ib
from captum_m2ib.app.command import add_app
from captum_m2ib.audit import command as audit
from captum_m2ib.benchmark.command import add_benchmark
from captum_m2ib.disent.command import add_disent
from captum_m2ib.explanations.command import add_explain
from captum_m2ib.games.command import add_interactions
from captum_m2ib.scenes.command import add_train

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder


def main(arguments: Sequence[str] | None = None) -> int:
    r"""Run the command.

    Args:

        arguments (sequence of str, optional): Default: None (those of the process)

    Returns:
        int: exit status: 0, 2 for what the user can mend, 130 when interrupted.
    """
    given = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], None] = given.run
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A caption may hold letters that the terminal cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            run(given)
    except KeyboardInterrupt:
        print("captum-m2ib: interrupted.", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, TypeError, ArithmeticError, MemoryError) as error:
        print(f"captum-m2ib: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="captum-m2ib",
        description="Explain which parts of a picture and which words of a caption make them match, in bits.",
    )
    parser.add_argument("--version", action="version", version=captum_m2ib.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add_explain(commands, _add_model, _load)
    add_interactions(commands, _add_model, _load)
    add_train(commands, _device)
    add_benchmark(commands, _load, _device)
    audit.add_commands(commands)
    add_disent(commands)
    add_app(commands, _load)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        metavar="NAME",
        help="hub id or directory of a transformers checkpoint, an adapter or a SentenceTransformer; of open_clip "
        "hf-hub:ORG/NAME or open_clip:ARCHITECTURE:WEIGHTS; or module:function, a Python function that returns a "
        "DualEncoder with a processor, whose code is run (default: shipped model)",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--device", help="for example cuda (default: cpu)")


def _load(given: argparse.Namespace) -> DualEncoder:
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    from captum_m2ib.encoders.naming import load_named
    from captum_m2ib.scenes import CHECKPOINT

    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        # A command cannot go on without a processor as a program with tensors of its own can.
        warnings.filterwarnings("error", message="model: .* no usable processor")
        try:
            return load_named(
                given.model or CHECKPOINT,
                revision=getattr(given, "revision", None),
                device=_device(getattr(given, "device", None)),
            )
        except UserWarning as warning:
            raise ValueError(str(warning)) from None


def _device(name: str | None) -> str | None:
    import torch

    if name is None:
        return None
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = "unknown"
    known = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not known.get(kind, False):
        there = ", ".join(kind for kind, is_there in known.items() if is_there)
        raise ValueError(f"--device: there is no {name!r} here; choose one of {there}.")
    return name


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"captum-m2ib: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split()) or type(message).__name__
