"""Read a manifest of pairs lazily, whatever its format, and cut it into pieces that can be read on their own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

from captum_m2ib.audit.folders import PictureFolder, TarShards
from captum_m2ib.audit.rows import COLUMNS, MEDIA, Piece, Problem, Record, Row, Source, read_boxes
from captum_m2ib.audit.tables import Arrow, Delimited, JsonLines, Parquet

_TABLES = (".parquet", ".csv", ".tsv", ".jsonl")


class Manifest:
    r"""The pairs of an audit: a table, a folder of files, webdataset shards or a data set on disk.

    Formats: ``.parquet``, ``.csv``, ``.tsv``, ``.jsonl`` (also ``.ndjson`` and ``.json`` with an object per line),
    ``.arrow``, ``.tar``; a folder of parquet or tar files; a folder that ``datasets.Dataset.save_to_disk`` wrote; a
    folder with ``metadata`` or ``captions`` as a table in it, or a ``.txt`` file beside each picture or sound.

    Args:

        path (path): The manifest.
        columns (mapping, optional): Names of the manifest's columns for ``image``, ``sound``, ``video``, ``caption``,
            ``id``, ``boxes``, ``mask``, ``contrast`` and ``frames_per_second``. Default: None (the usual names, see
            :data:`captum_m2ib.audit.rows.COLUMNS`)
        root (path, optional): Where relative paths start. Default: None (the manifest's folder)

    Raises:
        ValueError: if there is no such manifest, its format is unknown, or it lacks a column.
        RuntimeError: if the format needs pyarrow and it is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        columns: Mapping[str, str] | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        self.kind, self.source = _open(self.path)
        folder = self.path if self.path.is_dir() else self.path.parent
        self.root = Path(root) if root is not None else folder
        self.given = dict(columns or {})
        unknown = set(self.given) - set(COLUMNS)
        if unknown:
            raise ValueError(f"columns: expected some of {', '.join(COLUMNS)}, got {', '.join(sorted(unknown))}.")
        self._check_columns()

    def pieces(self, size: int) -> Iterator[Piece]:
        r"""Cut the manifest; no pair is read.

        Args:

            size (int): Most rows of a piece; no piece crosses from one file into the next.

        Returns:
            iterator of Piece: in order.
        """
        index = first = 0
        for file in self.source.files:
            for start, rows in self.source.starts(file, size):
                yield Piece(index, first, rows, file, start)
                index, first = index + 1, first + rows

    def fingerprint(self) -> str:
        r"""What tells this manifest from any other: a hash of its files' names and of all that its rows hold.

        Of pictures only the path counts or, where the manifest holds the picture itself, its size (in parquet: the size
        of a row group's); what a path leads to is not looked at.

        Returns:
            str: hexadecimal digits.
        """
        names = {
            column
            for role, usual in COLUMNS.items()
            for column in ([self.given[role]] if role in self.given else usual)
        }
        found = hashlib.sha256()
        for file in self.source.files:
            for block in chain([os.fsencode(os.path.basename(file))], self.source.content(file, names)):
                # With its length, so that nothing can move from one block into the next unseen.
                found.update(len(block).to_bytes(8, "little") + block)
        return found.hexdigest()

    def rows(self, piece: Piece) -> Iterator[Row]:
        r"""The rows of a piece, one at a time and exactly as many as it says: what cannot be read says why.

        Args:

            piece (Piece): One of the manifest's pieces.

        Yields:
            Row: the next one.
        """
        done = 0
        reason = "the file is shorter than when the audit began"
        try:
            for record in islice(self.source.read(piece.file, piece.start), piece.rows):
                yield self._row(piece.first + done, record)
                done += 1
        except (OSError, ValueError, EOFError) as error:
            reason = str(error)
        for position in range(piece.first + done, piece.first + piece.rows):
            yield Row(position, str(position), problem=f"cannot read {os.path.basename(piece.file)}: {reason}")

    def _row(self, position: int, record: Record) -> Row:
        if isinstance(record, Problem):
            return Row(position, str(position), problem=record.reason)
        values = {name: self._value(record, name) for name in COLUMNS}
        identity = values["id"]
        problem = None
        try:
            boxes = read_boxes(values["boxes"])
        except ValueError as error:
            boxes, problem = None, f"boxes: {error}"
        return Row(
            position,
            str(position) if identity is None or identity == "" else _text(identity),
            self._locate(values["image"]),
            values["caption"],
            boxes,
            self._locate(values["mask"]),
            values["contrast"] or None,
            problem,
            self._locate(values["sound"]),
            self._locate(values["video"]),
            values["frames_per_second"] or None,
        )

    def _value(self, record: Mapping[str, Any], name: str) -> Any:
        if name in self.given:
            return record.get(self.given[name])
        return next((record[column] for column in COLUMNS[name] if column in record), None)

    def _locate(self, given: Any) -> Any:
        """A path made absolute; bytes as they are; of the pair of both that data sets store, the bytes if any."""
        if isinstance(given, list):
            return [self._locate(one) for one in given]
        if isinstance(given, Mapping) and "array" not in given:
            given = given["bytes"] if given.get("bytes") else given.get("path")
        if isinstance(given, str):
            return str(self.root / given) if given and "://" not in given else given or None
        return given

    def _check_columns(self) -> None:
        found = self.source.columns()
        if found is None:
            return
        there = list(found)
        for name, column in self.given.items():
            if column not in there:
                raise ValueError(f"columns: {name} should be {column!r}; {self.path} has {_listed(there)}.")
        for names in (MEDIA, ("caption",)):
            usual = {column for name in names for column in COLUMNS[name]}
            if not set(names) & set(self.given) and not usual & set(there):
                raise ValueError(
                    f"columns: {self.path} has {_listed(there)}, none known to hold the {_either(names)}; say which "
                    f"one does (--columns {_either([f'{name}=NAME' for name in names])})."
                )


def _either(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names[:20])) or "no column"


def _text(value: Any) -> str:
    return str(value).encode("utf-8", "replace").decode("utf-8")


def _open(path: Path) -> tuple[str, Source]:
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise ValueError(f"MANIFEST: there is no {str(path)!r}; check the path.")
    return _open_files([path])


def _open_files(paths: list[Path]) -> tuple[str, Source]:
    ending = paths[0].suffix.lower()
    if ending == ".parquet":
        return "parquet", Parquet(paths)
    if ending in (".csv", ".tsv"):
        return ending[1:], Delimited(paths, "\t" if ending == ".tsv" else ",")
    if ending in (".jsonl", ".ndjson", ".json"):
        with open(paths[0], "rb") as file:
            if file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"["):
                raise ValueError(f"MANIFEST: {paths[0]} is one JSON list; write one object per line.")
        return "jsonl", JsonLines(paths)
    if ending == ".arrow":
        return "arrow", Arrow(paths)
    if ending == ".tar":
        return "webdataset", TarShards(paths)
    raise ValueError(
        f"MANIFEST: {paths[0].name!r} is no known format; expected .parquet, .csv, .tsv, .jsonl, .arrow, .tar or a "
        "folder."
    )


def _open_folder(folder: Path) -> tuple[str, Source]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(part.name for part in folder.iterdir() if part.is_dir())
        raise ValueError(f"MANIFEST: {folder} holds several splits; choose one of {', '.join(splits)}.")
    for pattern in ("*.arrow", "*.parquet", "*.tar"):
        found = sorted(path for path in folder.glob(pattern) if path.name[0] != ".")
        if found and (pattern != "*.arrow" or (folder / "state.json").is_file()):
            return _open_files(found)
    for stem in ("metadata", "captions"):
        for ending in _TABLES:
            if (folder / (stem + ending)).is_file():
                return _open_files([folder / (stem + ending)])
    return "folder", PictureFolder(folder)
