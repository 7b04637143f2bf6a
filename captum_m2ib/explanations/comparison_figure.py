"""Methods down, captions across: each one's map over the picture, its tokens, its check and its seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from captum_m2ib.explanations.lettering import EDGE, QUIET, elide, format_score, text_width, visible, write
from captum_m2ib.explanations.shown import Explained
from captum_m2ib.explanations.stills import plane, still
from captum_m2ib.explanations.token_boxes import ROW_PITCH, token_box, token_rows
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import token_colors

if TYPE_CHECKING:
    from matplotlib.figure import Figure


# All lengths in inches.
_MARGIN, _GAP = 0.35, 0.35
_PICTURE, _TEXT = 2.3, 6.3
_LINE, _NOTE_SIZE, _HEAD_SIZE = 0.2, 8.5, 11.0


class _Cell(NamedTuple):
    """One explanation, broken into lines."""

    shown: Explained
    numbers: list[str]
    rows: list[list[tuple[int, float, float, str]]]
    notes: list[str]

    @property
    def text_height(self) -> float:
        return ROW_PITCH * len(self.rows) + _LINE * len(self.notes)


def comparison_figure(rows: Sequence[tuple[str, float, Sequence[Explained]]]) -> Figure:
    r"""Draw explanations of one picture, sound or video side by side.

    Args:

        rows (sequence): Per method its name, its seconds, and an explanation per caption.

    Returns:
        matplotlib.figure.Figure: outside pyplot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    captions = len(rows[0][2])
    # Beside its picture where there is one caption, below it where there are several.
    is_beside = captions == 1
    room = _TEXT if is_beside else 4.1
    pitch = (_PICTURE + _GAP + _TEXT if is_beside else room) + _GAP
    first = rows[0][2][0]
    picture = plane(first.image, first.kind)
    high = _PICTURE * min(1.3, picture.shape[0] / picture.shape[1])
    wide = high * picture.shape[1] / picture.shape[0]
    cells = [[_broken(one, room) for one in found] for _, _, found in rows]
    heights = [_row_height(line, high, is_beside) for line in cells]
    width = 2 * _MARGIN + captions * pitch - _GAP
    height = _MARGIN + 0.55 + sum(heights) + 0.25
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    page = figure.add_axes((0, 0, 1, 1))
    page.set(xlim=(0, width), ylim=(height, 0))
    page.set_axis_off()
    for column, one in enumerate(rows[0][2]):
        # Bold letters are wider than those that are measured.
        head = elide(f"{format_score(one.score)}  “{visible(one.caption)}”", 0.84 * (pitch - _GAP), _HEAD_SIZE)
        write(page, _MARGIN + column * pitch, _MARGIN, head, size=_HEAD_SIZE, weight="bold")
    below = elide(how_to_read(rows[0][2]), width - 2 * _MARGIN, 8)
    write(page, _MARGIN, height - 0.2, below, size=8, color=QUIET)
    y = _MARGIN + 0.35
    for (name, seconds, _), line, taken in zip(rows, cells, heights, strict=True):
        page.plot((_MARGIN, width - _MARGIN), (y, y), color=EDGE, linewidth=0.8)
        write(page, _MARGIN, y + 0.2, row_title(name, seconds, line[0].shown.unit), size=10.5)
        for column, cell in enumerate(line):
            x, top = _MARGIN + column * pitch, y + 0.45
            _draw_map(figure, cell.shown, (x, top, wide, high), (width, height))
            if is_beside:
                _draw_text(page, cell, x + _PICTURE + _GAP, top)
            else:
                _draw_text(page, cell, x, top + high + 0.2)
        y += taken
    return figure


def how_to_read(found: Sequence[Explained]) -> str:
    """What the numbers before the captions are, and how far maps are coloured."""
    names = ", ".join(dict.fromkeys(visible(one.score_name) for one in found))
    return f"before each caption: {names}; each map is coloured up to its own maximum"


def row_title(name: str, seconds: float, unit: str) -> str:
    took = f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{name}   ·   {WORDINGS[unit].name}   ·   {took}"


def _broken(shown: Explained, room: float) -> _Cell:
    numbers = [WORDINGS[shown.unit].number(value) for value in shown.token_bits.tolist()]
    rows = token_rows([visible(token) for token in shown.tokens], numbers, room)
    return _Cell(shown, numbers, rows, [part for note in shown.notes for part in _wrapped(visible(note), room)])


def _wrapped(text: str, room: float) -> list[str]:
    """Text on lines that fit into room, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and text_width(longer, _NOTE_SIZE) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return [elide(line, room, _NOTE_SIZE) for line in lines]


def _row_height(cells: Sequence[_Cell], picture: float, is_beside: bool) -> float:
    text = max(cell.text_height for cell in cells)
    return 0.45 + (max(picture, text) if is_beside else picture + 0.2 + text) + 0.25


def _draw_map(figure: Any, shown: Explained, box: tuple[float, float, float, float], page: tuple[float, float]) -> None:
    x, y, wide, high = box
    axes = figure.add_axes((x / page[0], 1 - (y + high) / page[1], wide / page[0], high / page[1]))
    axes.imshow(still(shown), aspect="auto")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=EDGE, linewidth=0.6)


def _draw_text(page: Any, cell: _Cell, x: float, y: float) -> None:
    colors = token_colors(cell.shown.token_bits)
    for line, row in enumerate(cell.rows):
        for index, left, width, text in row:
            flag = cell.shown.special[index]
            at = y + ROW_PITCH * line
            token_box(page, x + left, at, width, text, cell.numbers[index], colors[index], flag)
    below = y + ROW_PITCH * len(cell.rows) + 0.05
    for line, note in enumerate(cell.notes):
        write(page, x, below + _LINE * line, note, size=_NOTE_SIZE, color=QUIET)
