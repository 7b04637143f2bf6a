"""Read videos as frames, take as many as a model reads, and say which and when."""

from __future__ import annotations

import io
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_m2ib.encoders.pictures import MAXIMUM_PIXELS, PictureLike, check_size, checked_path, load_picture
from captum_m2ib.encoders.processors import read_picture
from captum_m2ib.encoders.timelines import VideoTimeline
from captum_m2ib.encoders.views import View, view_of

if TYPE_CHECKING:
    from PIL.Image import Image

VideoLike: TypeAlias = "Video | Sequence[PictureLike] | np.ndarray | Tensor | bytes | str | os.PathLike[str]"

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_MOST_FRAMES = 10_000
# Of all frames of one file together, about four gigabytes.
_MOST_PIXELS = 1_500_000_000
# Frames are shown small, beside each other.
_SHOWN_SIDE = 256


@dataclass(frozen=True, eq=False)
class Video:
    r"""Frames, and when each begins.

    Args:

        frames (sequence or array): Pictures, each as :func:`captum_m2ib.explain` takes one, or a uint8 array or tensor,
            (frames, H, W, 3).
        frames_per_second (float, optional): How many are a second. Default: None (not known: frames are counted)
        seconds (sequence of float, optional): When each frame begins, where they are not equally long. Default: None

    Raises:
        ValueError: if there are no frames, an array is none of frames, or times do not fit.

    Examples::

        >>> Video(np.zeros((8, 32, 32, 3), dtype=np.uint8), frames_per_second=4).seconds[-1]
        1.75
    """

    frames: Any
    frames_per_second: float | None = None
    seconds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        frames, rate, seconds = self.frames, self.frames_per_second, self.seconds
        frames = frames.detach().cpu().numpy() if isinstance(frames, Tensor) else frames
        if isinstance(frames, np.ndarray) and (
            frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in (3, 4)
        ):
            raise ValueError(
                f"frames: expected a uint8 array of shape (frames, H, W, 3), got {frames.dtype} of shape "
                f"{frames.shape}."
            )
        if not 0 < len(frames) <= _MOST_FRAMES:
            raise ValueError(f"frames: expected 1 to {_MOST_FRAMES:,} frames, got {len(frames)}.")
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
            raise ValueError(f"frames_per_second: expected a number above 0, got {rate!r:.80}.")
        if rate is not None and seconds is None:
            seconds = [index / rate for index in range(len(frames))]
        if seconds is not None and len(seconds) != len(frames):
            raise ValueError(f"seconds: expected one per frame, {len(frames)}, got {len(seconds)}.")
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "seconds", None if seconds is None else tuple(map(float, seconds)))

    @property
    def rate(self) -> float | None:
        """Frames per second, on average where they are not equally long; None if not known."""
        if self.frames_per_second is not None or not self.seconds or not self.seconds[-1]:
            return self.frames_per_second
        return (len(self.seconds) - 1) / self.seconds[-1]


def load_video(video: VideoLike, name: str = "video") -> Video:
    r"""Read a video as frames.

    Args:

        video (Video, sequence, array or path): A :class:`Video`; pictures or paths of pictures, one per frame; a uint8
            array or tensor, (frames, H, W, 3); a folder of pictures, taken in the order of their names; or an animated
            GIF or WebP file, which says when each frame begins, or what is in one.
        name (str, optional): What errors call it. Default: "video"

    Returns:
        Video: whose frames are read when they are taken.

    Raises:
        ValueError: if it is none of these, or there are no frames.
    """
    if isinstance(video, Video):
        return video
    if isinstance(video, str | os.PathLike):
        path = Path(video)
        if path.is_dir():
            return _of_folder(path, name)
        found = checked_path(video, name, "video")
        return _of_file(found, name, found)
    if isinstance(video, bytes):
        return _of_file(io.BytesIO(video), name, "the given bytes")
    if isinstance(video, np.ndarray | Tensor) or _is_frames(video):
        return Video(video)
    raise ValueError(
        f"{name}: expected frames as a list of pictures or a uint8 array (frames, H, W, 3), a folder of pictures or a "
        f"GIF, got {type(video).__name__}."
    )


def load_videos(videos: VideoLike | Iterable[VideoLike]) -> list[Video]:
    """Read one video or several, naming in errors which one is at fault."""
    is_one = (
        isinstance(videos, Video | bytes | str | os.PathLike) or _is_frames(videos) or not isinstance(videos, Iterable)
    )
    is_one = is_one or (isinstance(videos, np.ndarray | Tensor) and videos.ndim <= 4)
    given: list[Any] = [videos] if is_one else list(videos)  # type: ignore[arg-type]
    if not given:
        raise ValueError("videos: expected at least one video, got none.")
    return [load_video(video, f"videos[{index}]") for index, video in enumerate(given)]


def _is_frames(given: Any) -> bool:
    """Whether a list is one video: of pictures, not of videos."""
    from PIL.Image import Image

    if not isinstance(given, list | tuple) or not given:
        return False
    first = given[0]
    if isinstance(first, str | os.PathLike):
        return os.fspath(first).lower().endswith(_PICTURES)
    return isinstance(first, bytes | Image) or (isinstance(first, np.ndarray) and first.ndim in (2, 3))


def _of_folder(path: Path, name: str) -> Video:
    found = sorted((file for file in path.iterdir() if file.suffix.lower() in _PICTURES), key=_in_order)
    if not found:
        raise ValueError(f"{name}: the folder {path} holds no pictures; expected one per frame, in order of names.")
    return Video(found)


def _in_order(file: Path) -> list[tuple[int, str]]:
    """Names with their numbers counted: frame 2 comes before frame 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", file.name)]


def _of_file(opened: str | io.BytesIO, name: str, called: str) -> Video:
    from PIL import Image, UnidentifiedImageError

    frames, seconds, now = [], [], 0.0
    try:
        with Image.open(opened, formats=("GIF", "WEBP", "PNG")) as file:
            check_size(file.size, name, called, MAXIMUM_PIXELS)
            count = getattr(file, "n_frames", 1)
            if count * file.width * file.height > _MOST_PIXELS:
                raise _too_large(name, called)
            for index in range(min(count, _MOST_FRAMES + 1)):
                file.seek(index)
                frames.append(file.convert("RGB"))
                seconds.append(now)
                now += float(file.info.get("duration", 0)) / 1000
    except Image.DecompressionBombError:
        raise _too_large(name, called) from None
    except (UnidentifiedImageError, OSError, EOFError, SyntaxError, IndexError, struct.error):
        raise ValueError(
            f"{name}: cannot read {called} as frames; expected an animated GIF, WebP or PNG. Of other videos write the "
            "frames to a folder first, e.g. ffmpeg -i FILE FOLDER/%05d.png."
        ) from None
    return Video(frames, seconds=seconds if now > 0 or len(frames) == 1 else None)


def _too_large(name: str, called: str) -> ValueError:
    return ValueError(
        f"{name}: {called} has too many pixels to read whole; take some of its frames, or resize it first."
    )


def read_videos(
    reader: Any, videos: Sequence[Video], name: str, count: int | None
) -> tuple[dict[str, Any], list[View], list[VideoTimeline]]:
    r"""Videos as a model's processor prepares them.

    Args:

        reader: A processor of videos or of pictures of transformers, or a function of one picture.
        videos (sequence of Video): As they were given.
        name (str): What the model calls its input.
        count (int or None): How many frames the model reads, where its configuration says so.

    Returns:
        tuple: the inputs by their names; per video the frames as the model sees them, uint8, (frames, H, W, 3); and
        which these are, and when.

    Raises:
        ValueError: if a frame cannot be read, or the processor returns another number of frames.
    """
    chosen = [_chosen(reader, video, count, f"videos[{index}]") for index, video in enumerate(videos)]
    loaded = [
        [load_picture(video.frames[index], f"frames[{index}]") for index in indices]
        for video, indices in zip(videos, chosen, strict=True)
    ]
    for index, frames in enumerate(loaded):
        if len(sizes := {frame.size for frame in frames}) > 1:
            told = " and ".join(f"{width} x {height}" for width, height in sorted(sizes))
            raise ValueError(f"videos[{index}]: expected frames of one size, got {told} pixels; resize them first.")
    process = _process_of(reader, name)
    found = process(loaded)
    shown = [
        View(_shown(frames, values, reader, lambda picture: process([[picture]])[name][0, 0]), None)
        for frames, values in zip(loaded, found[name], strict=True)
    ]
    return found, shown, [_timeline(video, indices) for video, indices in zip(videos, chosen, strict=True)]


def _chosen(reader: Any, video: Video, count: int | None, name: str) -> list[int]:
    """Which frames are taken: as the processor samples them, else evenly from the first to the last."""
    there = len(video.frames)
    stated, rate = getattr(reader, "num_frames", None), getattr(reader, "fps", None)
    if hasattr(reader, "sample_frames") and (rate or 1 < (stated or 0) < there):
        return _sampled(reader, video, stated, rate, name)
    wanted = count if stated is None or stated > there else stated
    if wanted is None or wanted == there:
        return list(range(there))
    return [round(place) for place in np.linspace(0, there - 1, wanted).tolist()]


def _sampled(reader: Any, video: Video, count: int | None, rate: float | None, name: str) -> list[int]:
    from transformers.video_utils import VideoMetadata

    if rate and not video.rate:
        raise ValueError(
            f"{name}: the model reads {rate:g} frames of each second, and frames alone have no time; pass "
            "Video(frames, frames_per_second=...)."
        )
    metadata = VideoMetadata(total_num_frames=len(video.frames), fps=video.rate)
    return [int(index) for index in reader.sample_frames(metadata=metadata, num_frames=count, fps=rate)]


def _timeline(video: Video, indices: list[int]) -> VideoTimeline:
    there, taken = len(video.frames), len(set(indices))
    told = f"{taken} of {there} frames" if taken < there else ""
    if taken < len(indices):
        told = f"{taken} of {there} frames, some of them more than once"
    seconds = () if video.seconds is None else tuple(video.seconds[index] for index in indices)
    return VideoTimeline(tuple(indices), seconds, told)


def _process_of(reader: Any, name: str) -> Callable[[list[list[Image]]], dict[str, Tensor]]:
    """From videos as frames to a model's inputs, whatever prepares them."""
    if hasattr(reader, "sample_frames"):

        def by_videos(videos: list[list[Image]]) -> dict[str, Tensor]:
            arrays = [np.stack([np.asarray(frame) for frame in frames]) for frames in videos]
            return dict(reader(videos=arrays, return_tensors="pt", do_sample_frames=False))

        return by_videos

    def one(frames: list[Image]) -> Tensor:
        if not hasattr(reader, "preprocess"):
            return torch.stack([read_picture(reader, frame) for frame in frames])
        values = reader(frames, return_tensors="pt")["pixel_values"]
        # Some processors of pictures know videos, and some do not.
        return torch.as_tensor(values).flatten(0, -4)

    def by_pictures(videos: list[list[Image]]) -> dict[str, Tensor]:
        found = [one(frames) for frames in videos]
        if len({values.shape for values in found}) > 1:
            sizes = " and ".join(sorted({" x ".join(map(str, values.shape)) for values in found}))
            raise ValueError(f"videos: expected videos of one size in one batch, got {sizes}; explain them one by one.")
        return {name: torch.stack(found)}

    return by_pictures


def _shown(frames: list[Image], values: Tensor, reader: Any, process: Callable[[Image], Tensor]) -> NDArray[np.uint8]:
    from PIL import Image

    if len(values) < len(frames):
        raise ValueError(
            f"processor: expected {type(reader).__name__} to keep all of {len(frames)} frames, got {len(values)}; set "
            "its num_frames to what the model reads."
        )
    pictures = []
    for frame, received in zip(frames, values, strict=False):
        picture = Image.fromarray(view_of(frame, received, process, reader).picture)
        picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE))
        pictures.append(picture)
    return np.stack([np.asarray(picture.resize(pictures[0].size)) for picture in pictures])
