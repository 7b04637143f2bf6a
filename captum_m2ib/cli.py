"""The command ``captum-m2ib``: explain a pair, audit many, train the compact model, run a benchmark, serve a page.

Whatever the user can get wrong ends in one line on stderr that says what and what to do, and exit status 2.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import captum_m2ib
from captum_m2ib.app.command import add_app
from captum_m2ib.audit import command as audit
from captum_m2ib.benchmark.command import add_benchmark
from captum_m2ib.disent.command import add_disent

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder
    from captum_m2ib.explanations.explanation import Explanation
    from captum_m2ib.games import Interactions

# The scene that is explained when no picture is given: several objects, one of them named.
EXAMPLE_SCENE = 8
_EXAMPLE_SIDE = 384


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


class _Parser(argparse.ArgumentParser):
    """A parser that asks for some of its help only when it is shown: what names methods takes seconds to import."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.late: list[tuple[argparse.Action, Callable[[], str]]] = []

    def format_help(self) -> str:
        for action, make in self.late:
            action.help = make()
        return super().format_help()


def _parser() -> _Parser:
    parser = _Parser(
        prog="captum-m2ib",
        description="Explain which parts of a picture and which words of a caption make them match, in bits.",
    )
    parser.add_argument("--version", action="version", version=captum_m2ib.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_explain(commands)
    _add_interactions(commands)
    _add_train(commands)
    add_benchmark(commands, _load, _device)
    audit.add_commands(commands)
    add_disent(commands)
    add_app(commands, _load)
    return parser


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="explain one picture and caption (without any: an example scene)",
        description="Explain one picture and caption; without any, a drawn scene with the model that is shipped.",
    )
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="picture: JPEG, PNG, WebP, BMP, GIF or TIFF")
    parser.add_argument("text", nargs="*", metavar="TEXT", help="caption; several are shown side by side")
    parser.add_argument("--sound", metavar="FILE", help="a WAV file in the place of IMAGE, for a model of sounds")
    parser.add_argument(
        "--frames", metavar="PATH", help="a folder of pictures or a GIF in the place of IMAGE, for a model of videos"
    )
    parser.add_argument("--frames-per-second", type=float, metavar="N", help="of --frames, to tell maps in seconds")
    parser.add_argument("--instead-of", metavar="CAPTION", help="why TEXT rather than this caption (method m2ib)")
    _add_model(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        default="explanation.png",
        help=".png, .pdf, .svg, .html, .npz or .json; of several methods or captions no data (default: %(default)s)",
    )
    parser.add_argument(
        "--layers",
        nargs=2,
        metavar=("IMAGE_LAYER", "TEXT_LAYER"),
        help="dotted names, or inputs[0] for the picture itself (default: what is recommended)",
    )
    method = parser.add_argument("--method", metavar="NAME", nargs="+", default=["m2ib"])
    parser.late.append((method, _methods_help))
    parser.add_argument("--published", action="store_true", help="--method m2ib-published")
    parser.add_argument(
        "--whole", action="store_true", help="lay the map over the whole picture, of which the model may see a part"
    )
    parser.add_argument(
        "--style",
        choices=("heat", "safe", "contour"),
        default="heat",
        help="of one explanation: safe survives a grey print and colour blindness; contour, for figures, is a line "
        "round the top half of the map (default: %(default)s)",
    )
    parser.add_argument("--beta", type=float, help="weight of information (default: as measured for the prior)")
    parser.add_argument("--steps", type=int, help="optimisation steps (default: the method's)")
    parser.add_argument("--samples", type=int, help="draws per step (default: the method's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    parser.add_argument("--joint", action="store_true", help="optimise both modalities against one score")
    parser.add_argument(
        "--tokens", metavar="WORDS", help="words of TEXT whose share of a MaxSim score is explained (default: all)"
    )
    parser.add_argument("--no-check", action="store_true", help="leave out the map's check of itself")
    parser.set_defaults(run=_explain)


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


def _add_interactions(commands: Any) -> None:
    parser = commands.add_parser(
        "interactions",
        help="which words of a caption act together with which patches of a picture",
        description="Weighted Banzhaf interactions of the words of a caption with the patches of a picture; without "
        "any, of a drawn scene with the model that is shipped.",
    )
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="picture: JPEG, PNG, WebP, BMP, GIF or TIFF")
    parser.add_argument("text", nargs="?", metavar="TEXT", help="caption")
    _add_model(parser)
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
    parser.set_defaults(run=_interactions)


def _add_train(commands: Any) -> None:
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
    parser.set_defaults(run=_train)


def _explain(given: argparse.Namespace) -> None:
    _give_back_pair(given)
    timed = _timed(given)
    if given.image is not None and not given.text:
        raise ValueError(f"TEXT: expected a caption after the picture {given.image!r}; captum-m2ib explain IMAGE TEXT.")
    if given.published and given.layers:
        raise ValueError("--published: chooses the layers itself; leave out --layers or --published.")
    if given.published and not set(given.method) <= {"m2ib", "m2ib-published"}:
        names = " ".join(given.method)
        raise ValueError(f"--published: is a method of its own; leave out --published or --method {names}.")
    if given.instead_of is not None and (given.method != ["m2ib"] or given.published or given.layers):
        raise ValueError("--instead-of: is for the method m2ib at its own layers; leave out the other or this.")
    from captum_m2ib.attr.registry import METHODS
    from captum_m2ib.explanations.compare import COMPARED
    from captum_m2ib.explanations.files import FIGURES, check_output

    for name in given.method:
        if name not in METHODS:
            raise ValueError(f"--method: expected one of {', '.join(METHODS)}, got {name!r}.")

    several = len(given.method) > 1 or len(given.text) > 1
    if timed is not None and given.whole:
        raise ValueError(f"{timed}: no --whole, which is for pictures; leave it out.")
    output = check_output(given.output, COMPARED if several else None)
    if given.style != "heat" and several:
        raise ValueError("--style: is for the figure or page of one explanation; leave it out.")
    if given.style == "contour" and output.suffix.lower() not in FIGURES:
        raise ValueError(f"--style contour: is for a figure, .png, .pdf or .svg, got {given.output}.")
    if given.whole and (several or output.suffix.lower() not in (*FIGURES, ".html")):
        raise ValueError(
            f"--whole: is for the figure or page of one explanation, .png, .pdf, .svg or .html, got {given.output}; "
            "leave it out."
        )
    image, text = _given_pair(given)
    encoder = _load(given)
    with warnings.catch_warnings():
        if not given.no_check:
            # The check says so.
            warnings.simplefilter("ignore", captum_m2ib.NothingToExplainWarning)
        if several:
            _compare(encoder, image, text, given, output)
        else:
            _explain_one(encoder, image, text[0], given, output)


def _timed(given: argparse.Namespace) -> str | None:
    """Which option names a sound or a video; what is written in the place of a picture is then the caption."""
    named = [f"--{name}" for name in ("sound", "frames") if getattr(given, name) is not None]
    if len(named) > 1:
        raise ValueError("--sound, --frames: expected one of them; explain a sound and a video one after the other.")
    if given.frames_per_second is not None and named != ["--frames"]:
        raise ValueError("--frames-per-second: is for --frames PATH; leave it out.")
    if not named:
        return None
    if given.image is None:
        raise ValueError(f"TEXT: expected a caption; captum-m2ib explain {named[0]} PATH TEXT --model NAME.")
    given.image, given.text = None, [given.image, *given.text]
    return named[0]


def _given_pair(given: argparse.Namespace) -> tuple[Any, list[str]]:
    """What is to be explained, read before the model is, and the captions."""
    if given.sound is not None:
        from captum_m2ib.encoders.sounds import load_sound

        return load_sound(given.sound, "--sound"), given.text
    if given.frames is not None:
        from captum_m2ib.encoders.frames import Video, load_video

        video = load_video(given.frames, "--frames")
        rate = given.frames_per_second
        return video if rate is None else Video(video.frames, rate), given.text
    if given.image is None:
        return _example()
    from captum_m2ib.encoders.pictures import load_picture

    return load_picture(given.image, "IMAGE"), given.text


def _give_back_pair(given: argparse.Namespace) -> None:
    """Take a picture and captions that were written after the names of methods for what they are."""
    from captum_m2ib.attr.registry import METHODS

    names = list(takewhile(METHODS.__contains__, given.method))
    rest = given.method[len(names) :]
    if given.image is None and names and len(rest) > 1:
        given.method, given.image, given.text = names, rest[0], rest[1:]


def _explain_one(encoder: DualEncoder, image: Any, text: str, given: argparse.Namespace, output: Path) -> None:
    from captum_m2ib.explanations.explain import explain

    (name,) = given.method
    explanation = explain(
        encoder,
        image,
        text,
        method="m2ib" if given.instead_of is not None else _method(encoder, name, given),
        instead_of=given.instead_of,
        tokens=given.tokens,
        check=not given.no_check,
        show_progress=sys.stderr.isatty(),
        **_settings(name, given),
    )[0]
    explanation.save(output, image if given.whole else None, style=given.style)
    print(_summary(explanation))
    print(_written(output))


def _compare(encoder: DualEncoder, image: Any, texts: list[str], given: argparse.Namespace, output: Path) -> None:
    from captum_m2ib.explanations.compare import Comparison, compare

    rows = []
    for name in given.method:
        shared = {"instead_of": given.instead_of, "tokens": given.tokens, "check": not given.no_check}
        shared["show_progress"] = sys.stderr.isatty()
        method = "m2ib" if given.instead_of is not None else _method(encoder, name, given)
        (row,) = compare(encoder, image, texts, [method], **shared, **_settings(name, given)).rows
        rows.append(replace(row, name=name))
    Comparison(tuple(rows)).save(output)
    for row in rows:
        print(f"\nmethod   {row.name}, {row.seconds:.2g} s")
        print("\n".join(map(_summary, row.explanations)))
    print(_written(output))


def _interactions(given: argparse.Namespace) -> None:
    if given.image is not None and given.text is None:
        raise ValueError(
            f"TEXT: expected a caption after the picture {given.image!r}; captum-m2ib interactions IMAGE TEXT."
        )
    from captum_m2ib.encoders.pictures import load_picture
    from captum_m2ib.explanations.files import check_output
    from captum_m2ib.games import interactions
    from captum_m2ib.games.found import WRITERS

    output = check_output(given.output, WRITERS)
    image, (text,) = (load_picture(given.image, "IMAGE"), [given.text]) if given.image is not None else _example()
    found = interactions(
        _load(given),
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
    print(_interactions_summary(found))
    print(_written(output))


def _interactions_summary(found: Interactions) -> str:
    from captum_m2ib.games.figure import told

    lines = [f"caption  {found.caption}", f"score    {found.score:.3f} ({found.score_name})", f"fit      {told(found)}"]
    for index, (token, value, row) in enumerate(zip(found.tokens, found.fit.caption, found.fit.across, strict=True)):
        patch = int(row.argmax())
        head = "" if index else "words"
        lines.append(f"{head:9}{token:16}  {value:+.3f}  most with patch {patch} ({row[patch]:+.3f})")
    return "\n".join(lines)


def _written(output: Path) -> str:
    return f"{'picture' if output.suffix.lower() in ('.png', '.pdf', '.svg') else 'written'}  {os.fspath(output)}"


def _example() -> tuple[Any, list[str]]:
    from captum_m2ib.scenes import image_probes

    probe = image_probes(EXAMPLE_SCENE + 1, 0, _EXAMPLE_SIDE)[EXAMPLE_SCENE]
    return probe.image, [probe.caption]


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


def _methods_help() -> str:
    from captum_m2ib.attr.registry import METHODS

    return "; ".join(f"{name}: {method.about}" for name, method in METHODS.items()) + " (default: m2ib)"


def _method(encoder: DualEncoder, name: str, given: argparse.Namespace) -> Any:
    from captum_m2ib.attr.registry import method_named

    return method_named("m2ib-published" if given.published else name, encoder, given.layers)


def _settings(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """What was asked for of the method, once it is known to take that."""
    from captum_m2ib.attr.registry import settings_of

    asked = {"beta": given.beta, "n_steps": given.steps, "n_samples": given.samples, "joint": given.joint or None}
    flags = {"n_steps": "--steps", "n_samples": "--samples", **{name: f"--{name}" for name in ("beta", "joint")}}
    return settings_of(name, {**asked, "seed": given.seed}, flags)


def _summary(explanation: Explanation) -> str:
    from captum_m2ib.explanations.units import WORDINGS

    wording = WORDINGS[explanation.unit]
    top = ", ".join(f"{token} {_amount(bits, explanation.unit, 2)}" for token, bits in explanation.top_tokens(5))
    totals = (explanation.image_total_bits, explanation.token_total_bits)
    image, text = (
        f"{_amount(total, explanation.unit, 1)} {wording.name}" if wording.has_totals else wording.name
        for total in totals
    )
    return (
        f"caption  {explanation.caption}\n"
        f"score    {explanation.score:.3f} ({explanation.score_name})\n"
        f"{_rival(explanation)}{_taken(explanation)}"
        f"{explanation.kind:9}{image}\n"
        f"text     {text}; most in: {top}"
        + "".join(f"\n{'check' if not i else '':9}{line}" for i, line in enumerate(explanation.check_lines))
    )


def _rival(explanation: Explanation) -> str:
    told = explanation.settings
    return f"instead  {told['instead_of']} ({told['rival_score']:.3f})\n" if "instead_of" in told else ""


def _taken(explanation: Explanation) -> str:
    """What was taken of a sound or a video."""
    taken = "" if explanation.timeline is None else explanation.timeline.taken
    return f"taken    {taken}\n" if taken else ""


def _amount(value: float, unit: str, digits: int) -> str:
    return f"{value:.{digits}f}" if unit == "bits" else f"{value:.2g}"


def _train(given: argparse.Namespace) -> None:
    from captum_m2ib.scenes import train

    steps = {} if given.steps is None else {"steps": given.steps}
    train(
        given.output,
        seed=given.seed,
        ground=given.ground,
        device=_device(given.device),
        resume=not given.restart,
        overwrite=given.overwrite,
        **steps,
    )


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"captum-m2ib: warning: {_one_line(message)}", file=sys.stderr)


def _one_line(message: object) -> str:
    return " ".join(str(message).split()) or type(message).__name__
