"""A dual encoder's zero-shot decisions on photographs: is it right, does the head follow it, do names of concepts hold?

Every picture is read once. Names are chosen on training pictures; whether they still follow on test pictures says what
they are worth, beside the best names of evidence that was shuffled over the pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib.disent._checks import check_choice, check_count
from captum_m2ib.disent.features import FeatureSet
from captum_m2ib.disent.named import named_place
from captum_m2ib.disent.photographs import TEST, TRAIN, PhotographSet
from captum_m2ib.disent.pooling import ESTIMATORS
from captum_m2ib.disent.scores import shown_interval
from captum_m2ib.disent.zero_shot import ZeroShotInfoDisent, caption_embeddings, closest, correlations
from captum_m2ib.encoders.dual_encoder import DualEncoder

_BATCH = 16
_TOP = 5


@dataclass(frozen=True)
class ZeroShotSettings:
    r"""What a study of zero-shot decisions is asked for.

    Args:

        layer (str, optional): Of the image tower. Default: None (see :class:`ZeroShotInfoDisent`)
        template (str, optional): Of the classes' captions, with ``{}`` for the name. Default: ``"a photo of a {}"``
        names (sequence of str, optional): Captions to name concepts by. Default: None (the classes')
        limit (int, optional): The first so many pictures per class and split. Default: None (all)
        seeds (int, optional): Fits. Default: 3
        epochs (int, optional): Most of a fit. Default: 100
        estimator (str, optional): See :class:`HeadOptions`. Default: ``"gumbel"``

    Raises:
        ValueError: if a setting is out of range.
    """

    layer: str | None = None
    template: str = "a photo of a {}"
    names: Sequence[str] | None = None
    limit: int | None = None
    seeds: int = 3
    epochs: int = 100
    estimator: str = "gumbel"

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "limit"):
            if getattr(self, name) is not None:
                check_count(f"--{name}", getattr(self, name))
        check_choice("--estimator", self.estimator, ESTIMATORS)
        if "{}" not in self.template:
            raise ValueError(f"--template: expected a caption with {{}} for the name, got {self.template!r}.")


def zero_shot_study(
    encoder: DualEncoder, photographs: PhotographSet, settings: ZeroShotSettings, show_progress: bool = False
) -> dict[str, Any]:
    r"""Learn a dual encoder's decisions on photographs, and try names of concepts.

    Args:

        encoder (DualEncoder): With a processor.
        photographs (PhotographSet): Classes are asked about by their names.
        settings (ZeroShotSettings): What is asked for.
        show_progress (bool, optional): Default: False

    Returns:
        dict: ``pictures``: how many of each split; ``encoder``: its top-1; per seed in lists ``head``, its top-1,
        ``agreement`` with the encoder, ``known`` and ``new``: mean correlation of the names of the halves that decide,
        on training and on test pictures, and ``shuffled``: the same of shuffled evidence on test pictures; ``named``:
        strongest halves of the first seed with name and both correlations.

    Raises:
        ValueError: if a file or a layer cannot be used, or no picture can be read.
    """
    classes = [settings.template.format(_spoken(name)) for name in photographs.classes]
    names = classes if settings.names is None else list(settings.names)
    layer = None if settings.layer is None else named_place(settings.layer)
    models = [
        ZeroShotInfoDisent(
            encoder, classes, layer, class_names=photographs.classes, estimator=settings.estimator, seed=seed
        )
        for seed in range(settings.seeds)
    ]
    train, test = (
        _read(models[0], photographs, _places(photographs, split, settings.limit), names, show_progress)
        for split in (TRAIN, TEST)
    )
    decided = train.decisions.argmax(1), test.decisions.argmax(1)
    found: dict[str, Any] = {
        "pictures": (len(train.labels), len(test.labels)),
        "encoder": _share(decided[1], test.labels),
        **{name: [] for name in ("head", "agreement", "known", "new", "shuffled")},
    }
    for seed, model in enumerate(models):
        model.fit(train.features, epochs=settings.epochs, cuts=1, seed=seed, show_progress=show_progress)
        predicted = model.predict(test.features).argmax(1)
        found["head"].append(_share(predicted, test.labels))
        found["agreement"].append(_share(predicted, decided[1]))
        known, new = (correlations(model.evidence(one.features), one.scores) for one in (train, test))
        order = torch.randperm(len(train.scores), generator=torch.Generator().manual_seed(seed))
        chance = correlations(model.evidence(train.features)[order], train.scores)
        deciding = _deciding(model, test.features)
        for name, chosen, tried in (("known", known, known), ("new", known, new), ("shuffled", chance, new)):
            best = chosen.argmax(1)
            found[name].append(float(tried.gather(1, best[:, None])[deciding].mean()))
        if seed == 0:
            found["named"] = _named(known, new, names, deciding)
    return found


def told_lines(found: dict[str, Any]) -> list[str]:
    r"""What a study found, as lines.

    Args:

        found (dict): From :func:`zero_shot_study`.

    Returns:
        list[str]: for a terminal.
    """
    train, test = found["pictures"]

    def shown(name: str, scale: float, digits: int) -> str:
        return shown_interval([scale * value for value in found[name]], digits)

    return [
        f"pictures   {train} for training, {test} for testing",
        f"encoder    top-1 {100 * found['encoder']:.1f} %",
        f"head       top-1 {shown('head', 100, 1)} %, decides as the encoder in {shown('agreement', 100, 1)} %",
        f"names      correlation {shown('known', 1, 2)} on training pictures, {shown('new', 1, 2)} on test pictures; "
        f"of shuffled evidence {shown('shuffled', 1, 2)}",
        *(
            f"channel    {channel}{'+' if sign > 0 else '-'}: {name!r} with {known:.2f}, on test pictures {new:.2f}"
            for channel, sign, name, known, new in found["named"]
        ),
    ]


@dataclass(frozen=True, eq=False)
class _Seen:
    """What one reading of pictures gave: features labelled with probabilities, classes, and similarities."""

    features: FeatureSet
    labels: Tensor
    decisions: Tensor
    scores: Tensor


def _read(
    model: ZeroShotInfoDisent, photographs: PhotographSet, places: Sequence[int], names: Sequence[str], show: bool
) -> _Seen:
    classes, wanted = (caption_embeddings(model.encoder, captions) for captions in (model.captions, names))
    features, embedded, labels = [], [], []
    with tqdm(total=len(places), desc="Features", unit="picture", disable=not show) as bar:
        for images, some in _batches(model, photographs, places):
            with torch.no_grad():
                grid, embedding = model.reader.read(model.reader.place(images))
            features.append(grid.cpu())
            embedded.append(F.normalize(embedding, dim=-1))
            labels += some
            bar.update(len(some))
    if not features:
        raise ValueError("--data: not one picture of a split can be read.")
    rows = torch.cat(embedded)
    decisions = (rows @ classes.T).cpu()
    size = (images.shape[-2], images.shape[-1])
    learnt = FeatureSet(torch.cat(features), (model.logit_scale * decisions).softmax(1), size=size)
    return _Seen(learnt, torch.tensor(labels), decisions, (rows @ wanted.T).cpu())


def _batches(
    model: ZeroShotInfoDisent, photographs: PhotographSet, places: Sequence[int]
) -> Iterator[tuple[Tensor, list[int]]]:
    # A processor reads pairs; the caption is not looked at.
    caption = model.captions[0]
    for first in range(0, len(places), _BATCH):
        pictures, labels = [], []
        for place in places[first : first + _BATCH]:
            try:
                pictures.append(photographs.picture(place))
            except ValueError:
                # Its class has others; captum-m2ib disent fit tells of it.
                continue
            labels.append(photographs.photographs[place].label)
        if pictures:
            yield model.encoder.prepare(pictures, caption).inputs[0], labels


def _places(photographs: PhotographSet, split: str, limit: int | None) -> list[int]:
    """The first so many of each class."""
    counts: dict[int, int] = {}
    found = []
    for place in photographs.of(split):
        label = photographs.photographs[place].label
        counts[label] = counts.get(label, 0) + 1
        if limit is None or counts[label] <= limit:
            found.append(place)
    return found


def _deciding(model: ZeroShotInfoDisent, features: FeatureSet) -> Tensor:
    """The halves with the largest mean absolute contribution to the predicted classes, strongest first."""
    evidence, weight = model.evidence(features), model.head.class_weight.detach().cpu()
    chosen = weight[model.predict(features).argmax(1)]
    # The margin: what speaks for every class alike names none.
    sizes = (evidence * (chosen - weight.mean(0))[:, :, None]).abs().mean(0)
    return sizes.flatten().topk(min(20, sizes.numel())).indices


def _named(
    known: Tensor, new: Tensor, names: Sequence[str], deciding: Tensor
) -> list[tuple[int, int, str, float, float]]:
    best = closest(known, names, 1)
    found = []
    for half in deciding[:_TOP].tolist():
        channel, side = divmod(half, 2)
        ((name, correlation),) = best.of(channel, 1 - 2 * side)
        found.append((channel, 1 - 2 * side, name, correlation, float(new[half, names.index(name)])))
    return found


def _share(predicted: Tensor, wanted: Tensor) -> float:
    return float((predicted == wanted).double().mean())


def _spoken(name: str) -> str:
    return name.replace("-", " ").replace("_", " ")


def read_names(path: str | os.PathLike[str]) -> list[str]:
    r"""Captions of a file.

    Args:

        path (str or PathLike): A caption a line.

    Returns:
        list[str]: each once.

    Raises:
        ValueError: if there is no such file, or no caption in it.
    """
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--names: cannot read {path} ({error}).") from None
    found = list(dict.fromkeys(line for line in lines if line))
    if not found:
        raise ValueError(f"--names: {path} holds no caption; expected one a line.")
    return found
