"""The sub-command ``captum-m2ib explain``."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder
    from captum_m2ib.explanations.explanation import Explanation


def add_explain(
    commands: Any,
    add_model: Callable[[argparse.ArgumentParser], None],
    load: Callable[[argparse.Namespace], DualEncoder],
) -> None:
    r"""Add ``explain`` to the command line.

    Args:

        commands: What ``ArgumentParser.add_subparsers`` returned. The command's function is the default ``run``.
        add_model (Callable): Adds the options that choose a model.
        load (Callable): From what was parsed of them to an encoder.
    """
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
    add_model(parser)
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
    _help_late(parser, method, _methods_help)
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
    parser.set_defaults(run=lambda given: _explain(given, load))


def _help_late(parser: Any, action: argparse.Action, make: Callable[[], str]) -> None:
    """Ask for an option's help only when it is shown: what names methods takes seconds to import."""
    plain = parser.format_help

    def format_help() -> str:
        action.help = make()
        return str(plain())

    parser.format_help = format_help


def _methods_help() -> str:
    from captum_m2ib.attr.registry import METHODS

    return "; ".join(f"{name}: {method.about}" for name, method in METHODS.items()) + " (default: m2ib)"


def _explain(given: argparse.Namespace, load: Callable[[argparse.Namespace], DualEncoder]) -> None:
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
    from captum_m2ib.engine.stakes import NothingToExplainWarning
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
    encoder = load(given)
    with warnings.catch_warnings():
        if not given.no_check:
            # The check says so.
            warnings.simplefilter("ignore", NothingToExplainWarning)
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
        from captum_m2ib.scenes.example import example_scene

        scene = example_scene()
        return scene.image, [scene.caption]
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
    from captum_m2ib.explanations.files import written_line

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
    print(written_line(output))


def _compare(encoder: DualEncoder, image: Any, texts: list[str], given: argparse.Namespace, output: Path) -> None:
    from captum_m2ib.explanations.compare import Comparison, compare
    from captum_m2ib.explanations.files import written_line

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
    print(written_line(output))


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
