"""Photographs in folders of classes, or in a Hugging Face data set, their split, and whatever is wrong with them.

What cannot be used is told as a :class:`Problem` and left out; what no figure could be made of is an error.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from captum_m2ib.disent._checks import check_number
from captum_m2ib.encoders.pictures import load_picture

if TYPE_CHECKING:
    from PIL.Image import Image

TRAIN, TEST = "train", "test"
_SPLITS = {TRAIN: TRAIN, "training": TRAIN, TEST: TEST, "val": TEST, "valid": TEST, "validation": TEST}
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
HUB = "hf:"


class Problem(NamedTuple):
    r"""What a row of the report says of the data.

    Args:

        kind (str): In one or two words.
        where (str): The picture or the class.
        reason (str): What is wrong, and what was done.
    """

    kind: str
    where: str
    reason: str


@dataclass(frozen=True)
class Photograph:
    r"""One photograph of a set.

    Attributes:

        name (str): Its path in the set, or its row.
        label (int): Its class.
        split (str): ``"train"`` or ``"test"``.
        stamp (str): Changes when its content does.
    """

    name: str
    label: int
    split: str
    stamp: str


@dataclass(frozen=True)
class PhotographSet:
    r"""Photographs with their classes.

    Attributes:

        classes (tuple[str, ...]): In the order of the labels.
        photographs (tuple[Photograph, ...]): Those of training first.
        problems (tuple[Problem, ...]): What was left out before any picture was read.
        told (str): How the split was made.
        source (Callable): From a photograph's name to something that :func:`load_picture` reads.
    """

    classes: tuple[str, ...]
    photographs: tuple[Photograph, ...]
    problems: tuple[Problem, ...]
    told: str
    source: Callable[[str], Any]

    def picture(self, index: int) -> Image:
        r"""A picture in mode RGB, upright.

        Args:

            index (int): Position in ``photographs``.

        Returns:
            PIL.Image.Image: the picture.

        Raises:
            ValueError: if it cannot be read.
        """
        return load_picture(self.source(self.photographs[index].name), "picture")

    def of(self, split: str) -> list[int]:
        r"""Positions of the photographs of a split.

        Args:

            split (str): ``"train"`` or ``"test"``.

        Returns:
            list[int]: in order.
        """
        return [index for index, one in enumerate(self.photographs) if one.split == split]

    def digest(self) -> str:
        r"""What tells the set from others, the pictures' sizes and times of change included.

        Returns:
            str: hexadecimal.
        """
        text = repr((self.classes, self.photographs))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def read_photographs(data: str | os.PathLike[str], test_share: float = 0.3, seed: int = 0) -> PhotographSet:
    r"""List the photographs of a set, without reading a picture.

    Args:

        data (str or PathLike): A folder with a folder per class; or one with the folders ``train`` and ``test`` (or
            ``val``), each with a folder per class; or a folder that ``datasets`` saved; or ``hf:NAME`` of a data set on
            the hub.
        test_share (float, optional): Share of each class that is held out for testing where there is no split; a
            class keeps at least one picture for training. Default: 0.3
        seed (int, optional): Of that choice. Default: 0

    Returns:
        PhotographSet: the photographs.

    Raises:
        ValueError: if there is no such set, or fewer than two of its classes have pictures to train on, or none to test
            on.
        ImportError: if a Hugging Face data set is asked for and ``datasets`` is not installed.
    """
    check_number("test_share", test_share, 0.0, 1.0, above=True)
    name = os.fspath(data)
    if name.startswith(HUB) or _is_saved(Path(name)):
        listed = _from_datasets(name)
    else:
        listed = _from_folders(Path(name))
    return _split(listed, test_share, seed, name)


@dataclass
class _Listed:
    """What a reader found: rows of (name, class, split or None, stamp)."""

    rows: list[tuple[str, str, str | None, str]]
    empty: list[tuple[str, str | None]]
    source: Callable[[str], Any]


def _from_folders(folder: Path) -> _Listed:
    if not folder.is_dir():
        raise ValueError(
            f"--data: there is no folder {folder}; expected one with a folder of pictures per class, or hf:NAME of a "
            "data set on the hub."
        )
    found = _Listed([], [], lambda name: folder / name)
    splits = [(child, _SPLITS[child.name.lower()]) for child in _folders(folder) if child.name.lower() in _SPLITS]
    # A class may well be called "train": only both sides together are a split.
    whole: list[tuple[Path, str | None]] = list(splits) if {side for _, side in splits} == {TRAIN, TEST} else []
    for root, split in whole or [(folder, None)]:
        for child in _folders(root):
            pictures = _pictures(child)
            if not pictures:
                found.empty.append((child.name, split))
            for path in pictures:
                told = path.stat()
                name = path.relative_to(folder).as_posix()
                found.rows.append((name, child.name, split, f"{told.st_size}-{told.st_mtime_ns}"))
    if not found.rows:
        raise ValueError(
            f"--data: {folder} holds no folder with pictures ({', '.join(_ENDINGS)}); expected a folder per class, "
            "such as DATA/sparrow/1.jpg."
        )
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in _ENDINGS and not path.name.startswith(".") and path.is_file()
    )


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json"))


def _from_datasets(name: str) -> _Listed:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(
            f"--data: {name} is a Hugging Face data set, which needs datasets ({error}); install it with: pip install "
            "datasets."
        ) from error
    try:
        given: Any = datasets.load_dataset(name[len(HUB) :]) if name.startswith(HUB) else datasets.load_from_disk(name)
    except Exception as error:
        # Whatever the hub, the disk or the set's own description stumbles over.
        raise ValueError(f"--data: cannot read the data set {name} ({' '.join(str(error).split())[:300]}).") from error
    parts = dict(given) if isinstance(given, datasets.DatasetDict) else {TRAIN: given}
    rows: list[tuple[str, str, str | None, str]] = []
    read: dict[str, Any] = {}
    split_known = {_SPLITS.get(part.lower()) for part in parts} >= {TRAIN, TEST}
    for part, table in parts.items():
        image, label = _columns(table, name)
        names = table.features[label].names
        table = table.cast_column(image, datasets.Image(decode=False))
        read[part] = table.select_columns([image])
        side = _SPLITS.get(part.lower()) if split_known else None
        if split_known and side is None:
            continue
        # The hub marks pictures of unknown class with -1.
        rows += [
            (f"{part}/{row}", names[value], side, table._fingerprint)
            for row, value in enumerate(table[label])
            if value is not None and value >= 0
        ]

    def source(row: str) -> Any:
        part, _, number = row.rpartition("/")
        (cell,) = read[part][int(number)].values()
        return cell["bytes"] if cell["bytes"] is not None else cell["path"]

    if not rows:
        raise ValueError(f"--data: the data set {name} has no labelled picture.")
    return _Listed(rows, [], source)


def _columns(table: Any, name: str) -> tuple[str, str]:
    import datasets

    images = [key for key, kind in table.features.items() if isinstance(kind, datasets.Image)]
    labels = [key for key, kind in table.features.items() if isinstance(kind, datasets.ClassLabel)]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"--data: expected the data set {name} to have one column of pictures and one of classes (ClassLabel), got "
            f"{images or 'none'} and {labels or 'none'}; select and cast its columns, and save it with save_to_disk."
        )
    return images[0], labels[0]


def _split(listed: _Listed, test_share: float, seed: int, name: str) -> PhotographSet:
    problems = [
        Problem("empty class", kind, f"its folder{f' for {split}' if split else ''} holds no picture; left out")
        for kind, split in listed.empty
    ]
    given = any(split is not None for _, _, split, _ in listed.rows)
    rows = listed.rows if given else _held_out(listed.rows, test_share, seed)
    told = "as given" if given else f"{test_share:.0%} of each class held out for testing, seed {seed}"
    trained = {kind for _, kind, split, _ in rows if split == TRAIN}
    tested = {kind for _, kind, split, _ in rows if split == TEST}
    for kind in sorted(tested - trained):
        count = sum(one == kind for _, one, _, _ in rows)
        problems.append(
            Problem("test only", kind, f"no training picture, so that nobody could learn it; its {count} left out")
        )
    problems += [Problem("not tested", kind, "no test picture") for kind in sorted(trained - tested)]
    classes = tuple(sorted(trained))
    if len(classes) < 2:
        raise ValueError(
            f"--data: expected at least 2 classes with training pictures in {name}, got {len(classes)}; give a folder "
            "per class."
        )
    if not trained & tested:
        raise ValueError(
            f"--data: no class of {name} has a picture to test on; give more pictures, or a larger --test-share."
        )
    number = {kind: index for index, kind in enumerate(classes)}
    photographs = [
        Photograph(path, number[kind], str(split), stamp) for path, kind, split, stamp in rows if kind in number
    ]
    photographs.sort(key=lambda one: (one.split != TRAIN, one.label))
    return PhotographSet(classes, tuple(photographs), tuple(problems), told, listed.source)


def _held_out(
    rows: Sequence[tuple[str, str, str | None, str]], share: float, seed: int
) -> list[tuple[str, str, str | None, str]]:
    """A share of each class for testing, by a seed that is the class's own, so that other classes do not matter."""
    found: list[tuple[str, str, str | None, str]] = []
    for kind in sorted({kind for _, kind, _, _ in rows}):
        own = [row for row in rows if row[1] == kind]
        number = int.from_bytes(hashlib.sha256(f"{seed} {kind}".encode("utf-8", "surrogateescape")).digest()[:7], "big")
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(number)).tolist()
        count = min(max(round(share * len(own)), 1), len(own) - 1)
        tested = set(order[:count])
        found += [(*row[:2], TEST if index in tested else TRAIN, row[3]) for index, row in enumerate(own)]
    return found
