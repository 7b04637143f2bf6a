"""The sub-command ``captum-m2ib interactions``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder
    from captum_m2ib.games import Interactions


def add_interactions(
    commands: Any,
    add_model: Callable[[argparse.ArgumentParser], None],
    load: Callable[[argparse.Namespace], DualEncoder],
) -> None:
    r"""Add ``interactions`` to the command line.

    Args:

        commands: What ``ArgumentParser.add_subparsers`` returned. The command's function is the default ``run``.
        add_model (Callable): Adds the options that choose a model.
        load (Callable): From what was parsed of them to an encoder.
    """
    parser = commands.add_parser(
        "interactions",
        help="which words of a caption act together with which patches of a picture",
        description="Weighted Banzhaf interactions of the words of a caption with the patches of a picture; without "
        "any, of a drawn scene with the model that is shipped.",
    )
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="picture: JPEG, PNG, WebP, BMP, GIF or TIFF")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="caption")
    add_model(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="interactions.png",
        help=".png, .pdf, .svg, or .html: a page in which words and patches are selected (default: %(default)s)",
    )
    parser.add_argument(
        "--p", type=float, default=0.5, help="with which probability a patch or a word is there (default: %(default)s)"
    )
    parser.add_argument(
        "--budget",
        type=int,
        nargs=2,
        metavar=("PICTURES", "CAPTIONS"),
        help="so many masked ones (default: 16 pictures per patch, 512 at least; 256 captions)",
    )
    parser.add_argument(
        "--within",
        action="store_true",
        help="fit pairs of patches and pairs of words, too: explains more, from more masked pictures than pairs",
    )
    parser.add_argument(
        "--cell", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="what is masked at once (default: a patch)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the masks (default: %(default)s)")
    parser.set_defaults(run=lambda given: _interactions(given, load))


def _interactions(given: argparse.Namespace, load: Callable[[argparse.Namespace], DualEncoder]) -> None:
    if given.image is not None and given.text is None:
        raise ValueError(
            f"TEXT: expected a caption after the picture {given.image!r}; captum-m2ib interactions IMAGE TEXT."
        )
    from captum_m2ib.encoders.pictures import load_picture
    from captum_m2ib.explanations.files import check_output, written_line
    from captum_m2ib.games import interactions
    from captum_m2ib.games.found import WRITERS
    from captum_m2ib.scenes.example import example_scene

    output = check_output(given.output, WRITERS)
    image: Any
    if given.image is None:
        scene = example_scene()
        image, text = scene.image, scene.caption
    else:
        image, text = load_picture(given.image, "IMAGE"), given.text
    found = interactions(
        load(given),
        image,
        text,
        p=given.p,
        budget=None if given.budget is None else tuple(given.budget),
        within=given.within,
        cell=None if given.cell is None else tuple(given.cell),
        seed=given.seed,
        show_progress=sys.stderr.isatty(),
    )
    found.save(output)
    print(_summary(found))
    print(written_line(output))


def _summary(found: Interactions) -> str:
    from captum_m2ib.games.figure import told

    lines = [f"caption  {found.caption}", f"score    {found.score:.3f} ({found.score_name})", f"fit      {told(found)}"]
    for index, (token, value, row) in enumerate(zip(found.tokens, found.fit.caption, found.fit.across, strict=True)):
        patch = int(row.argmax())
        head = "" if index else "words"
        lines.append(f"{head:9}{token:16}  {value:+.3f}  most with patch {patch} ({row[patch]:+.3f})")
    return "\n".join(lines)
