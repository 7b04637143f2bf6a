"""Methods compared on pairs of one's own: faithfulness, stability and cost of every map, and localisation where truth
is given.

Pairs come from a manifest as audits read it (:mod:`captum_m2ib.audit.manifest`). Where it has a column of boxes or of
masks, in pixels of the original pictures, they are cropped and resized as the model's processor does with the picture,
and maps are measured against them. A row that cannot be read or explained becomes a row that says why.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib.audit.decode import RowError, read_caption, read_picture, read_region
from captum_m2ib.audit.manifest import Manifest
from captum_m2ib.audit.rows import Piece, Row
from captum_m2ib.benchmark import faithfulness as faith
from captum_m2ib.benchmark.choice import short
from captum_m2ib.benchmark.methods import OURS, Method
from captum_m2ib.benchmark.parts import Model
from captum_m2ib.benchmark.store import Store, write_atomically
from captum_m2ib.benchmark.tables import Comparison, Figure, compare, csv_text, markdown, summary_csv
from captum_m2ib.benchmark.truth import grids_of, truth_of
from captum_m2ib.encoders.spelling import blank_token
from captum_m2ib.metrics import auroc, best_iou, iou, pearson, pointing_game, relevance_mass

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder
    from captum_m2ib.encoders.pairs import Pairs

BLOCK = 8
"""Pairs that are explained at once, and kept together."""

_GROUP = "pairs"
_LOCALISATION = {
    "image pointing": (1, "pointing"),
    "image mass": (1, "mass"),
    "image auroc": (1, "AUROC"),
    "image iou": (1, "IoU at half"),
    "image best iou": (1, "best IoU"),
    "image area": (0, "area of the truth"),
}
_HEADS = {
    "localisation, pictures": _LOCALISATION,
    "faithfulness, pictures": {name: (better, name[6:]) for name, better in faith.FIGURES.items() if name[0] == "i"},
    "faithfulness, words": {name: (better, name[5:]) for name, better in faith.FIGURES.items() if name[0] == "t"},
    "stability": {"image seeds": (1, "pictures: seeds"), "text seeds": (1, "words: seeds")},
    "cost": {"score": (0, "score"), "seconds per pair": (0, "s per pair")},
}

FIGURES: tuple[Figure, ...] = tuple(
    Figure(name, title, better, short, 2 if "confidence" in name else 3)
    for title, heads in _HEADS.items()
    for name, (better, short) in heads.items()
)
"""Every figure, in the order of the tables; those of ``captum-m2ib benchmark scenes`` have the same names."""


@dataclass(frozen=True)
class Plan:
    r"""What is measured.

    Attributes:

        steps (int): Steps of a picture's insertion and deletion curves.
        faithfulness (bool): Whether faithfulness is measured.
        stability (bool): Whether methods that draw are run with a second seed.
        limit (int or None): How many rows of the manifest, from the first on; None for all.
    """

    steps: int = 50
    faithfulness: bool = True
    stability: bool = True
    limit: int | None = None

    def __post_init__(self) -> None:
        for name, number in (("steps", self.steps), ("limit", self.limit)):
            if number is not None and number < 1:
                raise ValueError(f"--{name}: expected at least 1, got {number}.")


@dataclass
class Outcome:
    r"""One method on some rows: a value per row for each figure, and why rows have none.

    Attributes:

        figures (dict): Figure name to values, NaN where a row has none.
        errors (list): Per row None, or what is at fault and why, as two texts.
        ids (list[str]): The rows' ids.
    """

    figures: dict[str, list[float]] = field(default_factory=lambda: {figure.name: [] for figure in FIGURES})
    errors: list[list[str] | None] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def extend(self, other: Outcome) -> None:
        """Append the rows of another."""
        for name, values in other.figures.items():
            self.figures[name].extend(values)
        self.errors.extend(other.errors)
        self.ids.extend(other.ids)


@dataclass
class _Ready:
    """A row that was read."""

    place: int
    picture: Any
    caption: str
    region: Any


def measure(
    manifest: Manifest,
    encoder: DualEncoder,
    chosen: Sequence[Method],
    store: Store,
    plan: Plan,
    show_progress: bool = False,
) -> dict[str, Outcome]:
    r"""Measure methods on the pairs of a manifest, block by block; what the store holds is not measured again.

    Args:

        manifest (Manifest): The pairs.
        encoder (DualEncoder): The model, with a processor.
        chosen (sequence of Method): The methods.
        store (Store): Where results are kept, opened with :func:`run_settings`.
        plan (Plan): What is measured.
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        dict: the methods' names to their :class:`Outcome`, rows in the manifest's order.

    Raises:
        ValueError: if the manifest has no row.
    """
    pieces = list(_pieces(manifest, plan.limit))
    if not pieces:
        raise ValueError(f"FILE: {manifest.path} has no pairs; expected at least one row.")
    found = {method.name: Outcome() for method in chosen}
    with tqdm(total=len(pieces) * len(chosen), desc="Pairs", unit="block", disable=not show_progress) as bar:
        for piece in pieces:
            kept = {method.name: _kept(store, method, piece) for method in chosen}
            missing = [method for method in chosen if kept[method.name] is None]
            # Read once for all methods, and not at all where nothing is missing.
            ready, reading = _read(manifest, piece) if missing else ([], Outcome())
            for method in chosen:
                outcome = kept[method.name]
                if outcome is None:
                    outcome = _measured(method, encoder, ready, reading, plan)
                    _keep(store, method, piece, outcome)
                found[method.name].extend(outcome)
                bar.update()
    return found


def run_settings(manifest: Manifest, encoder: DualEncoder, plan: Plan) -> dict[str, Any]:
    """What all results of a run have in common, for its :class:`Store`."""
    return {
        "kind": "pairs",
        "manifest": manifest.fingerprint(),
        "columns": manifest.given,
        "model": Model("model", "", encoder).digest,
        "steps": plan.steps,
        "faithfulness": plan.faithfulness,
        "stability": plan.stability,
        "limit": plan.limit,
    }


def write_tables(folder: Path, found: Mapping[str, Outcome], floors: Sequence[str] = ()) -> Comparison:
    r"""Write ``rows.csv``, ``summary.csv`` and ``table.md``.

    Args:

        folder (Path): Where.
        found (mapping): From :func:`measure`.
        floors (sequence of str, optional): Methods that know nothing of the pair, and are no rivals. Default: ()

    Returns:
        Comparison: of ``m2ib``, where it is among the methods, with every other.
    """
    values = {
        name: {figure: [row] for figure, row in outcome.figures.items() if any(math.isfinite(value) for value in row)}
        for name, outcome in found.items()
    }
    rivals = [name for name in found if name not in floors and not name.startswith(OURS)]
    compared = compare(values, FIGURES, OURS, rivals)
    names = [figure.name for figure in FIGURES]
    lines = [
        [
            place,
            outcome.ids[place],
            name,
            *(outcome.errors[place] or ("", "")),
            *(_written(outcome.figures[figure][place]) for figure in names),
        ]
        for name, outcome in found.items()
        for place in range(len(outcome.ids))
    ]
    write_atomically(folder / "rows.csv", csv_text(("row", "id", "method", "error_kind", "error", *names), lines))
    write_atomically(folder / "summary.csv", summary_csv(compared))
    write_atomically(folder / "table.md", markdown(compared))
    return compared


def _written(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""


def _pieces(manifest: Manifest, limit: int | None) -> Iterator[Piece]:
    for piece in manifest.pieces(BLOCK):
        left = piece.rows if limit is None else min(piece.rows, limit - piece.first)
        if left < 1:
            return
        yield Piece(piece.index, piece.first, left, piece.file, piece.start)


def _part_settings(method: Method, piece: Piece) -> dict[str, Any]:
    return {"family": method.family.name, "settings": list(method.settings), "rows": piece.rows}


def _notes(store: Store, method: Method, piece: Piece) -> Path:
    return store.path("model", method.name, "notes", piece.index)


def _kept(store: Store, method: Method, piece: Piece) -> Outcome | None:
    figures = store.read("model", method.name, _GROUP, piece.index, _part_settings(method, piece))
    if figures is None or set(figures) != {figure.name for figure in FIGURES}:
        return None
    path = _notes(store, method, piece)
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return Outcome({name: list(row) for name, row in figures.items()}, told["errors"], told["ids"])
    except (OSError, ValueError, KeyError, TypeError):
        # Without its notes a part is measured again.
        return None


def _keep(store: Store, method: Method, piece: Piece, outcome: Outcome) -> None:
    # The notes first: where the figures are, the notes are.
    path = _notes(store, method, piece)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"ids": outcome.ids, "errors": outcome.errors}))
    store.write("model", method.name, _GROUP, piece.index, _part_settings(method, piece), outcome.figures)


def _read(manifest: Manifest, piece: Piece) -> tuple[list[_Ready], Outcome]:
    """The rows that can be read, and an outcome with the reasons of those that cannot."""
    ready, outcome = [], Outcome()
    for place, row in enumerate(manifest.rows(piece)):
        outcome.ids.append(row.id)
        outcome.errors.append(None)
        try:
            ready.append(_ready(place, row))
        except RowError as error:
            outcome.errors[-1] = [error.kind, short(error)]
    return ready, outcome


def _ready(place: int, row: Row) -> _Ready:
    if row.problem:
        raise RowError("manifest", row.problem)
    caption, picture = read_caption(row.caption), read_picture(row.image)
    return _Ready(place, picture, caption, read_region(picture.size, row.boxes, row.mask))


def _measured(method: Method, encoder: DualEncoder, ready: list[_Ready], reading: Outcome, plan: Plan) -> Outcome:
    rows = len(reading.ids)
    outcome = Outcome({figure.name: [math.nan] * rows for figure in FIGURES}, list(reading.errors), list(reading.ids))
    _measure_rows(method, encoder, ready, plan, outcome)
    return outcome


def _measure_rows(method: Method, encoder: DualEncoder, ready: list[_Ready], plan: Plan, outcome: Outcome) -> None:
    """All rows at once, or one by one where that fails, so that one row's fault is that row's."""
    if not ready:
        return
    try:
        found = _figures(method, encoder, ready, plan)
    except Exception as error:
        # Whatever one pair does to a method or a processor, the others go on.
        if len(ready) == 1:
            outcome.errors[ready[0].place] = ["model", short(error)]
        else:
            for row in ready:
                _measure_rows(method, encoder, [row], plan, outcome)
        return
    for name, values in found.items():
        for row, value in zip(ready, values, strict=True):
            outcome.figures[name][row.place] = float(value)


def _figures(method: Method, encoder: DualEncoder, ready: list[_Ready], plan: Plan) -> dict[str, Sequence[float]]:
    with warnings.catch_warnings():
        # Cut and unknown words concern the pair, not the method.
        warnings.filterwarnings("ignore", message="captions:")
        pairs = encoder.prepare([row.picture for row in ready], [row.caption for row in ready])
    additional = pairs.additional_forward_args
    explainer = method(encoder)
    start = time.perf_counter()
    maps = explainer.attribute(pairs.inputs, additional_forward_args=additional)
    seconds = (time.perf_counter() - start) / len(ready)
    image_map, token_map = (found.detach() for found in maps)
    with torch.no_grad():
        found: dict[str, Sequence[float]] = {"score": encoder(*pairs.inputs, *additional).tolist()}
    found["seconds per pair"] = [seconds] * len(ready)
    grids = grids_of(encoder, pairs, image_map)
    if plan.stability:
        found |= _stability(method, explainer, encoder, pairs, grids, token_map)
    if plan.faithfulness:
        found |= faith.faithfulness(
            encoder,
            pairs.inputs,
            (image_map if pairs.inputs[0].ndim == 4 else None, token_map),
            additional,
            maskable=faith.maskable_tokens(pairs),
            replacement=blank_token(encoder),
            steps=plan.steps,
        )
    return found | _localisation(encoder, ready, grids)


def _stability(
    method: Method, explainer: Any, encoder: DualEncoder, pairs: Pairs, grids: list[Tensor], tokens: Tensor
) -> dict[str, Sequence[float]]:
    """Pearson's correlation of maps made with two seeds; 1 for methods that draw nothing."""
    if not method.family.seeded:
        return {"image seeds": [1.0] * len(grids), "text seeds": [1.0] * len(grids)}
    again, others = explainer.attribute(pairs.inputs, additional_forward_args=pairs.additional_forward_args, seed=1)
    words = faith.maskable_tokens(pairs).to(tokens.device)
    return {
        "image seeds": [
            float(pearson(one[None], other[None]))
            for one, other in zip(grids, grids_of(encoder, pairs, again.detach()), strict=True)
        ],
        "text seeds": [
            float(pearson(one[counted][None], other[counted][None])) if bool(counted.any()) else math.nan
            for one, other, counted in zip(tokens, others.detach(), words, strict=True)
        ],
    }


def _localisation(encoder: DualEncoder, ready: list[_Ready], grids: list[Tensor]) -> dict[str, Sequence[float]]:
    found: dict[str, list[float]] = {name: [] for name in _LOCALISATION}
    for row, grid in zip(ready, grids, strict=True):
        values = [math.nan] * len(found)
        if row.region is not None:
            truth, bits = truth_of(encoder, row.region, row.caption, grid.shape), grid.double()[None]
            measured = (
                *(metric(bits, truth) for metric in (pointing_game, relevance_mass, auroc, iou)),
                best_iou(bits, truth).iou,
                truth.double().mean()[None],
            )
            values = [float(value) for value in measured]
        for name, value in zip(found, values, strict=True):
            found[name].append(value)
    return dict(found)
