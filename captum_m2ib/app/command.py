"""The command ``captum-m2ib app``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder


def add_app(commands: Any, load: Callable[[argparse.Namespace], DualEncoder]) -> None:
    r"""Add ``app`` to the command line.

    Args:

        commands: What ``ArgumentParser.add_subparsers`` returned.
        load (Callable): From arguments with ``model``, ``revision`` and ``device`` to an encoder.
    """
    parser = commands.add_parser(
        "app",
        help="a page in the browser to explain pictures and captions on",
        description="Serve a page on which pictures and captions are explained. It asks no other machine for anything.",
    )
    parser.add_argument("--model", metavar="NAME", help="as for explain (default: shipped model)")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--device", help="for example cuda (default: cpu)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default: %(default)s, for this machine alone)"
    )
    parser.add_argument("--port", type=int, help="0 for any that is free (default: the first free one from 7860)")

    def run(given: argparse.Namespace) -> None:
        from captum_m2ib.app.blocks import import_gradio
        from captum_m2ib.app.serving import free_port, serve

        # Before the model is read, which can take long.
        import_gradio()
        port = free_port(given.host, given.port)
        serve(load(given), given.model or "the model of drawn scenes that is shipped", given.host, port)

    parser.set_defaults(run=run)
