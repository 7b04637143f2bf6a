"""Does the bypass say where maps stop meaning something? Shares beside maps against the truth, layer by layer.

``python -m captum_m2ib.benchmark.scenes.bypass`` measures both on validation scenes: image maps on probes that name
one of two to four objects, token maps on probes that name an object that is there and one that is not. Every layer has
the standardised prior.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from captum_m2ib.attr import MultiModalInfoBottleneck
from captum_m2ib.benchmark.compare import estimate
from captum_m2ib.benchmark.scenes.measures import BLOCK, Block, draw_probes, pictures_on_truth, words_on_truth
from captum_m2ib.benchmark.scenes.run import Plan
from captum_m2ib.explanations.bypass_figure import plot_bypass
from captum_m2ib.metrics import Summary, spearman
from captum_m2ib.metrics.bypass import THRESHOLD, TowerBypass, measure_bypass

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder

FIGURES = {
    "image": ("image pointing", "image mass", "image auroc"),
    "text": ("text auroc", "text top-1", "text auroc, all words"),
}
"""What is measured of each modality's maps; the last is the one that shares are correlated with over probes."""


@dataclass(frozen=True)
class Row:
    r"""One layer.

    Attributes:

        modality (str): ``"image"`` or ``"text"``.
        layer (str): The layer's name.
        share (Summary): What survives noise on the map's units, over probes.
        figures (dict): Name to :class:`Summary`, over the same probes.
        correlation (float): Spearman's, over probes, of the share with the last figure; NaN where one is constant.
        is_default (bool): Whether this is the layer that the encoder recommends.
    """

    modality: str
    layer: str
    share: Summary
    figures: dict[str, Summary]
    correlation: float
    is_default: bool


def measure(encoder: DualEncoder, probes: int = 60, seed: int = 0) -> tuple[list[Row], tuple[TowerBypass, ...]]:
    r"""Shares and figures of every layer of both towers.

    Args:

        encoder (DualEncoder): An encoder trained on scenes, with a processor.
        probes (int, optional): Validation probes of each kind. Default: 60
        seed (int, optional): Which probes. Default: 0

    Returns:
        tuple: the rows, and what the figure shows: the image tower's shares on image probes, the text tower's on token
        probes.
    """
    plan = Plan(probes=probes, seed=seed, split="validation")
    kinds = draw_probes(encoder, probes, plan.probes_seed)
    block = Block(_Prepared(encoder), *kinds)
    given = (block.right, block.worded)
    towers = tuple(
        measure_bypass(encoder, pairs.inputs, pairs.additional_forward_args)[index] for index, pairs in enumerate(given)
    )
    defaults = encoder.recommended_layers()
    rows = []
    for index, tower in enumerate(towers):
        for place, (name, layer) in enumerate(zip(tower.layers, tower.choices, strict=True)):
            # The other tower's last layer is the cheapest, and what it is does not matter here.
            chosen = [layer, towers[1].choices[-1]] if index == 0 else [towers[0].choices[-1], layer]
            method = MultiModalInfoBottleneck(
                encoder, chosen, statistics=[encoder.statistics_of(one) or "pair" for one in chosen]
            )
            found = _figures(method, kinds, index)
            share = tower.share[place].double()
            last = torch.tensor(found[FIGURES[tower.modality][-1]], dtype=torch.float64)
            rows.append(
                Row(
                    tower.modality,
                    name,
                    estimate(share.numpy()),
                    {figure: estimate(values) for figure, values in found.items()},
                    float(spearman(share[None], last[None])[0]),
                    layer == defaults[index],
                )
            )
    return rows, towers


def table(rows: Sequence[Row]) -> str:
    r"""Rows as Markdown, one table per modality.

    Args:

        rows (sequence of Row): From :func:`measure`.

    Returns:
        str: means and 95 % bootstrap intervals; the recommended layer is marked by a star.
    """
    lines = []
    for modality, names in FIGURES.items():
        of_modality = [row for row in rows if row.modality == modality]
        if not of_modality:
            continue
        heads = ["layer", "share that goes round", *names, "correlation of share and last figure, over probes"]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in of_modality:
            name = f"`{row.layer}`" + (" *" if row.is_default else "")
            correlation = f"{row.correlation:+.2f}" if math.isfinite(row.correlation) else "–"
            cells = [name, str(row.share), *(str(row.figures[figure]) for figure in names), correlation]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


class _Prepared:
    """Stands for a method where only its pairs are wanted."""

    def __init__(self, encoder: DualEncoder) -> None:
        self.forward_func = encoder


def _figures(method: Any, kinds: tuple[Sequence[Any], Sequence[Any]], index: int) -> dict[str, list[float]]:
    """One modality's figures, block by block, so that memory does not grow with the number of probes."""
    found: dict[str, list[float]] = {}
    for start in range(0, len(kinds[0]), BLOCK):
        pictures, captions = (kind[start : start + BLOCK] for kind in kinds)
        block = Block(method, pictures, captions)
        for name, values in (words_on_truth if index else pictures_on_truth)(block).items():
            found.setdefault(name, []).extend(values)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    from captum_m2ib.encoders.dual_encoder import DualEncoder
    from captum_m2ib.scenes import CHECKPOINT

    parser = argparse.ArgumentParser(prog="python -m captum_m2ib.benchmark.scenes.bypass", description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="checkpoint trained on scenes (default: shipped model)")
    parser.add_argument("--probes", type=int, default=60, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which validation probes (default: %(default)s)")
    parser.add_argument("--figure", metavar="FILE", help="draw the shares there, as .png or .svg")
    given = parser.parse_args(arguments)
    if given.figure and not Path(given.figure).parent.is_dir():
        parser.error(f"--figure: the directory of {given.figure} does not exist; create it first")
    rows, towers = measure(DualEncoder.from_pretrained(given.model or CHECKPOINT), given.probes, given.seed)
    print(table(rows))
    if given.figure:
        plot_bypass(towers, THRESHOLD).savefig(given.figure)


if __name__ == "__main__":
    main()
