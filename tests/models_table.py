"""Write the table in docs/models.md from the zoo; a test says when it is out of date."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import environment  # noqa: F401 - comes first
import torch
import zoo
from torch import nn

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, PackedLayout, PatchLayout, TextLayout

PAGE = Path(__file__).parents[1] / "docs" / "models.md"

START, END = "<!-- table -->\n", "<!-- end of table -->\n"
HEAD = """\
| family | library | reads | default layers | layout of the first input | layout of the second |
|---|---|---|---|---|---|
"""


def describe(layout: Any) -> str:
    """A layout in a few words."""
    if isinstance(layout, TextLayout):
        found = "tokens"
        for there, words in (
            (layout.reads_padding, "reads padding"),
            (layout.end_token_id is not None, "ends at the end token"),
            (layout.ends_at_highest, "ends at the highest id"),
            (layout.suffix, f"{layout.suffix} token after them"),
        ):
            found += f", {words}" if there else ""
        return found + (", mask" if layout.mask_argument is not None else "")
    if isinstance(layout, PackedLayout):
        return "packed patches with mask and shapes"
    assert isinstance(layout, PatchLayout)
    size = " x ".join(map(str, layout.patch_size))
    plain = max(layout.patch_size) > 1
    parts = [f"patches of {size}" if plain else "the map's own grid"]
    parts += [f"{layout.prefix} prefix"] if layout.prefix else []
    parts += [f"{layout.suffix} suffix"] if layout.suffix else []
    parts += ["coarser " + ", ".join(map(str, layout.coarser[1:]))] if len(layout.coarser) > 1 and plain else []
    parts += [f"windows of {layout.window}"] if layout.window else []
    parts += [f"time folded {layout.fold} times"] if layout.fold > 1 else []
    return ", ".join(parts)


def row(title: str, library: str, encoder: DualEncoder) -> str:
    layers = ", ".join(f"`{layer.name}`" for layer in MultiModalInfoBottleneck(encoder).layers)
    kinds = ", ".join(side.modality for side in encoder.sides)
    first, second = map(describe, encoder.layouts)
    return f"| {title} | {library} | {kinds} | {layers} | {first} | {second} |\n"


def table() -> str:
    from families import tiny_clip

    torch.manual_seed(0)
    rows = [row("CLIP", "transformers", DualEncoder(_quiet(tiny_clip)))]
    rows += [row(m.title, m.library, DualEncoder(_quiet(m.build).eval(), modalities=m.modalities)) for m in zoo.ZOO]
    return HEAD + "".join(rows)


def page() -> str:
    """The page with its table made anew."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    return before + START + table() + END + rest.split(END)[1]


def _quiet(build: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
