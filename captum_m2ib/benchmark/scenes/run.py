"""A run of the benchmark on scenes: models x methods x groups of figures, block by block, resumable.

What is measured stands in :mod:`captum_m2ib.benchmark.scenes.measures`; here it is asked for in turn, kept in a
:class:`captum_m2ib.benchmark.store.Store`, and settings are chosen on the validation split.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from captum_m2ib.benchmark.compare import estimate
from captum_m2ib.benchmark.methods import MODALITIES, Family, Method, Setting
from captum_m2ib.benchmark.parts import Found, Model, Part, spans_of, write_comparison
from captum_m2ib.benchmark.scenes import measures as scenes
from captum_m2ib.benchmark.scenes.cost import cost
from captum_m2ib.benchmark.scenes.measures import BLOCK, FIGURES, GROUPS, Block, draw_probes
from captum_m2ib.benchmark.store import Store, write_atomically
from captum_m2ib.benchmark.tables import Comparison, Values, csv_text
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.scenes import CHECKPOINT, GROUNDS, image_probes, token_probes
from captum_m2ib.scenes.grounds import TEXTURED

# No seed of the test split reaches the probes of the validation split.
_VALIDATION = 1_000_000_000

CRITERIA = {"image": ("image pointing", "image mass", "image auroc"), "text": ("text auroc", "text top-1")}
"""Figures whose sum chooses a setting on the validation split."""


@dataclass(frozen=True)
class Plan:
    r"""How much is measured, and on which probes.

    Attributes:

        probes (int): Image probes, and token probes, for localisation.
        faithfulness (int): How many of these for faithfulness.
        sanity (int): How many for the sanity checks.
        stability (int): How many for two seeds.
        robustness (int): How many for infidelity and sensitivity.
        repeats (int): Timed runs; 0 leaves out the cost.
        split (str): ``"test"`` or ``"validation"``.
        seed (int): Which probes of the split.
        statistics (bool): Whether a checkpoint's own statistics are used.
        ground (str): What the objects of the probes lie on, one of ``captum_m2ib.scenes.GROUNDS``.
    """

    probes: int = 500
    faithfulness: int = 100
    sanity: int = 20
    stability: int = 50
    robustness: int = 20
    repeats: int = 5
    split: str = "test"
    seed: int = 0
    statistics: bool = True
    ground: str = TEXTURED

    @classmethod
    def quick(cls, **given: Any) -> Plan:
        """About ten minutes for the default methods on two cores."""
        return cls(**{"probes": 100, "faithfulness": 25, "sanity": 10, "stability": 25, "robustness": 10, **given})

    def __post_init__(self) -> None:
        if self.probes < 1:
            raise ValueError(f"--probes: expected at least 1, got {self.probes}.")
        if not 0 <= self.seed < _VALIDATION:
            raise ValueError(f"--seed: expected a whole number of at least 0 and below {_VALIDATION}, got {self.seed}.")
        if self.ground not in GROUNDS:
            raise ValueError(f"--ground: expected one of {', '.join(GROUNDS)}, got {self.ground!r}.")
        if self.split not in ("test", "validation"):
            raise ValueError(f"--split: expected test or validation, got {self.split!r}.")

    @property
    def probes_seed(self) -> int:
        """The seed of the probes themselves."""
        return self.seed + (_VALIDATION if self.split == "validation" else 0)

    def counts(self) -> dict[str, int]:
        """Per group, how many probes it takes."""
        return {
            "localisation": self.probes,
            **{name: min(getattr(self, name), self.probes) for name in GROUPS if name != "localisation"},
        }


def run_settings(plan: Plan, purpose: str) -> dict[str, Any]:
    """What holds for all parts of a run, so that it can be resumed."""
    return {"purpose": purpose, "block": BLOCK, **asdict(plan)}


def load_models(paths: Sequence[str | os.PathLike[str]], load: Callable[[str], DualEncoder], plan: Plan) -> list[Model]:
    r"""Load checkpoints and name them after their folders.

    Args:

        paths (sequence): Directories.
        load (Callable): From a directory to an encoder with a processor.
        plan (Plan): Says whether their statistics are used.

    Returns:
        list[Model]: in the order given.
    """
    models: list[Model] = []
    for given in paths:
        path = os.fspath(given)
        encoder = load(path)
        if not plan.statistics:
            encoder.statistics.clear()
        folder = Path(path).resolve()
        name = "shipped" if folder == CHECKPOINT.resolve() else folder.name
        same = sum(model.name == name or model.name.startswith(f"{name}-") for model in models)
        models.append(Model(f"{name}-{same + 1}" if same else name, path, encoder))
    return models


def measure_all(
    models: Sequence[Model], methods: Sequence[Method], plan: Plan, store: Store, show_progress: bool = False
) -> dict[str, dict[str, list[list[float]]]]:
    r"""Measure what the store does not hold yet.

    Args:

        models (sequence of Model): The checkpoints.
        methods (sequence of Method): The methods.
        plan (Plan): How much.
        store (Store): Where parts are kept.
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        dict: method to figure to one row per model, one value per probe.
    """
    from tqdm.auto import tqdm

    values: dict[str, dict[str, list[list[float]]]] = {method.name: {} for method in methods}
    spans = spans_of(plan.probes, BLOCK)
    with tqdm(total=len(models) * len(methods) * len(spans), unit="block", disable=not show_progress) as bar:
        for model in models:
            probes = draw_probes(model.encoder, plan.probes, plan.probes_seed, plan.ground)
            for method in methods:
                bar.set_description(f"{model.name}, {method.name}")
                part = Part(store, model, method)
                found: Found = {}
                for number, span in enumerate(spans):
                    block = _block(model, method, probes, span)
                    for group, count in plan.counts().items():
                        taken = min(count, span.stop) - span.start
                        if taken > 0:
                            told = {"probes": [span.start, span.start + taken]}
                            part.add(found, group, number, told, partial(GROUPS[group], block.first(taken)))
                    bar.update()
                if plan.repeats:
                    run = partial(cost, method, model.encoder, model.path, plan.repeats)
                    part.add(found, "cost", 0, {"repeats": plan.repeats}, run)
                for name, row in found.items():
                    values[method.name].setdefault(name, []).append(row)
    return values


def tune(
    models: Sequence[Model],
    families: Sequence[Family],
    plan: Plan,
    store: Store,
    show_progress: bool = False,
) -> dict[str, dict[str, Setting]]:
    r"""Choose each family's best setting per modality, by :data:`CRITERIA` over models and validation probes.

    Args:

        models, plan, store, show_progress: As for :func:`measure_all`.
        families (sequence of Family): The families.

    Returns:
        dict: family to ``{"image": setting, "text": setting}``; the published setting is empty and wins ties.
    """
    from tqdm.auto import tqdm

    measures = (scenes.pictures_on_truth, scenes.words_on_truth)
    todo = [
        (family, modality, settings)
        for family in families
        for modality in range(len(MODALITIES))
        if len(settings := family.settings(models[0].encoder, modality)) > 1
    ]
    probes = {model.name: draw_probes(model.encoder, plan.probes, plan.probes_seed, plan.ground) for model in models}
    chosen: dict[str, dict[str, Setting]] = {}
    lines = []
    total = len(models) * sum(len(settings) for _, _, settings in todo)
    with tqdm(total=total, unit="setting", disable=not show_progress) as bar:
        for family, modality, settings in todo:
            kind = MODALITIES[modality]
            bar.set_description(f"{family.name}, {kind}")
            scores = []
            for index, setting in enumerate(settings):
                method = Method(f"{family.name}-{kind}-{index}", family, (setting, setting))
                rows = []
                for model in models:
                    part, found = Part(store, model, method), Found()
                    for number, span in enumerate(spans_of(plan.probes, BLOCK)):
                        run = partial(measures[modality], _block(model, method, probes[model.name], span))
                        part.add(found, "tuning", number, {"probes": [span.start, span.stop]}, run)
                    rows.append(np.sum([found[name] for name in CRITERIA[kind]], axis=0).tolist())
                    bar.update()
                scores.append(estimate(rows).mean)
                lines.append((family.name, kind, json.dumps(setting), scores[-1]))
            # A method that returns nothing on a setting has no score there; the published setting wins ties.
            best = settings[int(np.nanargmax(scores))]
            chosen.setdefault(family.name, {name: {} for name in MODALITIES})[kind] = best
    write_atomically(store.folder / "tuning.csv", csv_text(("family", "modality", "setting", "score"), lines))
    write_atomically(store.folder / "settings.json", json.dumps(chosen, indent=1) + "\n")
    return chosen


def write_tables(folder: Path, models: Sequence[Model], methods: Sequence[Method], values: Values) -> Comparison:
    r"""Write ``figures.csv``, ``summary.csv`` and ``table.md``.

    Args:

        folder (Path): Where.
        models, methods: What was measured.
        values (mapping): From :func:`measure_all`.

    Returns:
        Comparison: of ours with every other method.
    """
    return write_comparison(folder, [model.name for model in models], methods, values, FIGURES)


def write_probes(folder: Path, plan: Plan) -> None:
    r"""Write ``probes.csv``: what each probe of ``figures.csv`` asks, so that figures can be read by it.

    Args:

        folder (Path): Where.
        plan (Plan): Says which probes.
    """
    lines: list[tuple[object, ...]] = []
    for index, probe in enumerate(image_probes(plan.probes, plan.probes_seed, ground=plan.ground)):
        thing = probe.scene.objects[probe.target]
        bare = probe.image[~np.any(probe.scene.masks, axis=0)].mean()
        told = (probe.caption, probe.wrong_caption, thing.colour, thing.shape, f"{probe.mask.mean():.4f}")
        lines.append(("image", index, *told, f"{bare:.0f}"))
    for index, worded in enumerate(token_probes(plan.probes, plan.probes_seed, ground=plan.ground)):
        thing = worded.scene.objects[worded.target]
        lines.append(("text", index, worded.scene.caption, "", thing.colour, thing.shape, "", ""))
    heads = ("kind", "probe", "caption", "other caption", "colour", "shape", "area", "ground")
    write_atomically(folder / "probes.csv", csv_text(heads, lines))


def _block(model: Model, method: Method, probes: tuple[Sequence[Any], Sequence[Any]], span: slice) -> Block:
    pictures, captions = (kind[span] for kind in probes)
    return Block(method(model.encoder), pictures, captions, method, method.family.seeded)
