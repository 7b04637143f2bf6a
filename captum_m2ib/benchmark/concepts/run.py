"""A head on the classifier's own decisions, maps of every method, and how they fall on the masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib.benchmark.concepts.questions import Question
from captum_m2ib.benchmark.photos.coco import Photo
from captum_m2ib.benchmark.tables import Figure
from captum_m2ib.benchmark.truth import lists_of, on_truth
from captum_m2ib.disent import FeatureSet, InfoDisent, InfoDisentAttribution
from captum_m2ib.disent.named import NamedBackbone

OURS = "infodisent"
_BATCH = 16
_IG_STEPS = 16
_LEAST_PART = 0.4
_GROUP = "localisation, photographs"

FIGURES = (
    Figure("image pointing", _GROUP, 1, "pointing"),
    Figure("image mass", _GROUP, 1, "mass"),
    Figure("image auroc", _GROUP, 1, "AUROC"),
    Figure("area", _GROUP, 0, "area of the truth"),
)

Maps = Callable[[Tensor, Tensor], Tensor]
"""From pictures, (N, 3, side, side), and targets, (N,), to maps, (N, side, side)."""


def fit_on_decisions(
    backbone: NamedBackbone,
    place: str | tuple[str, int],
    n_classes: int,
    photos: Sequence[Photo],
    *,
    crops: int = 16,
    seed: int = 0,
    epochs: int = 60,
    show_progress: bool = False,
) -> InfoDisent:
    r"""InfoDisent, trained on what the classifier says of parts of the photographs; no label and no mask is read.

    Args:

        backbone (NamedBackbone): The classifier.
        place (str or tuple): Its layer, as :class:`InfoDisent` takes it.
        n_classes (int): How many outputs it has.
        photos (sequence of Photo): The photographs.
        crops (int, optional): Parts of each, from 40 % of its sides on. Default: 16
        seed (int, optional): Of parts and training. Default: 0
        epochs (int, optional): At most. Default: 60
        show_progress (bool, optional): Default: False

    Returns:
        InfoDisent: with the classifier's classes.
    """
    model = InfoDisent(backbone.module, place, n_classes, estimator="max", seed=seed)
    features = _decided(model, _parts(photos, backbone, crops, seed), len(photos) * crops, show_progress)
    model.fit(features, epochs=epochs, cuts=1, seed=seed, show_progress=show_progress)
    return model


def agreement(model: InfoDisent, questions: Sequence[Question]) -> float:
    r"""How often a head decides as the classifier behind it.

    Args:

        model (InfoDisent): Fitted.
        questions (sequence of Question): Whose whole photographs it decides.

    Returns:
        float: in [0, 1].
    """
    same = 0
    with torch.no_grad():
        for question in questions:
            output = model.backbone(question.image[None])
            same += int(model(question.image[None]).argmax() == getattr(output, "logits", output).argmax())
    return same / len(questions)


def methods_on(model: InfoDisent) -> dict[str, Maps]:
    r"""The methods, each on the same classifier.

    Args:

        model (InfoDisent): On the classifier; Grad-CAM reads the same layer.

    Returns:
        dict: name to what makes maps.
    """
    from captum.attr import IntegratedGradients, LayerGradCam

    net, ours = model.backbone, InfoDisentAttribution(model)
    layer, call = model.reader.layer.module, model.reader.layer.call

    def concepts(exact: bool, contrast: bool) -> Maps:
        options = {"exact": exact, "contrast": contrast, "interpolation": "bilinear"}
        return lambda images, targets: ours.attribute(images, targets, **options).sum(1)

    def gradients(images: Tensor, targets: Tensor) -> Tensor:
        found: Tensor = IntegratedGradients(net).attribute(
            images, target=targets, n_steps=_IG_STEPS, internal_batch_size=_BATCH
        )
        return found.sum(1).abs()

    def cam(images: Tensor, targets: Tensor) -> Tensor:
        found = LayerGradCam(net, layer).attribute(images, target=targets, relu_attributions=True)
        grid = found if isinstance(found, Tensor) else found[call or 0]
        return F.interpolate(grid, images.shape[-2:], mode="bilinear").squeeze(1)

    return {
        OURS: concepts(True, False),
        "infodisent, margin": concepts(True, True),
        "infodisent, spread": concepts(False, False),
        "infodisent, spread margin": concepts(False, True),
        "grad-cam": cam,
        "integrated gradients": gradients,
        "centre": _centre,
    }


def measure_all(
    methods: Mapping[str, Maps], questions: Sequence[Question], show_progress: bool = False
) -> dict[str, dict[str, list[list[float]]]]:
    r"""How the maps of every method fall on the masks.

    Args:

        methods (mapping): From :func:`methods_on`.
        questions (sequence of Question): The photographs.
        show_progress (bool, optional): Default: False

    Returns:
        dict: method to figure to one row with a value per question.
    """
    found = {}
    for name, maps_of in tqdm(methods.items(), unit="method", disable=not show_progress):
        rows: dict[str, list[float]] = {figure.name: [] for figure in FIGURES}
        for question in questions:
            maps = maps_of(question.image[None], torch.tensor([question.target])).detach().double()
            for figure, values in lists_of(on_truth(maps, question.mask[None])).items():
                rows[figure] += values
            rows["area"].append(float(question.mask.double().mean()))
        found[name] = {figure: [row] for figure, row in rows.items()}
    return found


def _centre(images: Tensor, targets: Tensor) -> Tensor:
    """A blob in the middle, which knows nothing of the picture."""
    rows, columns = (torch.linspace(-1, 1, side).square() for side in images.shape[-2:])
    return (-(rows[:, None] + columns) * 2).exp().expand(len(images), -1, -1)


def _parts(photos: Sequence[Photo], backbone: NamedBackbone, crops: int, seed: int) -> Iterator[Tensor]:
    for photo in photos:
        picture = photo.picture()
        # A seed of the photograph's own, so that the others do not matter.
        rng = np.random.default_rng([seed, photo.id])
        for _ in range(crops):
            edge = max(round(rng.uniform(_LEAST_PART, 1) * min(picture.size)), 1)
            left, top = (int(rng.integers(length - edge + 1)) for length in picture.size)
            part = picture.crop((left, top, left + edge, top + edge))
            yield backbone.preparation.tensor(backbone.preparation.crop(part))


def _decided(model: InfoDisent, parts: Iterator[Tensor], total: int, show_progress: bool) -> FeatureSet:
    """Features of pictures with the probabilities of the classifier's classes, from one pass."""
    features, labels = [], []
    with tqdm(total=total, desc="Decisions", unit="picture", disable=not show_progress) as bar:
        while batch := list(islice(parts, _BATCH)):
            with torch.no_grad():
                grid, output = model.reader.read(torch.stack(batch))
            features.append(grid)
            labels.append(getattr(output, "logits", output).softmax(1))
            bar.update(len(batch))
    return FeatureSet(torch.cat(features), torch.cat(labels))
