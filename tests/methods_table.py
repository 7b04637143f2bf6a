"""Write the table of methods in docs/guides/compare.md from the registry; a test says when it is out of date."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import environment  # noqa: F401 - comes first
import late
import numpy as np
import torch
import zoo
from families import conv_case, tiny_clip

from captum_m2ib import DualEncoder
from captum_m2ib.attr.registry import METHODS, NamedMethod

PAGE = Path(__file__).parents[1] / "docs" / "guides" / "compare.md"

START, END = "<!-- table -->\n", "<!-- end of table -->\n"
HEAD = """\
| method | class | what it is | needs | maps are in | below zero | refuses |
|---|---|---|---|---|---|---|
"""
FEW: dict[str, dict[str, int]] = {
    "m2ib": {"n_steps": 2},
    "m2ib-published": {"n_steps": 2},
    "nib": {"n_steps": 2},
    "rise": {"n_masks": 16},
}
"""Settings with which a method is quick."""

Given = tuple[Any, Any, Any]


@cache
def given(model: str) -> Given:
    """A model of each kind, by its name in the table, and one pair or more: forward function, inputs, and the rest."""
    torch.manual_seed(0)
    if model == "late interaction":
        encoder = zoo.encoder_of(zoo.model_named("colpali"), processor=late.colpali())
        picture = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
        pairs = encoder.prepare(picture, "revenue 2024")
        return encoder, pairs.inputs, pairs.additional_forward_args
    if model == "towers without known blocks":
        case = conv_case()
        return case.forward, case.inputs, case.additional
    encoder = DualEncoder(tiny_clip().eval())
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[1, 5, 6, 7, 2], [1, 8, 9, 10, 2]])
    return encoder, (pixels, ids), (torch.ones_like(ids),)


MODELS = ("transformers (CLIP)", "towers without known blocks", "late interaction")


def maps_of(name: str, model: str) -> tuple[torch.Tensor, ...]:
    """A method's maps on a model, both inputs'."""
    forward, inputs, additional = given(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = METHODS[name].make(forward)
        found: tuple[torch.Tensor, ...] = method.attribute(
            inputs, additional_forward_args=additional, **FEW.get(name, {})
        )
    return found


@cache
def answer(name: str, model: str) -> tuple[torch.Tensor, ...] | str:
    """A method's maps on a model, or the sentence in which it is refused."""
    found: list[tuple[torch.Tensor, ...]] = []
    return told(lambda: found.append(maps_of(name, model))) or found[0]


def told(run: Callable[[], Any]) -> str | None:
    """The sentence in which something is refused; None where it is not."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return None


def row(method: NamedMethod) -> str:
    refused = [model for model in MODELS if isinstance(answer(method.name, model), str)]
    cells = (
        f"`{method.name}`",
        f"`{method.kind.__name__}`",
        method.about,
        ", ".join(method.needs) or "the score alone",
        method.unit,
        "yes" if method.is_signed else "no",
        ", ".join(refused) or "none of these",
    )
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    return HEAD + "".join(row(method) for method in METHODS.values())


def page() -> str:
    """The page with its table made anew."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
