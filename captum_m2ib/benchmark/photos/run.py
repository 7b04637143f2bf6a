"""A run of the benchmark on photographs: methods x blocks of probes, resumable, and what it writes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from captum_m2ib.benchmark.figure_page import Example, explained
from captum_m2ib.benchmark.methods import Method
from captum_m2ib.benchmark.parts import Found, Model, Part, spans_of
from captum_m2ib.benchmark.photos.coco import SPLITS, Photos
from captum_m2ib.benchmark.photos.measures import BLOCK, GROUPS, Block, MethodError
from captum_m2ib.benchmark.photos.probes import Known, Mosaic, PhotoProbe, mosaics, photo_probes
from captum_m2ib.benchmark.store import Store, write_atomically
from captum_m2ib.benchmark.tables import csv_text
from captum_m2ib.benchmark.truth import truth_of
from captum_m2ib.encoders.dual_encoder import DualEncoder

Values = dict[str, dict[str, list[list[float]]]]

_EACH = 3
_GRID = (224, 224)


@dataclass(frozen=True)
class Plan:
    r"""What is measured.

    Attributes:

        split (str): ``"validation"`` or ``"test"``.
        rank (int): Among how many first names a category must be.
        limit (int or None): How many photographs of the split, from the first on; None for all.
        seed (int): Which mosaics.
        steps (int): Steps of insertion and deletion curves.
        faithfulness (bool): Whether faithfulness is measured.
    """

    split: str = "test"
    rank: int = 5
    limit: int | None = None
    seed: int = 0
    steps: int = 50
    faithfulness: bool = True

    def __post_init__(self) -> None:
        for name in ("rank", "limit", "steps"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"--{name}: expected at least 1, got {number}.")
        if self.seed < 0:
            raise ValueError(f"--seed: expected at least 0, got {self.seed}.")
        if self.split not in SPLITS:
            raise ValueError(f"--split: expected {' or '.join(SPLITS)}, got {self.split!r}.")


@dataclass(frozen=True)
class Probes:
    r"""What is asked.

    Attributes:

        named (tuple[Known, ...]): Every category of every photograph with its rank.
        photos (tuple[PhotoProbe, ...]): Photographs with masks.
        mosaics (tuple[Mosaic, ...]): Mosaics.
    """

    named: tuple[Known, ...]
    photos: tuple[PhotoProbe, ...]
    mosaics: tuple[Mosaic, ...]

    def __str__(self) -> str:
        pictures = len({one.photo.id for one in self.named})
        first = len({one.photo.id for one in self.named if one.rank == 1})
        return (
            f"{pictures} photographs hold {len(self.named)} categories; the model's first name is right in "
            f"{first / pictures:.0%}\nasked of {len(self.photos)} photographs with masks, {len(self.mosaics)} mosaics"
        )


def choose_probes(named: Sequence[Known], plan: Plan) -> Probes:
    r"""What is asked about photographs whose names were ranked.

    Args:

        named (sequence of Known): From :func:`captum_m2ib.benchmark.photos.probes.name_photos`.
        plan (Plan): Says up to which rank, and which mosaics.

    Returns:
        Probes: at least one.

    Raises:
        ValueError: if nothing can be asked.
    """
    known = [one for one in named if one.rank <= plan.rank]
    found = Probes(tuple(named), tuple(photo_probes(known)), tuple(mosaics(known, plan.seed)))
    if not found.photos and not found.mosaics:
        raise ValueError(
            f"--rank: of {len(named)} categories in photographs the model names {len(known)} among its first "
            f"{plan.rank}, and none of these has a mask of fitting size; expected a model that knows more, or a higher "
            "rank."
        )
    return found


def run_settings(photos: Photos, model: Model, plan: Plan) -> dict[str, Any]:
    """What all results of a run have in common, for its :class:`Store`."""
    return {"kind": "photos", "annotations": photos.digest, "model": model.digest, "block": BLOCK, **asdict(plan)}


def measure_all(
    model: Model, methods: Sequence[Method], probes: Probes, plan: Plan, store: Store, show_progress: bool = False
) -> Values:
    r"""Measure what the store does not hold yet.

    Args:

        model (Model): The model.
        methods (sequence of Method): The methods.
        probes (Probes): What is asked.
        plan (Plan): What is measured.
        store (Store): Where parts are kept.
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        dict: method to figure to one row with one value per probe. A method that does not work on the first block is
        told of on stderr and left out.

    Raises:
        ValueError: if no method works.
    """
    from tqdm.auto import tqdm

    kinds: list[tuple[Sequence[Any], tuple[str, ...]]] = [
        (probes.photos, ("photographs", "faithfulness") if plan.faithfulness else ("photographs",)),
        (probes.mosaics, ("mosaics",)),
    ]
    total = sum(len(spans_of(len(asked), BLOCK)) for asked, _ in kinds)
    values: Values = {}
    reasons = []
    with tqdm(total=total * len(methods), unit="block", disable=not show_progress) as bar:
        for method in methods:
            bar.set_description(method.name)
            found: Found = {}
            try:
                for asked, groups in kinds:
                    _measure(Part(store, model, method), found, asked, groups, plan, bar)
            except MethodError as error:
                # What a method lacks shows at once; whatever comes later is something else.
                if found:
                    raise
                bar.update(total)
                reasons.append(f"{method.name}: {error}")
                print(f"left out  {reasons[-1]}", file=sys.stderr)
                continue
            values[method.name] = {name: [row] for name, row in found.items() if not np.isnan(row).all()}
    if not values:
        raise ValueError(f"--method: none of them works on this model ({'; '.join(reasons)}).")
    return values


def examples_of(encoder: DualEncoder, methods: Sequence[Method], probes: Probes) -> list[Example]:
    r"""Explain some probes of each kind, spread over all of them, by every method.

    Args:

        encoder (DualEncoder): The encoder.
        methods (sequence of Method): The methods.
        probes (Probes): What was asked.

    Returns:
        list[Example]: up to three photographs and as many mosaics.
    """
    chosen: list[Any] = [*_some(probes.photos), *_some(probes.mosaics)]
    shown = [probe.show() for probe in chosen]
    pairs = encoder.prepare([one.picture for one in shown], [one.caption for one in shown])
    masks = [truth_of(encoder, one.region, one.caption, _GRID)[0].numpy() for one in shown]
    return explained(encoder, methods, pairs, pairs.pictures, masks)


def write_names(folder: Path, probes: Probes) -> None:
    r"""Write ``names.csv``: every category of every photograph, its rank, its area, and whether it is asked about.

    Args:

        folder (Path): Where.
        probes (Probes): What was asked.
    """
    asked = {(one.photo.id, one.name) for one in probes.photos}
    in_mosaic = {(one.photos[one.cell].id, one.name) for one in probes.mosaics}
    lines = [
        (
            one.photo.id,
            one.name,
            one.rank,
            "" if np.isnan(one.area) else f"{one.area:.4f}",
            int((one.photo.id, one.name) in asked),
            int((one.photo.id, one.name) in in_mosaic),
        )
        for one in probes.named
    ]
    heads = ("photo", "name", "rank", "area", "photograph", "mosaic")
    write_atomically(folder / "names.csv", csv_text(heads, lines))


def _measure(part: Part, found: Found, asked: Sequence[Any], groups: Sequence[str], plan: Plan, bar: Any) -> None:
    for number, span in enumerate(spans_of(len(asked), BLOCK)):
        block = Block(part.method(part.model.encoder), asked[span], plan.steps)
        told = {"probes": [probe.told() for probe in block.probes]}
        for group in groups:
            part.add(found, group, number, told, partial(GROUPS[group], block))
        bar.update()


def _some(asked: Sequence[Any]) -> list[Any]:
    places = np.linspace(0, len(asked) - 1, min(_EACH, len(asked))).round().astype(int)
    return [asked[place] for place in places]
