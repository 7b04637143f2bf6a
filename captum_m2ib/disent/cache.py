"""Features of photographs on disk: the backbone reads each once, in shards that a later call checks."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_m2ib.disent.features import FeatureReader, FeatureSet
from captum_m2ib.disent.named import NamedBackbone
from captum_m2ib.disent.photographs import TEST, TRAIN, PhotographSet, Problem
from captum_m2ib.disent.storage import read_tensors, write_tensors

_SHARD = 256
_GREY = "grey"


@dataclass(frozen=True, eq=False)
class Cached:
    r"""What a backbone made of a set of photographs.

    Attributes:

        features (FeatureSet): Of those that could be read, with labels and ids.
        positions (Tensor): Which photograph each row is, int64 (n,).
        logits (Tensor or None): What the backbone itself returned, (n, outputs), where that is one row per picture.
        problems (tuple[Problem, ...]): What could not be read, and what was read but is unusual.
        read_now (int): Pictures that this call sent through the backbone.
    """

    features: FeatureSet
    positions: Tensor
    logits: Tensor | None
    problems: tuple[Problem, ...]
    read_now: int

    def split(self, photographs: PhotographSet) -> tuple[Tensor, Tensor, tuple[Problem, ...]]:
        r"""Rows for training and for testing; a test picture that is also among those of training is left out.

        Args:

            photographs (PhotographSet): The set.

        Returns:
            tuple: rows for training, rows for testing, and what was left out.

        Raises:
            ValueError: if one side is empty, or a class has lost every training picture.
        """
        assert self.features.ids is not None and self.features.labels is not None
        trains = torch.tensor([photographs.photographs[place].split == TRAIN for place in self.positions.tolist()])
        double = ~trains & torch.isin(self.features.ids, self.features.ids[trains])
        problems = [
            Problem("in both splits", photographs.photographs[place].name, "also a training picture; not tested on")
            for place in self.positions[double].tolist()
        ]
        train, test = trains.nonzero().squeeze(1), (~trains & ~double).nonzero().squeeze(1)
        learnt = set(self.features.labels[train].tolist())
        lost = [name for label, name in enumerate(photographs.classes) if label not in learnt]
        if lost or not len(test):
            what = f"of class {lost[0]!r}" if lost else "for testing"
            raise ValueError(
                f"--data: not one picture {what} can be used; the problems told above say why. Mend them, or take "
                "the class away."
            )
        return train, test, tuple(problems)


def cached_features(
    photographs: PhotographSet,
    backbone: NamedBackbone,
    reader: FeatureReader,
    folder: str | os.PathLike[str],
    batch_size: int = 32,
    show_progress: bool = False,
) -> Cached:
    r"""Features of photographs, from disk where they are there.

    Shards are safetensors files of 256 pictures. Each says which backbone (every weight), preparation, layer and
    photographs it was made of, and carries a digest of its numbers; one that does not fit is made again.

    Args:

        photographs (PhotographSet): The set.
        backbone (NamedBackbone): The backbone.
        reader (FeatureReader): Of the same backbone, at a layer.
        folder (str or PathLike): Where the shards are.
        batch_size (int, optional): Pictures that the backbone reads at once. Default: 32
        show_progress (bool, optional): Default: False

    Returns:
        Cached: of the photographs that could be read.

    Raises:
        ValueError: if no photograph can be read, or the backbone or the layer does not fit them.
    """
    key = hashlib.sha256(
        repr((backbone.digest(), reader.layer.name, reader.layer.call, photographs.digest())).encode()
    ).hexdigest()[:24]
    total, parts, read_now = len(photographs.photographs), [], 0
    with tqdm(total=total, desc="Features", unit="picture", disable=not show_progress) as bar:
        for first in range(0, total, _SHARD):
            places = range(first, min(first + _SHARD, total))
            path = Path(folder, f"features-{first // _SHARD:05d}.safetensors")
            part = _kept(path, key)
            if part is None:
                part = _read(photographs, places, backbone, reader, batch_size)
                tensors, metadata = part
                write_tensors(path, tensors, {"key": key, "digest": _digest(tensors), **metadata})
                read_now += len(places)
            parts.append(part)
            bar.update(len(places))
    return _joined(parts, photographs, backbone.preparation.side, read_now)


_Part = tuple[dict[str, Tensor], dict[str, Any]]


def _kept(path: Path, key: str) -> _Part | None:
    """A shard as it was written, or None where there is none that fits."""
    try:
        tensors, metadata = read_tensors(path)
    except OSError:
        return None
    if metadata.get("key") != key or metadata.get("digest") != _digest(tensors):
        return None
    return tensors, metadata


def _digest(tensors: dict[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _read(
    photographs: PhotographSet, places: Sequence[int], backbone: NamedBackbone, reader: FeatureReader, batch_size: int
) -> _Part:
    """Send the pictures of a shard through the backbone; what cannot be read is told instead."""
    problems: list[tuple[str, int, str]] = []
    parts: dict[str, list[Tensor]] = {"features": [], "positions": [], "ids": [], "logits": []}
    for batch in _batches(photographs, places, backbone, batch_size, problems):
        images, positions, ids = batch
        with torch.no_grad():
            features, output = reader.read(reader.place(images))
        parts["features"].append(features.detach().float().cpu())
        parts["positions"].append(positions)
        parts["ids"].append(ids)
        logits = getattr(output, "logits", output)
        if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == len(images):
            parts["logits"].append(logits.detach().float().cpu())
    tensors = {name: torch.cat(found) for name, found in parts.items() if found}
    return tensors, {"problems": problems}


def _batches(
    photographs: PhotographSet,
    places: Sequence[int],
    backbone: NamedBackbone,
    batch_size: int,
    problems: list[tuple[str, int, str]],
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pictures, their positions, and ids that are equal where the pictures are."""
    ready: list[tuple[Tensor, int, int]] = []
    for place in places:
        try:
            crop = backbone.preparation.crop(photographs.picture(place))
        except ValueError as error:
            problems.append(("unreadable", place, str(error).removeprefix("picture: ")))
            continue
        pixels = crop.tobytes()
        if pixels[0::3] == pixels[1::3] == pixels[2::3]:
            problems.append((_GREY, place, ""))
        number = int.from_bytes(hashlib.blake2b(pixels, digest_size=8).digest(), "big", signed=True)
        ready.append((backbone.preparation.tensor(crop), place, number))
        if len(ready) == batch_size:
            yield _stacked(ready)
            ready = []
    if ready:
        yield _stacked(ready)


def _stacked(ready: Sequence[tuple[Tensor, int, int]]) -> tuple[Tensor, Tensor, Tensor]:
    images, places, numbers = zip(*ready, strict=True)
    return torch.stack(images), torch.tensor(places), torch.tensor(numbers)


def _joined(parts: Sequence[_Part], photographs: PhotographSet, side: int, read_now: int) -> Cached:
    told = [problem for _, metadata in parts for problem in metadata["problems"]]
    full = [tensors for tensors, _ in parts if tensors]
    if not full:
        raise ValueError(f"--data: not one of {len(photographs.photographs)} pictures can be read ({told[0][2]}).")
    # One shard at a time, so that the features are never held twice.
    count = sum(len(tensors["positions"]) for tensors in full)
    features = torch.empty(count, *full[0]["features"].shape[1:])
    start = 0
    for tensors in full:
        part = tensors.pop("features")
        features[start : start + len(part)] = part
        start += len(part)
    positions, ids = (torch.cat([tensors[name] for tensors in full]) for name in ("positions", "ids"))
    logits = torch.cat([tensors["logits"] for tensors in full]) if "logits" in full[0] else None
    labels = torch.tensor([photographs.photographs[place].label for place in positions.tolist()])
    found = FeatureSet(features, labels, ids, (side, side))
    return Cached(found, positions, logits, _told(told, photographs), read_now)


def _told(problems: Sequence[tuple[str, int, str]], photographs: PhotographSet) -> tuple[Problem, ...]:
    """Pictures that cannot be read one by one, and grey ones as a count per split."""
    found = [
        Problem(kind, photographs.photographs[place].name, f"{reason}; left out")
        for kind, place, reason in problems
        if kind != _GREY
    ]
    for split in (TRAIN, TEST):
        grey = [place for kind, place, _ in problems if kind == _GREY and photographs.photographs[place].split == split]
        if grey:
            name = photographs.photographs[grey[0]].name
            more = f" and {len(grey) - 1} more" if len(grey) > 1 else ""
            found.append(Problem("no colour", f"{name}{more}", f"for {split}; used, all three colours being equal"))
    return tuple(found)
