r"""InfoDisent beside a linear probe and EPIC on a user's photographs: fit with several seeds, measure, keep, go on.

Every seed fits, on the same cached features, the heads in :data:`HEADS`. A study is a folder::

    study.json               what was asked for, the classes, the split, and what was wrong with the data
    features/                the cached features
    backbone.safetensors     the backbone, where it was trained here
    chosen/NAME.json         which settings were chosen for each head, where that was asked for
    heads/NAME-SEED.safetensors
    figures/NAME-SEED.json   what was measured of each

EPIC explains the linear probe, whose function it keeps.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from captum_m2ib.disent.cache import Cached, cached_features
from captum_m2ib.disent.compared import CANDIDATES, HEADS, Probed, Rates, choose, fit_head_of
from captum_m2ib.disent.epic import EPIC
from captum_m2ib.disent.features import FeatureReader, FeatureSet
from captum_m2ib.disent.from_nothing import trained_backbone
from captum_m2ib.disent.model import ConceptModel, InfoDisent, hold_out
from captum_m2ib.disent.named import LIBRARIES, NamedBackbone, load_backbone
from captum_m2ib.disent.photographs import PhotographSet, Problem, read_photographs
from captum_m2ib.disent.prototypes import Prototypes, find_prototypes
from captum_m2ib.disent.scores import measure, peak_gib, top1
from captum_m2ib.disent.study_settings import StudySettings
from captum_m2ib.encoders.naming import is_function

_PER_HALF = 5


class Study:
    r"""The folder of a study, with the backbone and the photographs it is about.

    Args:

        folder (str or PathLike): The folder.
        settings (StudySettings): What it is asked for.
        show_progress (bool, optional): Of training a backbone. Default: False

    Raises:
        ValueError: if the data or the backbone cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: StudySettings, show_progress: bool = False) -> None:
        self.folder, self.settings = Path(folder), settings
        self.photographs: PhotographSet = read_photographs(settings.data, settings.test_share, settings.split_seed)
        self.backbone: NamedBackbone = self._backbone(show_progress)
        self.reader = FeatureReader(self.backbone.module, settings.place)
        self._features: tuple[Cached, FeatureSet, FeatureSet, tuple[Problem, ...]] | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str], backbone: str | None = None, data: str | None = None) -> Study:
        r"""A study that was begun before.

        Args:

            folder (str or PathLike): The folder.
            backbone (str, optional): The backbone's name again; a Python function must be named, as its code is not
                run because a folder says so. Default: None (as in the folder)
            data (str, optional): Where the photographs are now. Default: None (where they were)

        Returns:
            Study: the study.

        Raises:
            ValueError: if the folder holds none, or its backbone is another.
        """
        told = _read_told(Path(folder))
        known = told["settings"]["backbone"]
        if backbone is not None and backbone != known:
            raise ValueError(f"--backbone: {os.fspath(folder)} was fitted on {known}, got {backbone}.")
        if backbone is None and is_function(known) and known.partition(":")[0] not in LIBRARIES:
            raise ValueError(
                f"--backbone: {os.fspath(folder)} names the Python function {known}, whose code is not run because a "
                f"folder says so; give --backbone {known} to allow it."
            )
        moved = {} if data is None else {"data": data}
        return cls(folder, StudySettings(**{**told["settings"], **moved}))

    @property
    def train(self) -> FeatureSet:
        """Features of the training pictures."""
        return self._collected()[1]

    @property
    def test(self) -> FeatureSet:
        """Features of the test pictures."""
        return self._collected()[2]

    @property
    def cached(self) -> Cached:
        """The features of all pictures."""
        return self._collected()[0]

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Whatever is wrong with the data."""
        return self._collected()[3]

    def collect(self, show_progress: bool = False) -> None:
        r"""Read the features, from disk where they are there.

        Args:

            show_progress (bool, optional): Default: False

        Raises:
            ValueError: as of :func:`cached_features`, or if a class has no picture left.
        """
        if self._features is None:
            found = cached_features(
                self.photographs, self.backbone, self.reader, self.folder / "features", show_progress=show_progress
            )
            train, test, double = found.split(self.photographs)
            problems = (*self.photographs.problems, *found.problems, *double)
            self._features = (found, _rows(found.features, train), _rows(found.features, test), problems)

    def fit(self, show_progress: bool = False, tell: Callable[[str], None] | None = None) -> None:
        r"""Fit and measure what is not there yet.

        Args:

            show_progress (bool, optional): Default: False
            tell (Callable, optional): Is given a line after every head. Default: None

        Raises:
            ValueError: if the folder holds another study.
            FloatingPointError: as of :meth:`InfoDisent.fit`.
        """
        self._write_told({})
        self.collect(show_progress)
        self._write_told(
            {
                "classes": self.photographs.classes,
                "split": {"how": self.photographs.told, "train": len(self.train), "test": len(self.test)},
                "problems": self.problems,
                "grid": list(self.train.features.shape[1:]),
                "own": self._own_accuracy(),
            }
        )
        for seed in range(self.settings.seeds):
            for name in HEADS:
                if not self._figures_path(name, seed).is_file():
                    found = self._fit_one(name, seed, show_progress)
                    _write_json(self._figures_path(name, seed), found)
                    if tell is not None:
                        tell(f"{name}, seed {seed}: top-1 {100 * found['top1']:.1f} %")

    def model(self, name: str = "infodisent", seed: int = 0) -> ConceptModel[Any]:
        r"""A fitted model.

        Args:

            name (str, optional): One of :data:`HEADS`. Default: "infodisent"
            seed (int, optional): Default: 0

        Returns:
            ConceptModel: ready to explain.

        Raises:
            ValueError: if it is not fitted yet.
        """
        path = self._head_path(name, seed)
        if name not in HEADS or not path.is_file():
            raise ValueError(
                f"--head, --seed: {self.folder} holds no head {name!r} of seed {seed}; expected one of "
                f"{', '.join(HEADS)}, fitted with captum-m2ib disent fit."
            )
        if name == "epic":
            model = self._epic(seed)
            model.load_head(path)
            return model
        return InfoDisent.load(path, self.backbone.module)

    def figures(self) -> dict[str, list[dict[str, Any]]]:
        r"""What was measured.

        Returns:
            dict: name of each head to the figures of each seed.

        Raises:
            ValueError: if nothing was.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for name in HEADS:
            paths = [self._figures_path(name, seed) for seed in range(self.settings.seeds)]
            rows = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
            if rows:
                found[name] = rows
        if not found:
            raise ValueError(f"DIR: nothing is fitted in {self.folder} yet; run captum-m2ib disent fit.")
        return found

    def told(self) -> dict[str, Any]:
        r"""What ``study.json`` says.

        Returns:
            dict: the settings, the classes, the split and the problems.

        Raises:
            ValueError: if it is not there.
        """
        return _read_told(self.folder)

    def prototypes(self, model: ConceptModel[Any]) -> Prototypes:
        r"""Prototypes of a model among the training pictures.

        Args:

            model (ConceptModel): From :meth:`model`.

        Returns:
            Prototypes: positions are rows of ``train``; :meth:`crop` shows them.
        """
        return find_prototypes(model, self.train, _PER_HALF)

    @property
    def crops(self) -> Crops:
        """The parts of the training pictures that the backbone sees, by the rows of ``train``."""
        return Crops(self)

    def class_index(self, name: str) -> int:
        r"""The number of a class.

        Args:

            name (str): Its name.

        Returns:
            int: its label.

        Raises:
            ValueError: if there is no such class.
        """
        if name not in self.photographs.classes:
            near = get_close_matches(name, self.photographs.classes, 3, 0.0)
            raise ValueError(f"--class: there is no class {name!r}; the nearest names are {', '.join(near)}.")
        return self.photographs.classes.index(name)

    def _collected(self) -> tuple[Cached, FeatureSet, FeatureSet, tuple[Problem, ...]]:
        self.collect()
        assert self._features is not None
        return self._features

    def _backbone(self, show_progress: bool) -> NamedBackbone:
        settings = self.settings
        made: dict[str, Any] = {"options": settings.options, "side": settings.side}
        if not settings.train_backbone:
            return load_backbone(settings.backbone, weights=settings.weights, **made)
        found = load_backbone(settings.backbone, n_classes=len(self.photographs.classes), **made)
        # A layer that is none of its own is told before hours of training.
        FeatureReader(found.module, settings.place)
        path = self.folder / "backbone.safetensors"
        return trained_backbone(found, self.photographs, settings.train_backbone, path, show_progress)

    def _own_accuracy(self) -> float | None:
        """Of the backbone's own outputs, where it has one per class."""
        logits = self.cached.logits
        if logits is None or logits.shape[1] != len(self.photographs.classes):
            return None
        _, test, _ = self.cached.split(self.photographs)
        assert self.test.labels is not None
        return float((logits[test].argmax(1) == self.test.labels).double().mean())

    def _build(self, **options: Any) -> InfoDisent:
        names, given = self.photographs.classes, {"estimator": self.settings.estimator, **options}
        return InfoDisent(self.backbone.module, self.settings.place, len(names), class_names=names, **given)

    def _rates(self) -> Rates:
        settings = self.settings
        return Rates(settings.epochs, settings.batch_size, settings.lr, settings.transform_lr)

    def _chosen(self, name: str, show_progress: bool) -> str:
        """The candidate that a head is fitted with in every seed."""
        if not self.settings.choose:
            return "as given"
        path = self.folder / "chosen" / f"{_file_name(name)}.json"
        if not path.is_file():
            _write_json(path, choose(name, self._build, self.train, self._rates(), show_progress))
        chosen: str = json.loads(path.read_text(encoding="utf-8"))["chosen"]
        return chosen

    def _fit_one(self, name: str, seed: int, show_progress: bool) -> dict[str, Any]:
        path = self._head_path(name, seed)
        partial = path.with_suffix(".training.safetensors")
        chosen = "as published" if name == "epic" else self._chosen(name, show_progress)
        started = time.monotonic()
        model: ConceptModel[Any]
        if name == "epic":
            model = epic = self._epic(seed)
            epochs = self.settings.epic_epochs
            epic.fit(self.train, epochs=epochs, checkpoint=partial, seed=seed, show_progress=show_progress)
            epic.save(path)
        else:
            change = CANDIDATES[chosen]
            model, record = fit_head_of(
                name, change, self._build, self.train, self._rates(), seed, partial, show_progress
            )
            epochs = len(record.loss)
            model.save(path)
        seconds = time.monotonic() - started
        found: dict[str, Any] = measure(model, self.test)
        # Of positive halves: a channel after a ReLU that is not turned has no other.
        found["purity"] = self.prototypes(model).mean_purity(1)
        if name == "epic":
            probe = self.model("linear probe", seed).predict(self.test)
            found["lossless"] = float((model.predict(self.test) - probe).abs().max() / probe.abs().max())
        partial.unlink(missing_ok=True)
        learnt, held = hold_out(self.train, self._rates().validation_share, seed)
        told: dict[str, Any] = {"train": top1(model, learnt), "held_back": None if held is None else top1(model, held)}
        told |= {"epochs": epochs, "chosen": chosen}
        return {**found, **told, "seconds": seconds, "peak_gib": peak_gib()}

    def _epic(self, seed: int) -> EPIC:
        probe = self.model("linear probe", seed).head
        linear = nn.Linear(probe.channels, probe.n_classes)
        with torch.no_grad():
            linear.weight.copy_(probe.class_weight / probe.scale)
            linear.bias.copy_(probe.class_bias)
        return EPIC(
            Probed(self.reader, linear).eval(),
            "grid",
            "linear",
            class_names=self.photographs.classes,
            transform="cayley",
        )

    def _head_path(self, name: str, seed: int) -> Path:
        return self.folder / "heads" / f"{_file_name(name)}-{seed}.safetensors"

    def _figures_path(self, name: str, seed: int) -> Path:
        return self.folder / "figures" / f"{_file_name(name)}-{seed}.json"

    def _write_told(self, found: Mapping[str, Any]) -> None:
        path = self.folder / "study.json"
        asked = json.loads(json.dumps(asdict(self.settings)))
        key = {"backbone": self.backbone.digest(), "photographs": self.photographs.digest()}
        if path.is_file():
            told = _read_told(self.folder)
            # More seeds go on from what is there, and the pictures' digest tells whether they are the same elsewhere;
            # everything else would be another study.
            now, before = ({**one, "seeds": 0, "data": ""} for one in (asked, told["settings"]))
            changed = [name for name in now if now[name] != before.get(name)]
            changed += [name for name in key if key[name] != told["key"].get(name)]
            if changed:
                raise ValueError(
                    f"--output: {self.folder} holds a study with another {', '.join(changed)}; give another folder, or "
                    "what it was begun with."
                )
            if not found:
                found = {name: value for name, value in told.items() if name not in ("settings", "key")}
        _write_json(path, {"settings": asked, "key": key, **found})


class Crops(Sequence[NDArray[np.uint8]]):
    r"""Training pictures as the backbone sees them, read when they are asked for.

    Args:

        study (Study): Whose.
    """

    def __init__(self, study: Study) -> None:
        self.study = study

    def __len__(self) -> int:
        return len(self.study.train)

    def __getitem__(self, row: Any) -> Any:
        place = int(self.study.cached.positions[row])
        return np.asarray(self.study.backbone.preparation.crop(self.study.photographs.picture(place)))


def _rows(features: FeatureSet, rows: Tensor) -> FeatureSet:
    """Some rows; without a copy where they follow each other."""
    first, last = int(rows[0]), int(rows[-1])
    return features.subset(slice(first, last + 1) if last - first + 1 == len(rows) else rows)  # type: ignore[arg-type]


def _file_name(name: str) -> str:
    return name.replace(" ", "-")


def _read_told(folder: Path) -> dict[str, Any]:
    path = folder / "study.json"
    try:
        told: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        told["settings"]["backbone"], told["key"]["backbone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"DIR: {folder} holds no study ({type(error).__name__}); expected a folder that captum-m2ib disent fit "
            "wrote."
        ) from error
    return told


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
