"""Read sounds, bring them to the sampling rate that a model was trained on, and say where in time its input lies."""

from __future__ import annotations

import io
import math
import os
import wave
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from captum_m2ib.encoders.pictures import checked_path
from captum_m2ib.encoders.timelines import SoundTimeline
from captum_m2ib.encoders.views import View

SoundLike: TypeAlias = "Sound | Mapping[str, Any] | bytes | str | os.PathLike[str]"

# An hour at 48 kHz and as much again; longer ones are refused unread.
_MOST_SAMPLES = 400_000_000
_BYTES = (bytes, bytearray, memoryview)
_LEVELS = {1: ("u1", 128, 128), 2: ("<i2", 0, 1 << 15), 4: ("<i4", 0, 1 << 31)}


@dataclass(frozen=True, eq=False)
class Sound:
    r"""Samples, and how many of them are a second.

    Args:

        samples (numpy.ndarray or Tensor): (samples,), or (channels, samples), whose mean is taken; integers are
            divided by their largest value.
        sampling_rate (int): Samples per second, in Hz. Without it nobody knows how high and how long a sound is.
        taken (str, optional): In words, what has been done to it. Default: ""

    Raises:
        ValueError: for samples that are none, or a rate that is no number above 0.

    Examples::

        >>> Sound(np.zeros((2, 8_000), dtype=np.int16), 16_000).seconds
        0.5
    """

    samples: NDArray[np.float32]
    sampling_rate: int
    taken: str = ""

    def __post_init__(self) -> None:
        rate = self.sampling_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float | np.number) or not 0 < rate < math.inf:
            raise ValueError(f"sampling_rate: expected samples per second, such as 16000, got {rate!r:.80}.")
        if rate != int(rate):
            raise ValueError(f"sampling_rate: expected a whole number of samples per second, got {rate}.")
        given = self.samples.detach().cpu().numpy() if isinstance(self.samples, Tensor) else np.asarray(self.samples)
        if given.dtype.kind not in "iuf" or given.ndim not in (1, 2) or not given.size:
            raise ValueError(
                f"samples: expected numbers of shape (samples,) or (channels, samples), got {given.dtype} of shape "
                f"{given.shape}."
            )
        if given.ndim == 2 and given.shape[0] > given.shape[1]:
            raise ValueError(
                f"samples: expected (channels, samples), got {given.shape}, more channels than samples; transpose them."
            )
        samples, taken = _floats(given), self.taken
        if samples.ndim == 2:
            taken = _joined(taken, f"mean of {len(samples)} channels" if len(samples) > 1 else "")
            samples = samples.mean(0)
        if not np.isfinite(samples).all():
            raise ValueError("samples: expected finite numbers, got NaN or infinity.")
        for name, value in (("samples", samples), ("sampling_rate", int(rate)), ("taken", taken)):
            object.__setattr__(self, name, value)

    @property
    def seconds(self) -> float:
        """How long it is."""
        return len(self.samples) / self.sampling_rate

    def at(self, sampling_rate: int) -> Sound:
        r"""The same sound at another sampling rate.

        Args:

            sampling_rate (int): Samples per second.

        Returns:
            Sound: whose ``taken`` says so; frequencies above half of the lower rate are gone.

        Examples::

            >>> tone = np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000)
            >>> len(Sound(tone, 16_000).at(48_000).samples)
            48000
        """
        if sampling_rate == self.sampling_rate:
            return self
        told = f"resampled from {self.sampling_rate:,} to {sampling_rate:,} Hz"
        return Sound(
            _resampled(self.samples, self.sampling_rate, sampling_rate), sampling_rate, _joined(self.taken, told)
        )

    def first(self, samples: int) -> Sound:
        r"""The beginning of the sound.

        Args:

            samples (int): At most so many.

        Returns:
            Sound: whose ``taken`` says what was left out.
        """
        if len(self.samples) <= samples:
            return self
        told = f"the first {samples / self.sampling_rate:.4g} of {self.seconds:.4g} s"
        return Sound(self.samples[:samples], self.sampling_rate, _joined(self.taken, told))


def load_sound(sound: SoundLike, name: str = "sound") -> Sound:
    r"""Read a sound.

    Args:

        sound (Sound, mapping, bytes or path): A :class:`Sound`; a mapping with ``array`` and ``sampling_rate``, as
            data sets hold sounds; or a WAV file, or what is in one. Other files are read where the package soundfile
            is installed.
        name (str, optional): What errors call it. Default: "sound"

    Returns:
        Sound: in one channel.

    Raises:
        ValueError: if it has no sampling rate, the file is missing or unreadable, or is longer than two hours.
    """
    if isinstance(sound, Sound):
        return sound
    if isinstance(sound, Mapping) and {"array", "sampling_rate"} <= set(sound):
        return Sound(sound["array"], sound["sampling_rate"])
    if isinstance(sound, np.ndarray | Tensor):
        raise ValueError(
            f"{name}: an array of samples does not say how many are a second; pass Sound(array, sampling_rate), the "
            "rate at which it was recorded."
        )
    if isinstance(sound, _BYTES):
        return _read(bytes(sound), name, "the given bytes")
    if isinstance(sound, str | os.PathLike):
        path = checked_path(sound, name, "sound")
        with open(path, "rb") as file:
            return _read(file.read(), name, path)
    raise ValueError(
        f"{name}: expected the path of a WAV file, Sound(array, sampling_rate) or a mapping with array and "
        f"sampling_rate, got {type(sound).__name__}."
    )


def load_sounds(sounds: SoundLike | Iterable[SoundLike]) -> list[Sound]:
    """Read one sound or several, naming in errors which one is at fault."""
    is_one = isinstance(sounds, (Sound, Mapping, str, os.PathLike, Tensor, *_BYTES))
    is_one = is_one or not isinstance(sounds, Iterable) or (isinstance(sounds, np.ndarray) and sounds.dtype != object)
    given: list[Any] = [sounds] if is_one else list(sounds)  # type: ignore[arg-type]
    if not given:
        raise ValueError("sounds: expected at least one sound, got none.")
    return [load_sound(sound, f"sounds[{index}]") for index, sound in enumerate(given)]


def read_sounds(
    extractor: Any, sounds: Sequence[Sound], name: str
) -> tuple[dict[str, Any], list[View], list[SoundTimeline]]:
    r"""Sounds as a model's feature extractor prepares them.

    Args:

        extractor: Of transformers: called with samples and ``sampling_rate``, which it names.
        sounds (sequence of Sound): As they were given.
        name (str): What the model calls its input.

    Returns:
        tuple: the inputs by their names; per sound a picture of what the model hears; and where in time that lies.

    Raises:
        ValueError: if the extractor names no sampling rate, or does not make what the model reads.
    """
    rate = getattr(extractor, "sampling_rate", None)
    if not isinstance(rate, int):
        raise ValueError(
            f"processor: expected a feature extractor with a sampling_rate, got {type(extractor).__name__}; set that "
            "attribute to the rate that the model was trained on."
        )
    # Extractors cut long sounds at random places, of which they say nothing.
    longest = getattr(extractor, "nb_max_samples", None)
    heard = [sound.at(rate) for sound in sounds]
    heard = [sound.first(longest) for sound in heard] if longest else heard
    found = _extracted(extractor, [sound.samples for sound in heard], rate)
    if name not in found:
        raise ValueError(
            f"processor: expected {type(extractor).__name__} to make {name}, got {', '.join(found)}; pass tensors."
        )
    hop = getattr(extractor, "hop_length", None)
    is_wave = found[name].ndim == 3 and found[name].shape[1] == 1
    timelines, shown = [], []
    for values, sound in zip(found[name], heard, strict=True):
        if is_wave:
            whole = math.ceil(len(sound.samples) / (hop or 1)) * (hop or 1)
            timelines.append(SoundTimeline(whole / rate, taken=sound.taken))
            shown.append(View(_wave_picture(sound.samples), None))
            continue
        end = values.shape[-2] * hop / rate if hop else sound.seconds
        timelines.append(_of_spectrogram(extractor, sound, end, values.shape[-1]))
        shown.append(View(_levels(values[0]), None))
    return found, shown, timelines


def _extracted(extractor: Any, waves: list[NDArray[np.float32]], rate: int) -> dict[str, Tensor]:
    """What an extractor makes of sounds: of each alone, as what it makes of several may depend on the others."""
    alone = [dict(extractor(wave, sampling_rate=rate, return_tensors="pt")) for wave in waves]
    if all({k: v.shape for k, v in one.items()} == {k: v.shape for k, v in alone[0].items()} for one in alone):
        return {key: torch.cat([one[key] for one in alone]) for key in alone[0]}
    return dict(extractor(waves, sampling_rate=rate, return_tensors="pt"))


def _of_spectrogram(extractor: Any, sound: Sound, end: float, bins: int) -> SoundTimeline:
    period, told = None, ""
    if sound.seconds < end and str(getattr(extractor, "padding", "")).startswith("repeat"):
        longest = getattr(extractor, "nb_max_samples", 0)
        times = longest // len(sound.samples)
        period = sound.seconds if times > 1 else None
        told = f"heard {times} times to fill {longest / sound.sampling_rate:.4g} s" if times > 1 else ""
    return SoundTimeline(end, _hertz(extractor, bins), period, _joined(sound.taken, told))


def _hertz(extractor: Any, bins: int) -> tuple[float, ...]:
    """The middle of each filter's frequencies, the highest first; none where nobody knows them."""
    is_cut = getattr(extractor, "truncation", None) == "rand_trunc"
    filters = getattr(extractor, "mel_filters_slaney" if is_cut else "mel_filters", None)
    if filters is None or np.shape(filters)[-1] != bins:
        return ()
    weights = np.asarray(filters, dtype=np.float64)
    frequencies = np.linspace(0, extractor.sampling_rate / 2, len(weights))
    total = weights.sum(0)
    # Narrow filters may fall between two frequencies.
    middle = np.where(total > 0, frequencies @ weights / np.where(total > 0, total, 1), np.nan)
    known = np.flatnonzero(~np.isnan(middle))
    return tuple(np.interp(np.arange(bins), known, middle[known]).tolist())[::-1]


def _levels(spectrogram: Tensor) -> NDArray[np.uint8]:
    """A spectrogram, (time, frequency), as a grey picture, high above low."""
    values = spectrogram.double().numpy().T[::-1]
    # Silence lies far below everything that is heard.
    top, bottom = values.max(), max(values.min(), np.percentile(values, 5), values.max() - 80)
    grey = np.clip((values - bottom) / (top - bottom), 0, 1) if top > bottom else np.zeros_like(values)
    return np.repeat(np.rint(255 * grey).astype(np.uint8)[..., None], 3, axis=-1)


def _wave_picture(samples: NDArray[np.float32], size: tuple[int, int] = (96, 720)) -> NDArray[np.uint8]:
    """A wave from its least to its greatest sample, column by column, dark on white."""
    height, width = size
    edges = np.linspace(0, len(samples) - 1, width + 1)
    # Each column reaches to where the next one begins, so that the line has no gaps.
    parts = [samples[int(a) : int(np.ceil(b)) + 1] for a, b in pairwise(edges)]
    top = max(float(np.abs(samples).max()), np.finfo(np.float32).tiny)
    low, high = (np.array([float(edge(part)) for part in parts]) / top for edge in (np.min, np.max))
    rows = np.linspace(1, -1, height)[:, None]
    half = 1 / height
    is_ink = (rows <= high + half) & (rows >= low - half)
    return np.repeat(np.where(is_ink, 70, 255).astype(np.uint8)[..., None], 3, axis=-1)


def _read(data: bytes, name: str, called: str) -> Sound:
    try:
        with wave.open(io.BytesIO(data)) as file:
            if file.getnframes() * file.getnchannels() > _MOST_SAMPLES:
                raise ValueError(f"{name}: {called} is too long to read whole; cut it first.")
            frames = file.readframes(file.getnframes())
            return _decoded(frames, file.getsampwidth(), file.getnchannels(), file.getframerate(), name, called)
    except (wave.Error, EOFError) as error:
        return _by_soundfile(data, name, called, str(error) or "it ends early")


def _decoded(frames: bytes, width: int, channels: int, rate: int, name: str, called: str) -> Sound:
    whole = len(frames) // (width * channels) * width * channels
    if not whole:
        raise ValueError(f"{name}: {called} holds no samples.")
    raw = np.frombuffer(frames[:whole], dtype=np.uint8)
    if width == 3:
        # Three bytes become four whose lowest is empty.
        raw = np.pad(raw.reshape(-1, 3), ((0, 0), (1, 0))).reshape(-1)
    kind, middle, top = _LEVELS[4 if width == 3 else width]
    levels = (raw.view(kind).astype(np.float64) - middle) / top
    return Sound(levels.astype(np.float32).reshape(-1, channels).T, rate)


def _by_soundfile(data: bytes, name: str, called: str, reason: str) -> Sound:
    try:
        import soundfile
    except ImportError:
        raise ValueError(
            f"{name}: cannot read {called} as a WAV file of whole numbers ({reason}); for MP3, FLAC, OGG and other "
            "WAV files install soundfile, or convert it, e.g. ffmpeg -i FILE -c:a pcm_s16le FILE.wav."
        ) from None
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except Exception as error:
        raise ValueError(f"{name}: cannot read {called} as a sound ({error}); expected an intact file.") from error
    return Sound(samples.T, rate)


def _resampled(samples: NDArray[np.float32], before: int, after: int) -> NDArray[np.float32]:
    """Samples at another rate, by their spectrum; the ends are mirrored, so that they do not ring into each other."""
    factor = math.gcd(before, after)
    step, made = before // factor, after // factor
    # A margin of whole steps becomes one of whole samples.
    margin = step * max(round(0.05 * before / step), 1)
    count = round(len(samples) * after / before)
    total = -(-(len(samples) + 2 * margin) // step) * step
    padded = np.pad(samples.astype(np.float64), (margin, total - len(samples) - margin), "symmetric")
    spectrum = np.fft.rfft(padded)
    length = total // step * made
    kept = np.zeros(length // 2 + 1, dtype=complex)
    shared = min(len(kept), len(spectrum))
    kept[:shared] = spectrum[:shared]
    found = np.fft.irfft(kept, length) * (length / total)
    start = margin // step * made
    return found[start : start + max(count, 1)].astype(np.float32)


def _floats(given: NDArray[Any]) -> NDArray[np.float32]:
    """Samples from -1 to 1."""
    if given.dtype.kind == "f":
        return given.astype(np.float32)
    limits = np.iinfo(given.dtype)
    middle = 0 if limits.min < 0 else (limits.max + 1) // 2
    return ((given.astype(np.float64) - middle) / (limits.max + 1 - middle)).astype(np.float32)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
