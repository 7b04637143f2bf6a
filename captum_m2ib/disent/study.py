r"""InfoDisent beside a linear probe and EPIC on a user's photographs: fit with several seeds, measure, keep, go on.

Every seed fits, on the same cached features, the heads in :data:`HEADS`. A study is a folder::

    study.json               what was asked for, the classes, the split, and what was wrong with the data
    features/                the cached features
    heads/NAME-SEED.safetensors
    figures/NAME-SEED.json   what was measured of each

EPIC explains the linear probe, whose function it keeps.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from captum_m2ib.disent._checks import check_count, check_number
from captum_m2ib.disent.cache import Cached, cached_features
from captum_m2ib.disent.epic import EPIC
from captum_m2ib.disent.explanations import contributions
from captum_m2ib.disent.features import FeatureReader, FeatureSet
from captum_m2ib.disent.model import ConceptModel, InfoDisent
from captum_m2ib.disent.named import LIBRARIES, NamedBackbone, load_backbone
from captum_m2ib.disent.photographs import PhotographSet, Problem, read_photographs
from captum_m2ib.disent.prototypes import Prototypes, find_prototypes
from captum_m2ib.encoders.naming import is_function

_POOLED = {"pooling": "mean"}
HEADS: dict[str, dict[str, Any]] = {
    "linear probe": {"transform": "none", "weight": "signed", "bias": True, **_POOLED},
    "infodisent": {},
    "epic": {},
    "no bottleneck": _POOLED,
    "no transform": {"transform": "none"},
}
"""Each head with its options of InfoDisent; the last two leave out one part of it."""

_MEASURED_AT_ONCE = 64
_PER_HALF = 5
_SHARE = 0.9
# Student's t at 0.975, by degrees of freedom from 1 on.
_T = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
_T += [2.120, 2.110, 2.101, 2.093]


@dataclass(frozen=True)
class StudySettings:
    r"""What a study is asked for.

    Args:

        data (str): See :func:`read_photographs`.
        backbone (str): See :func:`load_backbone`.
        layer (str): Dotted name of the last layer before the backbone pools its positions; ``NAME:1`` for the second
            call of a module that is called more than once.
        weights (str, optional): See :func:`load_backbone`. Default: None
        options (mapping, optional): See :func:`load_backbone`. Default: {}
        side (int, optional): Of the pictures in pixels. Default: None (the backbone's)
        test_share (float, optional): See :func:`read_photographs`. Default: 0.3
        split_seed (int, optional): Of the choice of test pictures. Default: 0
        seeds (int, optional): Fits of each head. Default: 3
        epochs (int, optional): Most epochs of InfoDisent's heads and the probe. Default: 30
        epic_epochs (int, optional): Epochs of EPIC. Default: 20
        batch_size (int, optional): Examples per step of InfoDisent's heads. Default: 64
        lr (float, optional): See :class:`FitSettings`. Default: 1e-2
        transform_lr (float, optional): See :class:`FitSettings`. Default: 5e-3

    Raises:
        ValueError: if a number is out of range.
    """

    data: str
    backbone: str
    layer: str
    weights: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    side: int | None = None
    test_share: float = 0.3
    split_seed: int = 0
    seeds: int = 3
    epochs: int = 30
    epic_epochs: int = 20
    batch_size: int = 64
    lr: float = 1e-2
    transform_lr: float = 5e-3

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "epic_epochs", "batch_size"):
            check_count(f"--{name.replace('_', '-')}", getattr(self, name))
        check_count("--split-seed", self.split_seed, 0)
        if self.side is not None:
            check_count("--side", self.side)
        check_number("--test-share", self.test_share, high=1.0, above=True)
        check_number("--lr", self.lr, above=True)
        check_number("--transform-lr", self.transform_lr, above=True)
        if self.seeds > len(_T) + 1:
            raise ValueError(f"--seeds: expected at most {len(_T) + 1}, got {self.seeds}.")

    @property
    def place(self) -> str | tuple[str, int]:
        """The layer as :class:`FeatureReader` takes it."""
        name, separator, call = self.layer.rpartition(":")
        return (name, int(call)) if separator and call.isdigit() else self.layer


class Study:
    r"""The folder of a study, with the backbone and the photographs it is about.

    Args:

        folder (str or PathLike): The folder.
        settings (StudySettings): What it is asked for.

    Raises:
        ValueError: if the data or the backbone cannot be used.
    """

    def __init__(self, folder: str | os.PathLike[str], settings: StudySettings) -> None:
        self.folder, self.settings = Path(folder), settings
        self.photographs: PhotographSet = read_photographs(settings.data, settings.test_share, settings.split_seed)
        self.backbone: NamedBackbone = load_backbone(
            settings.backbone, weights=settings.weights, options=settings.options, side=settings.side
        )
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

    def figures(self) -> dict[str, list[dict[str, float]]]:
        r"""What was measured.

        Returns:
            dict: name of each head to the figures of each seed.

        Raises:
            ValueError: if nothing was.
        """
        found: dict[str, list[dict[str, float]]] = {}
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

    def _own_accuracy(self) -> float | None:
        """Of the backbone's own outputs, where it has one per class."""
        logits = self.cached.logits
        if logits is None or logits.shape[1] != len(self.photographs.classes):
            return None
        _, test, _ = self.cached.split(self.photographs)
        assert self.test.labels is not None
        return _accuracy(logits[test], self.test.labels)

    def _fit_one(self, name: str, seed: int, show_progress: bool) -> dict[str, float]:
        started, settings = time.monotonic(), self.settings
        path = self._head_path(name, seed)
        partial = path.with_suffix(".training.safetensors")
        model: ConceptModel[Any]
        if name == "epic":
            model = epic = self._epic(seed)
            epic.fit(
                self.train, epochs=settings.epic_epochs, checkpoint=partial, seed=seed, show_progress=show_progress
            )
            epic.save(path)
        else:
            options = HEADS[name]
            model = one = InfoDisent(
                self.backbone.module,
                settings.place,
                len(self.photographs.classes),
                class_names=self.photographs.classes,
                seed=seed,
                **options,
            )
            # A mean does not ask where; of means alone, heads that pool by it learn the same in a fraction of the time.
            learnt = _averaged(self.train) if options.get("pooling") == "mean" else self.train
            one.fit(
                learnt,
                epochs=settings.epochs,
                batch_size=settings.batch_size,
                lr=settings.lr,
                transform_lr=settings.transform_lr,
                seed=seed,
                checkpoint=partial,
                show_progress=show_progress,
            )
            one.save(path)
        seconds = time.monotonic() - started
        found = measure(model, self.test) | {"purity": find_prototypes(model, self.train, _PER_HALF).mean_purity()}
        if name == "epic":
            probe = self.model("linear probe", seed).predict(self.test)
            found["lossless"] = float((model.predict(self.test) - probe).abs().max() / probe.abs().max())
        partial.unlink(missing_ok=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return {**found, "seconds": seconds, "peak_gib": peak}

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
        return self.folder / "heads" / f"{name.replace(' ', '-')}-{seed}.safetensors"

    def _figures_path(self, name: str, seed: int) -> Path:
        return self.folder / "figures" / f"{name.replace(' ', '-')}-{seed}.json"

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


class Grid(nn.Module):
    r"""A backbone up to a layer, as a module of its own.

    Args:

        reader (FeatureReader): Of the backbone, at the layer.
    """

    reader: FeatureReader

    def __init__(self, reader: FeatureReader) -> None:
        super().__init__()
        self.trunk = reader.backbone
        self.__dict__["reader"] = reader

    def forward(self, images: Tensor) -> Tensor:
        """Features, (N, D, h, w)."""
        features: Tensor = self.reader.read(images)[0]
        return features


class Probed(nn.Module):
    r"""A frozen backbone with a linear layer on the mean of a layer's positions.

    Args:

        reader (FeatureReader): Of the backbone, at the layer.
        linear (nn.Linear): From channels to classes.
    """

    def __init__(self, reader: FeatureReader, linear: nn.Linear) -> None:
        super().__init__()
        self.grid, self.linear = Grid(reader), linear

    def forward(self, images: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        logits: Tensor = self.linear(self.grid(images).mean((2, 3)))
        return logits


def measure(model: ConceptModel[Any], features: FeatureSet) -> dict[str, float]:
    r"""What a head is worth on test pictures.

    Args:

        model (ConceptModel): Fitted.
        features (FeatureSet): Of test pictures, with labels.

    Returns:
        dict: ``top1``, in [0, 1]; ``halves``: how many halves of channels hold 90 % of the absolute contributions to
        the predicted class, on average; ``residual``: the largest difference between a logit and the sum of its
        contributions, relative to the largest logit.
    """
    assert features.labels is not None
    right, halves, residual, largest = 0.0, 0.0, 0.0, 0.0
    place = model.head.scale.device
    for part, labels in zip(features.batches(_MEASURED_AT_ONCE), features.labels.split(_MEASURED_AT_ONCE), strict=True):
        found = contributions(model.head, part.to(place))
        logits = found.logits.gather(1, found.target[:, None]).squeeze(1)
        sums = (found.positive + found.negative).sum(1) + found.bias
        right += float((found.target.cpu() == labels).sum())
        halves += float(found.halves_holding(_SHARE).sum())
        residual = max(residual, float((sums - logits).abs().max()))
        largest = max(largest, float(logits.abs().max()))
    return {"top1": right / len(features), "halves": halves / len(features), "residual": residual / max(largest, 1e-12)}


def interval(values: Sequence[float]) -> tuple[float, float]:
    r"""Mean over seeds and half of its 95 % interval by Student's t.

    Args:

        values (sequence of float): One per seed.

    Returns:
        tuple[float, float]: mean and half width, NaN for one value.
    """
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, _T[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def _rows(features: FeatureSet, rows: Tensor) -> FeatureSet:
    """Some rows; without a copy where they follow each other."""
    first, last = int(rows[0]), int(rows[-1])
    return features.subset(slice(first, last + 1) if last - first + 1 == len(rows) else rows)  # type: ignore[arg-type]


def _averaged(features: FeatureSet) -> FeatureSet:
    return FeatureSet(features.features.mean((2, 3), keepdim=True), features.labels, features.ids, features.size)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


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
