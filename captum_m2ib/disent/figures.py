"""Pictures of explanations: why one picture got its class, and what a class rests on.

Drawn without pyplot, as :mod:`captum_m2ib.explanations.visualization` draws: no window, backend or global state is
touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from captum_m2ib.disent._checks import check_count
from captum_m2ib.disent._grid import cell_box
from captum_m2ib.disent.explanations import Contributions, Half, heatmaps
from captum_m2ib.disent.model import ConceptModel
from captum_m2ib.disent.prototypes import ClassExplanation, Prototype, Prototypes
from captum_m2ib.explanations.lettering import elide, write
from captum_m2ib.explanations.visualization import at_display_size, overlay

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Picture = NDArray[np.uint8]

_INK, _QUIET, _EDGE = "#1b1b1f", "#5c5c66", "#b8b8c2"
# Told apart also without colour vision: blue speaks for the class, orange against it.
_FOR, _AGAINST, _REST = "#1f6fb4", "#d9700f", "#c9c9d1"
_MARGIN = 0.35


def local_figure(
    model: ConceptModel[Any],
    image: Tensor,
    picture: ArrayLike,
    target: int | None = None,
    *,
    n_halves: int = 4,
    contrast: bool = False,
) -> Figure:
    r"""One prediction: where its strongest halves are, what they contribute, and their maps.

    Args:

        model (InfoDisent or EPIC): Trained.
        image (Tensor): What the model sees, (1, C, H, W).
        picture (array): The part of the picture that the model sees, uint8 (height, width, 3), at any resolution.
        target (int, optional): The class explained. Default: None (the predicted class)
        n_halves (int, optional): How many to show. Default: 4
        contrast (bool, optional): Explain how far the logit is above the mean of all logits. Default: False

    Returns:
        matplotlib.figure.Figure: outside pyplot; save it with ``figure.savefig(path)``.

    Raises:
        ValueError: if the image is not a single one, or the picture is not uint8 (height, width, 3).
    """
    check_count("n_halves", n_halves)
    if image.ndim != 4 or len(image) != 1:
        raise ValueError(f"image: expected a single picture, (1, C, H, W), got {tuple(image.shape)}.")
    seen = at_display_size(_checked(picture))
    found = model.contributions(image, target, contrast=contrast)
    halves = found.top(n_halves)[0]
    size, patch = (image.shape[-2], image.shape[-1]), model.reader.patch

    width, gap = 10.0, 0.3
    picture_height = 3.0 * min(seen.shape[0] / seen.shape[1], 1.6)
    columns = max(len(halves), 1)
    side = min(1.75, (width - 2 * _MARGIN - gap * (columns - 1)) / columns)
    bottom = 1.0 + picture_height + 0.8
    height = bottom + 2 * side + 0.65
    figure, page, axes_at = _page(width, height)
    chosen = int(found.target[0])
    explained = float((found.positive + found.negative).sum() + found.bias.sum())
    what = f"{explained:.2f} above the mean logit" if contrast else f"logit {explained:.2f}"
    title = f"{model.name_of(chosen)}: {what}"
    write(page, _MARGIN, 0.36, elide(title, width - 2 * _MARGIN, 15), size=15, weight="bold")
    predicted = int(found.logits[0].argmax())
    note = "the predicted class" if predicted == chosen else f"the predicted class is {model.name_of(predicted)}"
    write(page, _MARGIN, 0.68, elide(note, width - 2 * _MARGIN, 10), size=10, color=_QUIET)

    axes = axes_at(_MARGIN, 1.0, 3.0, picture_height)
    _show(axes, seen)
    grid = (found.maps.shape[-2], found.maps.shape[-1])
    for index, half in enumerate(halves):
        before = sum(other.cell == half.cell for other in halves[:index])
        _mark(axes, half, index + 1, before, _scaled(cell_box(half.cell, grid, size, patch), size, seen))
    _contribution_bars(axes_at(5.2, 1.0, width - _MARGIN - 5.2 - 0.5, picture_height), found, halves)

    left = (width - columns * side - gap * (columns - 1)) / 2
    maps = heatmaps(found.maps, [halves])[0].cpu().numpy()
    for index, half in enumerate(halves):
        x = left + index * (side + gap)
        name = elide(f"{index + 1}   {_name(half)}", side + gap - 0.1, 9.5)
        write(page, x, bottom - 0.18, name, size=9.5, color=_colour(half.contribution))
        _show(axes_at(x, bottom, side, side), overlay(seen, _at_pixels(maps[index], size, patch)))
        box = _scaled(cell_box(half.cell, grid, size, patch, context=1), size, seen)
        _show(axes_at(x, bottom + side + 0.3, side, side), seen[box[0] : box[2], box[1] : box[3]])
    write(
        page, left, bottom + side + 0.15, "where the channel is strongest, with its surroundings", size=9, color=_QUIET
    )
    return figure


def class_figure(
    model: ConceptModel[Any], page: ClassExplanation, prototypes: Prototypes, pictures: Sequence[ArrayLike]
) -> Figure:
    r"""The page of a class: its strongest halves, what each contributes, what it looks for, and who shares it.

    Args:

        model (InfoDisent or EPIC): Trained.
        page (ClassExplanation): From :func:`explain_class`.
        prototypes (Prototypes): From :func:`find_prototypes`, on the same data set.
        pictures (sequence): Pictures of that data set by position, uint8 (height, width, 3).

    Returns:
        matplotlib.figure.Figure: outside pyplot.

    Raises:
        ValueError: if a picture is not uint8 (height, width, 3).
    """
    width, row, text, bar = 11.0, 1.25, 3.4, 1.8
    shown = max((len(half.prototypes) for half in page.halves), default=0)
    side = min(1.05, (width - 2 * _MARGIN - text - bar - 0.3) / max(shown, 1) - 0.1)
    height = 1.25 + row * len(page.halves) + 0.2
    figure, sheet, axes_at = _page(width, height)
    write(sheet, _MARGIN, 0.36, elide(page.name, width - 2 * _MARGIN, 15), size=15, weight="bold")
    held = f"these {len(page.halves)} halves of channels hold {100 * page.share:.0f} % of the absolute contributions"
    write(sheet, _MARGIN, 0.66, held, size=10, color=_QUIET)
    write(sheet, _MARGIN + text, 1.0, "mean contribution", size=9, color=_QUIET)
    if shown:
        write(sheet, _MARGIN + text + bar + 0.3, 1.0, "where it is strongest in the data set", size=9, color=_QUIET)
    longest = max((abs(half.mean_contribution) for half in page.halves), default=0.0) or 1.0
    for index, half in enumerate(page.halves):
        top = 1.2 + index * row
        colour = _colour(half.mean_contribution)
        write(sheet, _MARGIN, top + 0.3, _name(half), size=11.5, color=_INK, weight="bold")
        shared = ", ".join(model.name_of(other) for other in half.shared_with)
        note = f"shared with {shared}" if shared else "of this class alone"
        write(sheet, _MARGIN, top + 0.58, elide(note, text - 0.2, 9.5), size=9.5, color=_QUIET)
        write(sheet, _MARGIN, top + 0.83, f"weight {half.weight:.2f}", size=9.5, color=_QUIET)
        length = (bar - 0.7) * abs(half.mean_contribution) / longest
        sheet.barh(top + 0.52, length, 0.3, left=_MARGIN + text, color=colour)
        value = f"{half.mean_contribution:+.2f}".replace("-", "−")
        write(sheet, _MARGIN + text + length + 0.08, top + 0.53, value, size=10)
        for place, one in enumerate(half.prototypes):
            x = _MARGIN + text + bar + 0.3 + place * (side + 0.1)
            _prototype(axes_at(x, top, side, side), one, prototypes, pictures, model.reader.patch, colour)
    return figure


def _page(width: float, height: float) -> tuple[Any, Any, Any]:
    """A figure, axes over all of it in inches from the top left, and a function that makes axes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    def axes_at(x: float, y: float, w: float, h: float) -> Any:
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    page = axes_at(0, 0, width, height)
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    return figure, page, axes_at


def _contribution_bars(axes: Any, found: Contributions, halves: Sequence[Half]) -> None:
    """The shown halves and the sums of the rest, as horizontal bars."""
    both = [float(part.sum()) for part in (found.positive.clamp(min=0), found.negative.clamp(min=0))]
    against = [float(part.sum()) for part in (found.positive.clamp(max=0), found.negative.clamp(max=0))]
    shown = [half.contribution for half in halves]
    names = [f"{number}   {_name(half)}" for number, half in enumerate(halves, 1)]
    colours = [_colour(value) for value in shown]
    rest = (
        ("others for it", sum(both) - sum(value for value in shown if value > 0)),
        ("others against it", sum(against) - sum(value for value in shown if value < 0)),
        ("bias", float(found.bias[0])),
    )
    for name, value in rest:
        if abs(value) > 1e-6:
            shown.append(value)
            names.append(name)
            colours.append(_REST)
    places = np.arange(len(shown))
    bars = axes.barh(places, shown, color=colours, height=0.66)
    labels = [f"{value:+.2f}".replace("-", "−") for value in shown]
    axes.bar_label(bars, labels, padding=3, fontsize=9, color=_INK)
    axes.set_yticks(places, names, fontsize=9.5, color=_INK)
    axes.set_ylim(max(len(shown), 1) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.tick_params(axis="x", labelsize=8, colors=_QUIET, width=0.6, length=3)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("contribution", fontsize=9, color=_QUIET)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=_EDGE, linewidth=0.6)


def _prototype(
    axes: Any,
    one: Prototype,
    prototypes: Prototypes,
    pictures: Sequence[ArrayLike],
    patch: tuple[int, int] | None,
    colour: str,
) -> None:
    """A picture with the box of its strongest cell."""
    seen = at_display_size(_checked(pictures[one.image]))
    _show(axes, seen)
    _frame(axes, _scaled(cell_box(one.cell, prototypes.grid, prototypes.size, patch), prototypes.size, seen), colour)


def _mark(axes: Any, half: Half, number: int, before: int, box: tuple[int, int, int, int]) -> None:
    """The box of a half and its number, beside those of the ``before`` halves that share its cell."""
    colour = _colour(half.contribution)
    _frame(axes, box, colour)
    place = (box[1] + 32 * before, box[0])
    style = {"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "white", "linewidth": 0.6}
    axes.text(*place, str(number), fontsize=7.5, color="white", ha="center", va="center", bbox=style, clip_on=False)


def _frame(axes: Any, box: tuple[int, int, int, int], colour: str) -> None:
    from matplotlib.patches import Rectangle

    top, left, bottom, right = box
    for line, edge in ((3.2, "white"), (1.7, colour)):
        axes.add_patch(
            Rectangle(
                (left, top), right - left, bottom - top, fill=False, edgecolor=edge, linewidth=line, clip_on=False
            )
        )


def _show(axes: Any, picture: Picture) -> None:
    axes.imshow(picture)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=_EDGE, linewidth=0.6)


def _at_pixels(heat: NDArray[np.float32], size: tuple[int, int], patch: tuple[int, int] | None) -> NDArray[np.float32]:
    """The map with zeros for the margin that patches leave, so that it lies where the patches are."""
    if patch is None or any(
        side // length != count for side, length, count in zip(size, patch, heat.shape, strict=True)
    ):
        return heat
    fine = heat.repeat(patch[0], 0).repeat(patch[1], 1)
    return np.pad(fine, [(0, side - length) for side, length in zip(size, fine.shape, strict=True)])


def _scaled(box: tuple[int, int, int, int], size: tuple[int, int], shown: Picture) -> tuple[int, int, int, int]:
    """A box in the model's pixels as one in the pixels shown."""
    down, across = shown.shape[0] / size[0], shown.shape[1] / size[1]
    top, left, bottom, right = box
    return round(top * down), round(left * across), round(bottom * down), round(right * across)


def _name(half: Any) -> str:
    return f"channel {half.channel} {'positive' if half.sign > 0 else 'negative'}"


def _colour(contribution: float) -> str:
    return _FOR if contribution >= 0 else _AGAINST


def _checked(picture: ArrayLike) -> Picture:
    found = np.asarray(picture)
    if found.dtype != np.uint8 or found.ndim != 3 or found.shape[2] != 3 or not found.size:
        raise ValueError(f"picture: expected uint8 of shape (height, width, 3), got {found.dtype} of {found.shape}.")
    return found
