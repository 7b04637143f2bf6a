"""What is measured on photographs, group by group, for any method: pictures' maps against masks and mosaics' cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from time import perf_counter
from typing import TYPE_CHECKING, Any

from torch import Tensor

from captum_m2ib.benchmark import faithfulness as faith
from captum_m2ib.benchmark.choice import short
from captum_m2ib.benchmark.parts import Found
from captum_m2ib.benchmark.photos.probes import Probe, Shown
from captum_m2ib.benchmark.tables import Figure
from captum_m2ib.benchmark.truth import grids_of, lists_of, on_truth, truth_of

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder
    from captum_m2ib.encoders.pairs import Pairs

BLOCK = 4
"""Probes whose maps are made at once: ten draws each of a convolutional tower take a gigabyte or so per pair."""

_ON_TRUTH = {
    "pointing": (1, "pointing"),
    "mass": (1, "mass"),
    "auroc": (1, "AUROC"),
    "pointing, other caption": (1, "pointing, other"),
    "mass moved": (1, "mass moved"),
    "area": (0, "area of the truth"),
}
_HEADS = {
    "localisation, photographs": {f"image {name}": told for name, told in _ON_TRUTH.items()},
    "localisation, mosaics": {f"mosaic {name}": told for name, told in _ON_TRUTH.items()},
    "faithfulness, photographs": {name: (better, name[6:]) for name, better in faith.FIGURES.items() if name[0] == "i"},
    "cost": {"seconds per pair": (0, "s per pair")},
}

FIGURES: tuple[Figure, ...] = tuple(
    Figure(name, title, better, short, 2 if "confidence" in name else 3)
    for title, heads in _HEADS.items()
    for name, (better, short) in heads.items()
)
"""Every figure, in the order of the tables; those of ``captum-m2ib benchmark scenes`` have the same names."""


class MethodError(ValueError):
    """Why a method makes no maps."""


@dataclass(frozen=True)
class Block:
    r"""Some probes and one method's maps of them, each made when it is first asked for.

    Attributes:

        explainer (Any): A method on an encoder with a processor: ``attribute`` and ``forward_func``.
        probes (sequence of Probe): The probes.
        steps (int): Steps of insertion and deletion curves.
    """

    explainer: Any
    probes: Sequence[Probe]
    steps: int = 50

    @property
    def encoder(self) -> DualEncoder:
        """The encoder that is explained."""
        found: DualEncoder = self.explainer.forward_func
        return found

    @cached_property
    def shown(self) -> list[Shown]:
        """The probes' pictures."""
        return [probe.show() for probe in self.probes]

    @cached_property
    def right(self) -> Pairs:
        """Pictures with their captions."""
        return self.encoder.prepare([one.picture for one in self.shown], [one.caption for one in self.shown])

    @cached_property
    def others(self) -> list[int]:
        """Which probes have another caption."""
        return [place for place, one in enumerate(self.shown) if one.other_caption is not None]

    @cached_property
    def right_maps(self) -> tuple[Tensor, float]:
        """Maps of the pictures for their captions, and how many seconds one took."""
        start = perf_counter()
        found = self._maps(self.right)
        return found, (perf_counter() - start) / len(self.probes)

    @cached_property
    def right_grids(self) -> list[Tensor]:
        """The same, (height, width) each."""
        return grids_of(self.encoder, self.right, self.right_maps[0])

    @cached_property
    def other_grids(self) -> dict[int, Tensor]:
        """Per probe with another caption, the picture's map for it."""
        if not self.others:
            return {}
        shown = [self.shown[place] for place in self.others]
        pairs = self.encoder.prepare([one.picture for one in shown], [str(one.other_caption) for one in shown])
        return dict(zip(self.others, grids_of(self.encoder, pairs, self._maps(pairs)), strict=True))

    def _maps(self, pairs: Pairs) -> Tensor:
        pixels, ids = pairs.inputs
        additional = (ids, *pairs.additional_forward_args)
        try:
            found: Tensor = self.explainer.attribute(pixels, additional_forward_args=additional)
        except (ValueError, TypeError, RuntimeError) as error:
            raise MethodError(short(error)) from error
        return found.detach()


def localisation(block: Block, kind: str = "image") -> Found:
    r"""Do maps fall on the truth, and follow another caption for the same picture?

    Args:

        block (Block): The probes.
        kind (str, optional): What the figures' names begin with. Default: "image"

    Returns:
        dict: figure to a value per probe; of those about another caption, NaN where a probe has none.
    """
    found: Found = {f"{kind} {name}": [] for name in _ON_TRUTH}
    for place, (one, grid) in enumerate(zip(block.shown, block.right_grids, strict=True)):
        maps, truth = grid.double()[None], truth_of(block.encoder, one.region, one.caption, grid.shape)
        values = {name.removeprefix("image "): row[0] for name, row in lists_of(on_truth(maps, truth)).items()}
        values |= {"pointing, other caption": math.nan, "mass moved": math.nan}
        values["area"] = float(truth.double().mean())
        if place in block.other_grids:
            values |= _moved(block, one, maps, block.other_grids[place].double()[None])
        for name in _ON_TRUTH:
            found[f"{kind} {name}"].append(values[name])
    return found


def photographs(block: Block) -> Found:
    """:func:`localisation` on photographs, and what a map costs."""
    found = localisation(block)
    return {**found, "seconds per pair": [block.right_maps[1]] * len(block.probes)}


def in_mosaics(block: Block) -> Found:
    """:func:`localisation` on mosaics."""
    return localisation(block, "mosaic")


def faithfulness(block: Block) -> Found:
    """Confidence, insertion and deletion; nothing for packed pictures, which have no pixels to take out."""
    if block.right.inputs[0].ndim != 4:
        return {}
    return faith.faithfulness(
        block.encoder,
        block.right.inputs,
        (block.right_maps[0], None),
        block.right.additional_forward_args,
        steps=block.steps,
    )


GROUPS: dict[str, Callable[[Block], Found]] = {
    "photographs": photographs,
    "faithfulness": faithfulness,
    "mosaics": in_mosaics,
}
"""What is measured on blocks of probes, by name; mosaics have blocks of their own."""


def _moved(block: Block, one: Shown, right: Tensor, other: Tensor) -> dict[str, float]:
    """How a map follows the other caption, (1, height, width)."""
    truth = truth_of(block.encoder, one.other_region, str(one.other_caption), right.shape[1:])
    before, after = lists_of(on_truth(right, truth)), lists_of(on_truth(other, truth))
    return {
        "pointing, other caption": after["image pointing"][0],
        "mass moved": after["image mass"][0] - before["image mass"][0],
    }
