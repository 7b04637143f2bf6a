"""Where in time a sound's or a video's map lies; plain numbers, for those who only read explanations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class SoundTimeline:
    r"""What the columns and rows of a sound's map are.

    Args:

        seconds (float): Where the last column ends; the first begins at 0, and all are equally long.
        hertz (tuple[float, ...], optional): Per row of a spectrogram, from the top, the frequency that it stands for.
            Default: () (not known, or a wave, whose map has one row)
        period (float, optional): After so many seconds the sound begins again, as processors do that fill up short
            sounds. Default: None (it is heard once)
        taken (str, optional): In words, how it differs from the sound that was given. Default: ""

    Raises:
        ValueError: for numbers that are no times or frequencies.
    """

    seconds: float
    hertz: tuple[float, ...] = ()
    period: float | None = None
    taken: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hertz", _numbers(self.hertz, "hertz"))
        for name, value in (("seconds", self.seconds), ("period", self.period)):
            if value is not None and not (_is_number(value) and 0 < value < math.inf):
                raise ValueError(f"{name}: expected a number of seconds above 0, got {value!r:.80}.")


@dataclass(frozen=True)
class VideoTimeline:
    r"""Which frames of a video the model saw, and when.

    Args:

        frames (tuple[int, ...]): Their places among the frames that were given, counted from 0.
        seconds (tuple[float, ...], optional): When each begins. Default: () (not known)
        taken (str, optional): In words, how they differ from the video that was given. Default: ""

    Raises:
        ValueError: if there is no frame, or not one time per frame.
    """

    frames: tuple[int, ...]
    seconds: tuple[float, ...] = ()
    taken: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", tuple(map(int, _numbers(self.frames, "frames"))))
        object.__setattr__(self, "seconds", _numbers(self.seconds, "seconds"))
        if not self.frames or len(self.seconds) not in (0, len(self.frames)):
            raise ValueError(
                f"seconds: expected one per frame, {len(self.frames)} of at least 1, got {len(self.seconds)}."
            )

    @property
    def names(self) -> tuple[str, ...]:
        """What each frame is called below it."""
        if self.seconds:
            return tuple(f"{second:.2f} s" for second in self.seconds)
        return tuple(f"frame {frame}" for frame in self.frames)


Timeline: TypeAlias = SoundTimeline | VideoTimeline

_KINDS: dict[str, type[SoundTimeline] | type[VideoTimeline]] = {"sound": SoundTimeline, "video": VideoTimeline}


def kind_of(timeline: Timeline | None) -> str:
    """What an explained input is called: an image has no timeline."""
    return next((name for name, kind in _KINDS.items() if isinstance(timeline, kind)), "image")


def to_plain(timeline: Timeline | None) -> dict[str, Any] | None:
    """A timeline as JSON can hold it."""
    return None if timeline is None else {"kind": kind_of(timeline), **asdict(timeline)}


def ensure_timeline(value: Any) -> Timeline:
    r"""A timeline of what should be one.

    Args:

        value (Any): A timeline, or what :func:`to_plain` made of one.

    Returns:
        SoundTimeline or VideoTimeline: the same.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(value, SoundTimeline | VideoTimeline):
        return value
    try:
        fields = dict(value)
        return _KINDS[fields.pop("kind")](**fields)
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"timeline: expected that of a sound or of a video, got {value!r:.80} ({error}).") from None


def _numbers(values: Sequence[float], name: str) -> tuple[float, ...]:
    found = tuple(values)
    if not all(_is_number(value) and 0 <= value < math.inf for value in found):
        raise ValueError(f"{name}: expected finite numbers not below 0, got {found!r:.80}.")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
