"""Is a map right, or is its user told? Pictures of scenes in twelve situations that a default may not have met.

``python -m captum_m2ib.benchmark.scenes.situations`` explains validation scenes on a textured, a white and a black
ground with the same model four times: with its score as it is, with a tenth of it (small cosines), with a hundred times
of it less an offset (logits), and in bfloat16. A map is right that is on the truth
(:mod:`captum_m2ib.benchmark.scenes.verdicts`); a user is told where the verdict is not ``holds``.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_m2ib.attr import MultiModalInfoBottleneck
from captum_m2ib.benchmark.compare import estimate
from captum_m2ib.benchmark.scenes.measures import BLOCK
from captum_m2ib.benchmark.scenes.run import Plan
from captum_m2ib.benchmark.scenes.verdicts import ON_TRUTH, on_truth
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.engine.check import verdicts
from captum_m2ib.engine.stakes import NothingToExplainWarning
from captum_m2ib.engine.verdict import VERDICTS
from captum_m2ib.metrics import Summary, auroc, pointing_game, relevance_mass
from captum_m2ib.scenes import ImageProbe, image_probes

GROUNDS = ("textured", "white", "black")
"""What the objects lie on."""

UNITS: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda score: score,
    "a tenth": lambda score: 0.1 * score,
    "a hundred times, less 20": lambda score: 100.0 * score - 20.0,
}
"""The score's unit and zero."""

LOW_PRECISION = "in bfloat16"

FIGURES = ("pointing", "mass", "AUROC", "right", "right or told")


@dataclass(frozen=True)
class Situation:
    r"""What became of the maps of one situation.

    Attributes:

        ground (str): One of :data:`GROUNDS`.
        score (str): A key of :data:`UNITS`, or :data:`LOW_PRECISION`.
        figures (dict): One of :data:`FIGURES` to its :class:`Summary`.
        verdicts (tuple[int, ...]): How many maps got each of :data:`captum_m2ib.engine.verdict.VERDICTS`.
    """

    ground: str
    score: str
    figures: dict[str, Summary]
    verdicts: tuple[int, ...]


def measure(encoder: DualEncoder, probes: int = 50, seed: int = 0) -> list[Situation]:
    r"""Explain the same pictures in every situation.

    Args:

        encoder (DualEncoder): The compact encoder, trained on scenes, with a processor.
        probes (int, optional): Validation probes of each ground. Default: 50
        seed (int, optional): Which probes. Default: 0

    Returns:
        list[Situation]: grounds outside, scores inside.
    """
    plan = Plan(probes=probes, seed=seed, split="validation")
    low = copy.deepcopy(encoder).to(torch.bfloat16)
    found = []
    for ground in GROUNDS:
        drawn = image_probes(probes, plan.probes_seed, ground=ground)
        for name, unit in UNITS.items():
            found.append(_situation(encoder, unit, drawn, ground, name))
        found.append(_situation(low, UNITS["as it is"], drawn, ground, LOW_PRECISION, torch.bfloat16))
    return found


def _situation(
    encoder: DualEncoder,
    unit: Callable[[Tensor], Tensor],
    probes: Sequence[ImageProbe],
    ground: str,
    name: str,
    dtype: torch.dtype = torch.float32,
) -> Situation:
    def score(*arguments: Any) -> Tensor:
        return unit(encoder(*arguments))

    method = MultiModalInfoBottleneck(score, [None], [encoder.layouts[0]])
    values: dict[str, list[float]] = {figure: [] for figure in FIGURES}
    told: list[str] = []
    for start in range(0, len(probes), BLOCK):
        part = probes[start : start + BLOCK]
        pairs = encoder.prepare([probe.image for probe in part], [probe.caption for probe in part])
        pixels, *others = *pairs.inputs, *pairs.additional_forward_args
        with warnings.catch_warnings():
            # The verdict says so.
            warnings.simplefilter("ignore", NothingToExplainWarning)
            bits: Any
            bits, record = method.attribute_with_record(
                pixels.to(dtype), additional_forward_args=tuple(others), check=True
            )
        check = record.modalities[0].check
        assert check is not None
        said = verdicts(check.margin, check.kept, check.is_idle)
        truth = torch.stack([torch.from_numpy(probe.mask) for probe in part])
        right = [place >= ON_TRUTH for place in on_truth(bits, part)]
        told += said
        values["pointing"] += pointing_game(bits, truth).tolist()
        # An empty map says nothing, and is as good as an even one.
        values["mass"] += relevance_mass(bits, truth).nan_to_num().tolist()
        values["AUROC"] += auroc(bits, truth).nan_to_num(0.5).tolist()
        values["right"] += [float(one) for one in right]
        values["right or told"] += [float(one or word != "holds") for one, word in zip(right, said, strict=True)]
    figures = {figure: estimate(column) for figure, column in values.items()}
    return Situation(ground, name, figures, tuple(told.count(verdict) for verdict in VERDICTS))


def table(found: Sequence[Situation]) -> str:
    r"""Situations as Markdown.

    Args:

        found (sequence of Situation): From :func:`measure`.

    Returns:
        str: means with 95 % bootstrap intervals, and counts of verdicts.
    """
    heads = ["ground", "score", *FIGURES, *VERDICTS]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for one in found:
        cells = [one.ground, one.score, *map(str, one.figures.values()), *map(str, one.verdicts)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    from captum_m2ib.scenes import CHECKPOINT

    parser = argparse.ArgumentParser(prog="python -m captum_m2ib.benchmark.scenes.situations", description=__doc__)
    parser.add_argument("--model", metavar="DIR", help="checkpoint trained on scenes (default: shipped model)")
    parser.add_argument("--probes", type=int, default=50, help="of each ground (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which validation probes (default: %(default)s)")
    given = parser.parse_args(arguments)
    print(table(measure(DualEncoder.from_pretrained(given.model or CHECKPOINT), given.probes, given.seed)))


if __name__ == "__main__":
    main()
