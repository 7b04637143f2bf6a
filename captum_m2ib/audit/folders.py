"""Manifests that are files themselves: a folder of files with captions beside them, and webdataset shards."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from captum_m2ib.audit.rows import Problem, Record, blocks, even_runs, runs

_PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff")
_SOUNDS = ("wav", "flac", "mp3", "ogg")
_CAPTIONS = ("txt", "caption")
_LARGEST_MEMBER = 256 * 2**20
_LONGEST_CAPTION = 2**20


class PictureFolder:
    r"""A folder of pictures or sounds, each with its caption in a ``.txt`` file of the same name.

    Every file with a picture's ending is a row, and every other file that has a caption beside it.

    Args:

        folder (Path): The folder; its folders are searched too, hidden files are left out.
    """

    def __init__(self, folder: Path) -> None:
        self.files = (str(folder),)

    def columns(self) -> None:
        return None

    def starts(self, file: str, size: int) -> Iterator[tuple[int, int]]:
        yield from even_runs(len(_listing(file)), size)

    def read(self, file: str, start: int) -> Iterator[Record]:
        for name in _listing(file)[start:]:
            path = Path(file, name)
            yield {"id": name, "image": str(path), "caption": _caption_of(path)}

    def content(self, file: str, names: Collection[str]) -> Iterator[bytes]:
        for name in _listing(file):
            yield os.fsencode(name)
            yield (_caption_of(Path(file, name)) or "").encode("utf-8", "surrogateescape")


@lru_cache(maxsize=1)
def _listing(folder: str) -> tuple[str, ...]:
    names: set[str] = set()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names.update(os.path.relpath(os.path.join(parent, name), folder) for name in files if name[0] != ".")
    endings = {name: name.rpartition(".")[2].lower() for name in names}
    captioned = {name[: -len(".txt")] for name, ending in endings.items() if ending == "txt"}
    rows = (
        name
        for name, ending in endings.items()
        if ending in _PICTURES or (ending not in _CAPTIONS and os.path.splitext(name)[0] in captioned)
    )
    return tuple(Path(name).as_posix() for name in sorted(rows))


def _caption_of(picture: Path) -> str | None:
    try:
        with open(picture.with_suffix(".txt"), "rb") as file:
            return file.read(_LONGEST_CAPTION).decode("utf-8", "surrogateescape").strip()
    except OSError:
        return None


class TarShards:
    r"""Webdataset shards: tar files in which members of one name and different endings are one sample.

    Args:

        files (sequence of Path): The tar files, not compressed.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = tuple(map(str, files))

    def columns(self) -> None:
        return None

    def starts(self, file: str, size: int) -> Iterator[tuple[int, int]]:
        with open(file, "rb") as opened:
            yield from runs((position for position, _ in _samples(opened, 0, with_data=False)), size)

    def read(self, file: str, start: int) -> Iterator[Record]:
        with open(file, "rb") as opened:
            for _, record in _samples(opened, start, with_data=True):
                yield record

    def content(self, file: str, names: Collection[str]) -> Iterator[bytes]:
        with open(file, "rb") as opened:
            try:
                with tarfile.open(fileobj=opened, mode="r:") as archive:
                    for member in _members(archive):
                        yield f"{member.name} {member.size}".encode("utf-8", "surrogateescape")
                        if os.path.basename(member.name).partition(".")[2].lower() in (*_CAPTIONS, "json"):
                            yield from blocks(opened, member.offset_data, member.size)
            except (tarfile.TarError, OSError):
                yield f"damaged at {opened.tell()} of {os.path.getsize(file)}".encode()


def _members(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The visible files of an archive."""
    while (member := archive.next()) is not None:
        archive.members = []  # type: ignore[attr-defined]  # Else it keeps every member it has seen.
        if member.isfile() and not os.path.basename(member.name).startswith("."):
            yield member


def _samples(file: BinaryIO, start: int, with_data: bool) -> Iterator[tuple[int, Record]]:
    """Each sample with the offset of its first member."""
    file.seek(start)
    position, key = start, ""
    members: dict[str, Any] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in _members(archive):
                folder, name = os.path.split(member.name)
                stem, _, ending = name.partition(".")
                if key != os.path.join(folder, stem):
                    if members:
                        yield position, _record(file.name, key, members)
                    position, key, members = member.offset, os.path.join(folder, stem), {}
                members[ending.lower()] = _data(archive, member) if with_data else b""
    except (tarfile.TarError, OSError) as error:
        yield file.tell(), Problem(f"{os.path.basename(file.name)} is damaged from here on ({error})")
    if members:
        yield position, _record(file.name, key, members)


def _data(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Problem:
    if member.size > _LARGEST_MEMBER:
        return Problem(f"{member.name} has {member.size:,} bytes, more than the {_LARGEST_MEMBER:,} allowed")
    reader = archive.extractfile(member)
    return b"" if reader is None else reader.read()


def _record(file: str, key: str, members: Mapping[str, Any]) -> Record:
    too_large = next((member for member in members.values() if isinstance(member, Problem)), None)
    if too_large is not None:
        return too_large
    record: dict[str, Any] = {}
    if "json" in members:
        try:
            found = json.loads(members["json"])
            record.update(found if isinstance(found, dict) else {})
        except (ValueError, RecursionError):
            record["caption"] = None
    for ending in _CAPTIONS:
        if ending in members:
            record["caption"] = members[ending].decode("utf-8", "surrogateescape").strip()
    # Whatever its JSON says, a sample holds what it is about. A video is a GIF.
    for name, endings in (("image", _PICTURES), ("sound", _SOUNDS), ("video", ())):
        record[name] = next((members[ending] for ending in endings if ending in members), None)
    if "mask.png" in members:
        record["mask"] = members["mask.png"]
    return {**record, "id": f"{Path(file).stem}/{key}"}
