"""What each of the defaults is worth: one changed at a time, on validation scenes.

``python -m captum_m2ib.benchmark.scenes.ablation`` prints, for pictures and for captions, the default and every
variant with its figures, and marks where the paired difference from the default leaves out zero.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from captum_m2ib.attr import MultiModalInfoBottleneck
from captum_m2ib.benchmark.compare import Difference, estimate, paired
from captum_m2ib.benchmark.scenes.measures import (
    BLOCK,
    Block,
    draw_probes,
    pictures_on_truth,
    stability_of_pictures,
    stability_of_words,
    words_on_truth,
)
from captum_m2ib.benchmark.scenes.remedies import AgainstTheBatch, BetaOfEachPair, ClosedPrefix, LateLayers
from captum_m2ib.benchmark.scenes.run import Plan
from captum_m2ib.metrics import Summary
from captum_m2ib.scenes.grounds import GROUNDS, TEXTURED

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder

FIGURES = (
    ("image pointing", "image mass", "image auroc", "image seeds"),
    ("text auroc", "text top-1", "text auroc, all words", "text seeds"),
)
"""What is measured of pictures' and of captions' maps."""


@dataclass(frozen=True)
class Variant:
    r"""The default with something changed.

    Attributes:

        name (str): What is changed.
        modality (int): 0 for pictures, 1 for captions.
        layer (str or None): The layer in the place of the default's, by its dotted name.
        statistics (Any): The prior at that layer; "known" for what the encoder knows.
        settings (mapping): Arguments of ``attribute``.
        published (bool): The paper's layers, prior and descent.
        method (Callable or None): Makes, of an encoder, a method in the place of the default's.
    """

    name: str
    modality: int
    layer: str | None = None
    statistics: Any = "known"
    settings: Mapping[str, Any] = field(default_factory=dict)
    published: bool = False
    method: Callable[[DualEncoder], Any] | None = None


_PAPER: dict[str, Any] = {"beta": 0.25, "variance": 1.0, "lr": 1.0, "initial_gate": 0.9933, "antithetic": False}
_PAPER |= {"n_steps": 10, "n_samples": 10, "noiseless": 0.0}
_COURSES: dict[str, dict[str, Any]] = {
    "all draws are noise": {"noiseless": 0.0},
    "all but one draw's share without noise": {"noiseless": 0.9},
    "8 steps of 9 draws": {"n_steps": 8, "n_samples": 9},
    "10 steps of 10 draws, all noise": {"n_steps": 10, "n_samples": 10, "noiseless": 0.0},
    "half as many steps, twice as long": {"n_steps": 2, "lr": 2.0},
}
_COURSES_OF_WORDS: dict[str, dict[str, Any]] = {
    "4 steps of 3 draws, .8 without noise": {"n_steps": 4, "n_samples": 3, "noiseless": 0.8},
    "4 steps of 3 draws, all noise": {"n_steps": 4, "n_samples": 3},
    "8 steps of 9 draws": {"n_steps": 8, "n_samples": 9},
    "10 steps of 10 draws": {"n_steps": 10, "n_samples": 10},
}
_FIRST = ("vision_model.encoder.layers.0", "text_model.encoder.layers.0")

VARIANTS = (
    Variant("default", 0),
    Variant("gates after the first block", 0, layer=_FIRST[0]),
    Variant("gates after the embeddings", 0, layer="vision_model.embeddings"),
    Variant("each pixel's gate for itself", 0, settings={"smoothing": 0.0}),
    Variant("smoothed over half as far", 0, settings={"smoothing": 0.05}),
    Variant("smoothed over twice as far", 0, settings={"smoothing": 0.2}),
    Variant("smoothed over whatever colours", 0, settings={"smoothing_colour": None}),
    Variant("smoothed over half as many colours", 0, settings={"smoothing_colour": 0.5}),
    Variant("smoothed over twice as many colours", 0, settings={"smoothing_colour": 2.0}),
    Variant("prior N(0, 0.25)", 0, statistics=None),
    Variant("noise of the picture's own variance", 0, settings={"variance": 1.0}),
    Variant("noise of a tenth of the variance", 0, settings={"variance": 0.1}),
    Variant("no antithetic noise", 0, settings={"antithetic": False}),
    Variant("gates start half open", 0, settings={"initial_gate": 0.5}),
    Variant("gates start open", 0, settings={"initial_gate": 0.9933}),
    *(Variant(name, 0, settings=settings) for name, settings in _COURSES.items()),
    Variant("half the rate", 0, settings={"lr": 0.625}),
    Variant("beta 0.3", 0, settings={"beta": 0.3}),
    Variant("beta 1.2", 0, settings={"beta": 1.2}),
    Variant("the paper's descent", 0, settings=_PAPER),
    Variant("beta of each pair, .9 of the score kept", 0, method=BetaOfEachPair),
    Variant("score beyond the other captions' in the batch", 0, method=AgainstTheBatch),
    Variant("gates at three quarters of the depth", 0, method=LateLayers),
    Variant("the same, class token closed", 0, method=ClosedPrefix),
    Variant("published", 0, published=True),
    Variant("default", 1),
    Variant("gates after the first block", 1, layer=_FIRST[1]),
    Variant(
        "prior N(0, 1)",
        1,
        statistics=None,
        settings={"beta": 3.0, "lr": 4 / 6, "initial_gate": 0.5, "n_steps": 6, "n_samples": 2},
    ),
    Variant("no antithetic noise", 1, settings={"antithetic": False}),
    Variant("gates start open", 1, settings={"initial_gate": 0.9933}),
    *(Variant(name, 1, settings=settings) for name, settings in _COURSES_OF_WORDS.items()),
    Variant("half the rate", 1, settings={"lr": 1 / 3}),
    Variant("beta 1", 1, settings={"beta": 1.0}),
    Variant("beta 8", 1, settings={"beta": 8.0}),
    Variant("the paper's descent", 1, settings=_PAPER),
    Variant("both modalities at once", 1, settings={"joint": True}),
    Variant("gates at three quarters of the depth", 1, method=LateLayers),
    Variant("the same, start and end tokens closed", 1, method=ClosedPrefix),
    Variant("published", 1, published=True),
)
"""The default of each modality, and what is changed, one thing at a time."""


class Changed:
    r"""A variant in the form of an attribution method.

    Args:

        encoder (DualEncoder): The encoder, of the shipped architecture.
        variant (Variant): What is changed.
    """

    def __init__(self, encoder: DualEncoder, variant: Variant) -> None:
        self.forward_func, self.settings = encoder, variant.settings
        if variant.method is not None:
            self.method = variant.method(encoder)
            return
        if variant.published:
            self.method = MultiModalInfoBottleneck.published(encoder)
            return
        layers = list(encoder.recommended_layers())
        if variant.modality and not variant.settings.get("joint"):
            # Captions' maps do not depend on where the picture is gated, and late layers are the cheapest.
            layers[0] = encoder.published_layers()[0]
        priors: list[Any] = [encoder.statistics_of(layer) or "pair" for layer in layers]
        if variant.layer is not None:
            layers[variant.modality] = variant.layer
            priors[variant.modality] = encoder.statistics_of(variant.layer) or "pair"
        if variant.statistics is None:
            priors[variant.modality] = None
        self.method = MultiModalInfoBottleneck(encoder, layers, statistics=priors)

    def attribute(self, inputs: Any, additional_forward_args: Any = None, seed: int = 0) -> Any:
        r"""Maps of the inputs' shapes.

        Args:

            inputs (Tensor or tuple[Tensor, ...]): Pixels, or pixels and token ids.
            additional_forward_args (Any, optional): Further arguments of the encoder. Default: None
            seed (int, optional): Seed of the noise. Default: 0
        """
        return self.method.attribute(
            inputs, additional_forward_args=additional_forward_args, seed=seed, **self.settings
        )


@dataclass(frozen=True)
class Row:
    r"""One variant's figures.

    Attributes:

        variant (Variant): Which.
        figures (dict): Name to :class:`Summary`.
        differences (dict): Name to the paired :class:`Difference` from the default; empty for the default itself.
    """

    variant: Variant
    figures: dict[str, Summary]
    differences: dict[str, Difference]


def measure(
    encoders: Sequence[DualEncoder],
    probes: int = 60,
    seed: int = 0,
    variants: Sequence[Variant] = VARIANTS,
    show_progress: bool = False,
    ground: str = TEXTURED,
) -> list[Row]:
    r"""Measure variants on the same probes.

    Args:

        encoders (sequence of DualEncoder): Trained on scenes, with a processor; figures are averaged over them.
        probes (int, optional): Validation probes of each kind. Default: 60
        seed (int, optional): Which probes. Default: 0
        variants (sequence of Variant, optional): The default of a modality comes before its variants. Default: all
        show_progress (bool, optional): Show a progress bar. Default: False
        ground (str, optional): What the scenes' objects lie on. Default: "textured"

    Returns:
        list[Row]: in the order of the variants.
    """
    from tqdm.auto import tqdm

    plan = Plan(probes=probes, seed=seed, split="validation", ground=ground)
    kinds = [draw_probes(encoder, probes, plan.probes_seed, ground) for encoder in encoders]
    rows: list[Row] = []
    whole: dict[int, dict[str, list[list[float]]]] = {}
    for variant in tqdm(variants, desc="Ablation", unit="variant", disable=not show_progress):
        values: dict[str, list[list[float]]] = {name: [] for name in FIGURES[variant.modality]}
        for encoder, drawn in zip(encoders, kinds, strict=True):
            for name, found in _figures(Changed(encoder, variant), drawn, variant.modality).items():
                values[name].append(found)
        base = whole.setdefault(variant.modality, values)
        rows.append(
            Row(
                variant,
                {name: estimate(found) for name, found in values.items()},
                {} if base is values else {name: paired(values[name], base[name]) for name in values},
            )
        )
    return rows


def table(rows: Sequence[Row]) -> str:
    r"""Rows as Markdown, one table per modality.

    Args:

        rows (sequence of Row): From :func:`measure`.

    Returns:
        str: means with 95 % bootstrap intervals; ``+`` and ``-`` mark variants whose paired difference from the default
        leaves out zero.
    """
    lines = []
    for modality, names in enumerate(FIGURES):
        of_modality = [row for row in rows if row.variant.modality == modality]
        if not of_modality:
            continue
        heads = [("pictures", "captions")[modality], *(name.split(" ", 1)[1] for name in names)]
        lines += ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
        for row in of_modality:
            cells = [row.variant.name, *(f"{row.figures[name]}{_mark(row, name)}" for name in names)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _mark(row: Row, name: str) -> str:
    found = row.differences.get(name)
    if found is None or not found.is_clear:
        return ""
    return " +" if found.mean > 0 else " -"


def _figures(method: Changed, kinds: tuple[Sequence[Any], Sequence[Any]], modality: int) -> dict[str, list[float]]:
    """One modality's figures, block by block."""
    found: dict[str, list[float]] = {name: [] for name in FIGURES[modality]}
    for start in range(0, len(kinds[0]), BLOCK):
        pictures, captions = (kind[start : start + BLOCK] for kind in kinds)
        block = Block(method, pictures, captions, seeded=True)
        if modality:
            told = {**words_on_truth(block), **stability_of_words(block)}
        else:
            told = {**pictures_on_truth(block), **stability_of_pictures(block)}
        for name, values in found.items():
            values += told[name]
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    from captum_m2ib.encoders.dual_encoder import DualEncoder
    from captum_m2ib.scenes import CHECKPOINT

    parser = argparse.ArgumentParser(prog="python -m captum_m2ib.benchmark.scenes.ablation", description=__doc__)
    parser.add_argument(
        "--model", metavar="DIR", nargs="+", default=[CHECKPOINT], help="trained on scenes (default: shipped model)"
    )
    parser.add_argument("--probes", type=int, default=60, help="of each kind (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which validation probes (default: %(default)s)")
    parser.add_argument(
        "--ground", choices=GROUNDS, default=TEXTURED, help="what the objects lie on (default: %(default)s)"
    )
    given = parser.parse_args(arguments)
    encoders = [DualEncoder.from_pretrained(path) for path in given.model]
    print(table(measure(encoders, given.probes, given.seed, show_progress=True, ground=given.ground)))


if __name__ == "__main__":
    main()
