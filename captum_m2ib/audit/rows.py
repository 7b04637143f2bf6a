"""What a manifest holds, whatever its format: rows, and pieces of consecutive rows that become one shard each."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol, TypeAlias

Record: TypeAlias = "Mapping[str, Any] | Problem"

_BLOCK = 2**20

COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "key", "uid"),
    "image": ("image", "image_path", "file_name", "filename", "filepath", "path", "img"),
    "sound": ("sound", "sound_path", "audio", "audio_path"),
    "video": ("video", "video_path", "frames"),
    "frames_per_second": ("frames_per_second", "fps"),
    "caption": ("caption", "text", "title", "sentence"),
    "boxes": ("boxes", "bboxes", "bbox", "box"),
    "mask": ("mask",),
    "contrast": ("contrast",),
}
"""What a row can hold, and the column names that are looked for when none is given, the first found wins."""

MEDIA = ("image", "sound", "video")
"""Of these a manifest has at least one."""


@dataclass(frozen=True)
class Problem:
    """Stands for a record that cannot be read, and says why."""

    reason: str


@dataclass(frozen=True)
class Row:
    r"""One row of a manifest.

    Attributes:

        row (int): Position in the manifest, from 0; unique.
        id (str): As the manifest says, else the row's position or the file's name.
        image (Any): A path or the bytes of a picture file; None if there is none.
        sound (Any): A path or the bytes of a sound file, or a mapping with ``array`` and ``sampling_rate``.
        video (Any): A folder of frames, a list of them, or a path or the bytes of an animated picture.
        frames_per_second (Any): How many frames of the video are a second; None if that is not known.
        caption (Any): The caption; None if there is none.
        boxes (list or None): Boxes ``[x0, y0, x1, y1]`` in pixels of the upright picture.
        mask (Any): A path or the bytes of a mask, as large as the picture.
        contrast (str or None): Another caption to compare the map with.
        problem (str or None): Why the row could not be read.
    """

    row: int
    id: str
    image: Any = None
    caption: Any = None
    boxes: list[list[float]] | None = None
    mask: Any = None
    contrast: str | None = None
    problem: str | None = None
    sound: Any = None
    video: Any = None
    frames_per_second: Any = None


@dataclass(frozen=True)
class Piece:
    r"""Consecutive rows of one file, the unit of work: they become one shard.

    Attributes:

        index (int): Position among the pieces, and number of the shard.
        first (int): Position of its first row in the manifest.
        rows (int): How many rows.
        file (str): The file that holds them.
        start (int): Where they begin in it: a byte offset or a row, as the format needs.
    """

    index: int
    first: int
    rows: int
    file: str
    start: int


class Source(Protocol):
    """A format: which files there are, where each shard's rows begin, and the records from there on."""

    @property
    def files(self) -> tuple[str, ...]:
        """The files, in order."""

    def columns(self) -> Iterable[str] | None:
        """Names of the columns, or None where they are fixed."""

    def starts(self, file: str, size: int) -> Iterator[tuple[int, int]]:
        """Start and number of rows of each run of ``size`` rows."""

    def read(self, file: str, start: int) -> Iterator[Record]:
        """The records from a start on."""

    def content(self, file: str, names: Collection[str]) -> Iterator[bytes]:
        """Bytes that differ if any text in the named columns does, or the size of a picture that is held there."""


def blocks(file: BinaryIO, start: int = 0, size: int | None = None) -> Iterator[bytes]:
    """A part of a file, or all from its start on, in blocks."""
    file.seek(start)
    left = size
    while block := file.read(_BLOCK if left is None else min(left, _BLOCK)):
        yield block
        left = None if left is None else left - len(block)


def runs(positions: Iterable[int], size: int) -> Iterator[tuple[int, int]]:
    """Every ``size``-th position, with how many positions follow up to the next."""
    start, count = 0, 0
    for position in positions:
        if count == size:
            yield start, count
            count = 0
        if count == 0:
            start = position
        count += 1
    if count:
        yield start, count


def even_runs(total: int, size: int) -> Iterator[tuple[int, int]]:
    """The same for positions 0, 1, ..., total - 1, without visiting each."""
    for start in range(0, total, size):
        yield start, min(size, total - start)


def read_boxes(value: Any) -> list[list[float]] | None:
    r"""Boxes from a list, an array or JSON text.

    Returns:
        list or None: of ``[x0, y0, x1, y1]``; None where there are none.

    Raises:
        ValueError: if it is not one box or a list of boxes with x0 < x1 and y0 < y1.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        if isinstance(value, str):
            value = json.loads(value)
        found = value.tolist() if hasattr(value, "tolist") else list(value)
        if found and not isinstance(found[0], (list, tuple)) and not hasattr(found[0], "tolist"):
            found = [found]
        boxes = [[float(number) for number in box] for box in found]
    except (TypeError, ValueError, RecursionError, OverflowError):
        raise ValueError(f"expected boxes [[x0, y0, x1, y1], ...], got {str(value)[:60]!r}") from None
    for box in boxes:
        if len(box) != 4 or not all(map(math.isfinite, box)) or box[0] >= box[2] or box[1] >= box[3]:
            raise ValueError(f"expected boxes [x0, y0, x1, y1] with x0 < x1 and y0 < y1, got {box}")
    return boxes or None
