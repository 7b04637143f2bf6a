"""What a channel looks for: the pictures, and the places in them, where its halves are strongest; what classes use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_m2ib.disent._checks import check_choice, check_count
from captum_m2ib.disent.explanations import purity
from captum_m2ib.disent.features import FeatureSet, Loader, check_labels
from captum_m2ib.disent.model import ConceptModel

RANKINGS = ("max", "sum")
_BATCH = 256


class Prototype(NamedTuple):
    r"""A place in a picture where a half of a channel is strong.

    Args:

        image (int): Position of the picture in the data set.
        cell (tuple[int, int]): Row and column of the grid.
        value (float): What the pictures were ranked by.
        purity (float): Share of the location's vector that the channel holds, see :func:`purity`.
    """

    image: int
    cell: tuple[int, int]
    value: float
    purity: float


@dataclass(frozen=True, eq=False)
class Prototypes:
    r"""The m strongest pictures of each half of each channel, strongest first.

    Attributes:

        images (Tensor): Positions in the data set, int64 (D, 2, m); -1 where fewer pictures have any of the half.
        values (Tensor): What they were ranked by, (D, 2, m).
        cells (Tensor): Row and column of the strongest location, int64 (D, 2, m, 2).
        purity (Tensor): (D, 2, m).
        grid (tuple[int, int]): Rows and columns of the grid.
        size (tuple[int, int]): Height and width of the pictures in pixels.
    """

    images: Tensor
    values: Tensor
    cells: Tensor
    purity: Tensor
    grid: tuple[int, int]
    size: tuple[int, int]

    def of(self, channel: int, sign: int) -> list[Prototype]:
        r"""The prototypes of a half.

        Args:

            channel (int): The channel.
            sign (int): 1 for its positive half, -1 for the negative.

        Returns:
            list[Prototype]: strongest first.
        """
        side = _side(sign)
        rows = zip(
            self.images[channel, side].tolist(),
            self.cells[channel, side].tolist(),
            self.values[channel, side].tolist(),
            self.purity[channel, side].tolist(),
            strict=True,
        )
        return [Prototype(image, (cell[0], cell[1]), value, pure) for image, cell, value, pure in rows if image >= 0]

    def mean_purity(self, sign: int | None = None) -> float:
        r"""Mean purity over prototypes.

        Args:

            sign (int, optional): Of the positive halves, 1, or the negative ones, -1. Default: None (of both)

        Returns:
            float: in [0, 1]; 0 if there are no prototypes.
        """
        side = slice(None) if sign is None else slice(_side(sign), _side(sign) + 1)
        found = self.images[:, side] >= 0
        return float(self.purity[:, side][found].double().mean()) if bool(found.any()) else 0.0


def find_prototypes(
    model: ConceptModel[Any],
    loader: Loader,
    per_half: int = 5,
    rank_by: str = "max",
    show_progress: bool = False,
) -> Prototypes:
    r"""Find the pictures where each half of each channel is strongest.

    A picture that occurs more than once (by its id, or by its content where the loader gives no ids) takes one place.

    Args:

        model (InfoDisent or EPIC): Trained.
        loader (iterable): Yields pictures; or a :class:`FeatureSet`.
        per_half (int, optional): m. Default: 5
        rank_by (str, optional): ``"max"``: by the strongest location, as InfoDisent pools; ``"sum"``: by the sum over
            locations, as EPIC ranks. Default: ``"max"``
        show_progress (bool, optional): Default: False

    Returns:
        Prototypes: on the CPU.

    Raises:
        ValueError: if ``per_half`` is below 1, the ranking is unknown, or the loader is empty.
    """
    check_count("per_half", per_half)
    check_choice("rank_by", rank_by, RANKINGS)
    features = model.collect(loader, show_progress)
    rows = _first_of_each(features)
    head, best = model.head, None
    with torch.no_grad():
        for chosen in rows.split(_BATCH):
            maps = head.maps(features.features[chosen].to(head.scale.device))
            flat = torch.stack([F.relu(maps), F.relu(-maps)], 2).flatten(3)
            strength = flat.amax(-1) if rank_by == "max" else flat.sum(-1)
            new = [strength, chosen.to(maps.device)[:, None, None].expand_as(strength), flat.argmax(-1), purity(maps)]
            merged = new if best is None else [torch.cat(pair) for pair in zip(best, new, strict=True)]
            # Stable, so that equal pictures keep the order of the data set.
            order = merged[0].sort(dim=0, descending=True, stable=True).indices[:per_half]
            best = [part.gather(0, order) for part in merged]
    assert best is not None
    values, images, places, pure = (part.permute(1, 2, 0).cpu() for part in best)
    images = torch.where(values > 0, images, -1)
    grid = (features.features.shape[2], features.features.shape[3])
    cells = torch.stack([places // grid[1], places % grid[1]], -1)
    return Prototypes(images, values, cells, pure, grid, features.size or grid)


class ClassHalf(NamedTuple):
    r"""A half of a channel as a class uses it.

    Args:

        channel (int): Index of the channel.
        sign (int): 1 for the positive half, -1 for the negative.
        weight (float): W at this class and channel.
        mean_contribution (float): What the half adds to the class's logit on average over the pictures of the class.
        shared_with (tuple[int, ...]): Other classes among whose strongest halves it is, strongest first.
        prototypes (tuple[Prototype, ...]): Where it is strongest.
    """

    channel: int
    sign: int
    weight: float
    mean_contribution: float
    shared_with: tuple[int, ...]
    prototypes: tuple[Prototype, ...]


@dataclass(frozen=True)
class ClassExplanation:
    r"""What speaks for a class, over a data set.

    Attributes:

        index (int): The class.
        name (str): Its name.
        halves (tuple[ClassHalf, ...]): Its strongest halves, strongest first.
        share (float): Share of the absolute mean contributions that these halves hold.
    """

    index: int
    name: str
    halves: tuple[ClassHalf, ...]
    share: float


def explain_class(
    model: ConceptModel[Any], loader: Loader, index: int, prototypes: Prototypes, n_halves: int = 5
) -> ClassExplanation:
    r"""The halves that a class rests on, what they look for, and which other classes rest on them too.

    Halves are ranked by the absolute mean of their contribution over the pictures of the class: a large weight on a
    half that these pictures lack decides nothing.

    Args:

        model (InfoDisent or EPIC): Trained.
        loader (iterable): Yields (images, labels); or a :class:`FeatureSet` with labels.
        index (int): The class.
        prototypes (Prototypes): From :func:`find_prototypes`.
        n_halves (int, optional): Halves to show; also how many of another class's strongest count as its own when
            looking for what is shared. Default: 5

    Returns:
        ClassExplanation: the page of the class.

    Raises:
        ValueError: if the class is unknown or no picture has it.
    """
    n_classes = model.head.n_classes
    if not 0 <= index < n_classes:
        raise ValueError(f"index: expected a class from 0 to {n_classes - 1}, got {index}.")
    found = {page.index: page for page in explain_classes(model, loader, prototypes, n_halves)}
    if index not in found:
        raise ValueError(f"index: expected a class that occurs in the data, got {index}, which no picture has.")
    return found[index]


def explain_classes(
    model: ConceptModel[Any], loader: Loader, prototypes: Prototypes, n_halves: int = 5
) -> list[ClassExplanation]:
    r"""The page of every class that occurs in the data, at the price of one: see :func:`explain_class`.

    Args:

        model (InfoDisent or EPIC): Trained.
        loader (iterable): Yields (images, labels); or a :class:`FeatureSet` with labels.
        prototypes (Prototypes): From :func:`find_prototypes`.
        n_halves (int, optional): As for :func:`explain_class`. Default: 5

    Returns:
        list[ClassExplanation]: in the order of the classes.
    """
    head, features = model.head, model.collect(loader)
    labels = check_labels(features.labels, head.n_classes, len(features))
    labels = labels.argmax(1) if labels.is_floating_point() else labels
    means = mean_contributions(model, features, labels)
    strongest = means.abs().flatten(1).topk(min(n_halves, means[0].numel()), 1).indices
    weight = head.class_weight.detach().cpu()
    return [_class_page(model, index, means, strongest, weight, prototypes) for index in sorted(set(labels.tolist()))]


def _class_page(
    model: ConceptModel[Any], index: int, means: Tensor, strongest: Tensor, weight: Tensor, prototypes: Prototypes
) -> ClassExplanation:
    halves = []
    for position in strongest[index].tolist():
        channel, side = divmod(position, 2)
        value = means[index, channel, side]
        others = [k for k in range(len(means)) if k != index and position in strongest[k].tolist()]
        others = [k for k in others if means[k, channel, side] != 0]
        others.sort(key=lambda k: -abs(float(means[k, channel, side])))
        sign = 1 - 2 * side
        halves.append(
            ClassHalf(
                channel,
                sign,
                float(weight[index, channel]),
                float(value),
                tuple(others),
                tuple(prototypes.of(channel, sign)),
            )
        )
    sizes = means[index].abs()
    total = float(sizes.sum())
    share = float(sizes.flatten()[strongest[index]].sum()) / total if total > 0 else 0.0
    return ClassExplanation(index, model.name_of(index), tuple(halves), share)


def mean_contributions(model: ConceptModel[Any], features: FeatureSet, labels: Tensor) -> Tensor:
    """Mean contribution of each half to the logit of each class over that class's pictures, (n_classes, D, 2)."""
    evidence, weight = model.evidence(features), model.head.class_weight.detach().cpu()
    members = F.one_hot(labels, model.head.n_classes).to(evidence.dtype)
    means = torch.einsum("nk,ncs->kcs", members, evidence) / members.sum(0).clamp(min=1)[:, None, None]
    return means * weight[:, :, None] * torch.tensor([1.0, -1.0])


def _side(sign: int) -> int:
    if sign not in (1, -1):
        raise ValueError(f"sign: expected 1 or -1, got {sign!r}.")
    return 0 if sign == 1 else 1


def _first_of_each(features: FeatureSet) -> Tensor:
    """Rows of the first occurrence of each picture, in order."""
    if features.ids is None:
        return torch.arange(len(features))
    seen: dict[int, int] = {}
    for row, number in enumerate(features.ids.tolist()):
        seen.setdefault(number, row)
    return torch.tensor(list(seen.values()))
