"""The sub-commands ``captum-m2ib benchmark NAME``.

A benchmark's own folder adds it to ``benchmarks``, with its own parser and the function that runs it as the default
``run``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from captum_m2ib.benchmark.concepts.command import add_concepts
from captum_m2ib.benchmark.interactions.command import add_interactions
from captum_m2ib.benchmark.pages.command import add_pages
from captum_m2ib.benchmark.pairs.command import add_pairs
from captum_m2ib.benchmark.photos.command import add_photos
from captum_m2ib.benchmark.roar.command import add_roar
from captum_m2ib.benchmark.scenes.command import add_scenes
from captum_m2ib.benchmark.speed.command import add_speed

if TYPE_CHECKING:
    from captum_m2ib.benchmark.loading import CheckDevice, Load


def add_benchmark(commands: Any, load: Load, check_device: CheckDevice) -> None:
    r"""Add ``benchmark`` and what is under it to the command line.

    Args:

        commands: What ``ArgumentParser.add_subparsers`` returned.
        load (Callable): From arguments with ``model`` (and maybe ``revision`` and ``device``) to an encoder.
        check_device (Callable): Refuses a device that is not there.
    """
    parser = commands.add_parser("benchmark", help="measure")
    benchmarks = parser.add_subparsers(required=True, metavar="BENCHMARK")
    add_speed(benchmarks, check_device)
    add_scenes(benchmarks, load)
    add_pairs(benchmarks, load)
    add_pages(benchmarks, load)
    add_photos(benchmarks, load)
    add_roar(benchmarks, load)
    add_concepts(benchmarks)
    add_interactions(benchmarks, load)
