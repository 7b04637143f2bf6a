"""Drawn sounds and videos whose events are known in time, and two small models made to know nothing else.

Nothing is trained: the weights of :func:`listener` and :func:`watcher` are written down, so that the one span of
seconds, or the one place in one frame, on which a score rests is known exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.frames import Video
from captum_m2ib.encoders.sounds import Sound
from captum_m2ib.engine.layouts import PatchLayout, TextLayout

if TYPE_CHECKING:
    from PIL.Image import Image

PITCHES = {"low": 600.0, "middle": 1_400.0, "high": 4_500.0}
"""The tones of drawn sounds, in hertz."""

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 60, 220)}
"""The squares of drawn videos."""

SAMPLING_RATE, SECONDS = 16_000, 4
"""What the listener hears."""

FRAMES, SIDE, PATCH = 6, 48, 8
"""What the watcher sees: frames, their height and width, and those of a patch."""

_FILLERS = ("a", "the", "tone", "square", "and", "then")
# One spectrogram column is 10 ms; a patch is eight of them and four mel bins.
_HOP, _BINS, _CELL = 160, 32, (8, 4)
# In decibels: from where on something is heard, and how much more makes it as loud as can be.
_FAINT, _LOUDER = -36.0, 12.0


def draw_sound(events: Mapping[str, tuple[float, float]], *, seconds: float = SECONDS, seed: int = 0) -> Sound:
    r"""A sound: tones in faint noise.

    Args:

        events (mapping): From a name of ``PITCHES`` to when the tone starts and ends, in seconds.
        seconds (float, optional): How long the sound is. Default: 4
        seed (int, optional): Of the noise. Default: 0

    Returns:
        Sound: at 16 kHz.

    Examples::

        >>> draw_sound({"high": (1.0, 1.5)}, seconds=2).seconds
        2.0
    """
    count = round(seconds * SAMPLING_RATE)
    times = np.arange(count) / SAMPLING_RATE
    samples = np.random.default_rng(seed).normal(scale=0.003, size=count)
    for pitch, (start, end) in events.items():
        is_on = (times >= start) & (times < end)
        samples += 0.3 * is_on * np.sin(2 * np.pi * PITCHES[pitch] * times)
    return Sound(samples.astype(np.float32), SAMPLING_RATE)


def draw_video(
    events: Mapping[str, tuple[int, int, int]], *, frames: int = FRAMES, frames_per_second: float = 2.0, seed: int = 0
) -> Video:
    r"""A video: coloured squares on grey frames, each in one frame.

    Args:

        events (mapping): From a name of ``COLOURS`` to the frame, the row and the column of patches, from 0.
        frames (int, optional): How many there are. Default: 6
        frames_per_second (float, optional): Default: 2.0
        seed (int, optional): Of the grey. Default: 0

    Returns:
        Video: of frames of 48 x 48 pixels, 6 x 6 patches.

    Examples::

        >>> draw_video({"red": (2, 0, 5)}).frames.shape
        (6, 48, 48, 3)
    """
    grey = np.random.default_rng(seed).integers(110, 146, (frames, SIDE, SIDE, 1))
    drawn = np.repeat(grey, 3, axis=-1).astype(np.uint8)
    for colour, (frame, row, column) in events.items():
        drawn[frame, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH] = COLOURS[colour]
    return Video(drawn, frames_per_second)


def listener() -> DualEncoder:
    r"""A dual encoder of sounds and captions that knows three pitches by name.

    Returns:
        DualEncoder: over CLAP's feature extractor, so that it reads a log-mel spectrogram of the first four seconds.

    Examples::

        >>> encoder = listener()
        >>> pairs = encoder.prepare(draw_sound({"high": (1.0, 1.5)}), ["a high tone", "a low tone"])
        >>> [round(score, 1) for score in encoder(*pairs.inputs, *pairs.additional_forward_args).tolist()]
        [1.0, 0.1]
    """
    from transformers import ClapFeatureExtractor

    extractor = ClapFeatureExtractor(
        feature_size=_BINS,
        sampling_rate=SAMPLING_RATE,
        hop_length=_HOP,
        max_length_s=SECONDS,
        fft_window_size=512,
        frequency_max=SAMPLING_RATE // 2,
        truncation="rand_trunc",
        padding="pad",
    )
    bands = _BINS // _CELL[1]
    middles = np.asarray(extractor.mel_filters_slaney).argmax(0) * SAMPLING_RATE / extractor.fft_window_size
    nearest = [int(np.abs(middles - pitch).argmin()) // _CELL[1] for pitch in PITCHES.values()]
    head = torch.zeros(len(PITCHES), bands)
    head[range(len(nearest)), nearest] = 1.0
    return _encoder("audio", _Bands(), head, PatchLayout(_CELL), extractor, tuple(PITCHES))


def watcher() -> DualEncoder:
    r"""A dual encoder of videos and captions that knows three colours by name.

    Returns:
        DualEncoder: that reads six frames, taken evenly.

    Examples::

        >>> encoder = watcher()
        >>> pairs = encoder.prepare(draw_video({"red": (2, 0, 5)}), ["a red square", "a blue square"])
        >>> [round(score, 1) for score in encoder(*pairs.inputs, *pairs.additional_forward_args).tolist()]
        [1.0, 0.1]
    """
    layout = PatchLayout((1, PATCH, PATCH), axes=(1, 3, 4))
    return _encoder("video", _Squares(), torch.eye(len(COLOURS)) * 4.0, layout, _Frames(), tuple(COLOURS))


def _encoder(
    modality: str, embed: nn.Module, head: Tensor, layout: PatchLayout, reader: Any, known: Sequence[str]
) -> DualEncoder:
    words = _Words((*known, *_FILLERS))
    table = nn.Embedding(len(words.vocabulary) + 1, len(known))
    with torch.no_grad():
        table.weight.zero_()
        table.weight[1 : len(known) + 1] = torch.eye(len(known))
    towers = _Tower(embed, head, least=0.5), _Tower(table, 2 * torch.eye(len(known)), least=None)
    layouts = (layout, TextLayout(pad_token_id=0))
    encoder = DualEncoder(*towers, modalities=(modality, "text"), layouts=layouts, processor=(reader, words))
    return encoder.eval()


class _Tower(nn.Module):
    """What is found at each place, summed over all of them, beside a constant: with nothing found, nothing matches.

    Of many places, what is below ``least`` does not count, so that noise adds nothing.
    """

    def __init__(self, embed: nn.Module, head: Tensor, least: float | None) -> None:
        super().__init__()
        self.embed, self.least = embed, least
        self.blocks = nn.ModuleList([_Block(head.shape[1])])
        self.register_buffer("head", head)
        self.head: Tensor

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.embed(inputs)
        for block in self.blocks:
            found = block(found)
        counted = found if self.least is None else F.relu(found - self.least)
        known = torch.tanh(counted.sum(1) @ self.head.T)
        return torch.cat([known, known.new_full((len(known), 1), 0.4)], 1)


class _Block(nn.Module):
    """It changes nothing, and is where gates can be set."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        nn.init.eye_(self.linear.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        found: Tensor = self.linear(hidden)
        return found


class _Bands(nn.Module):
    """How loud each patch of a spectrogram is, in the channel of its band."""

    def forward(self, spectrogram: Tensor) -> Tensor:
        loud = (F.avg_pool2d(spectrogram, _CELL)[:, 0] - _FAINT) / _LOUDER
        return torch.diag_embed(loud.clamp(0, 1)).flatten(1, 2)


class _Squares(nn.Module):
    """How red, green and blue each patch of each frame is, grey being none of them."""

    def forward(self, frames: Tensor) -> Tensor:
        means = F.avg_pool3d(frames.transpose(1, 2), (1, PATCH, PATCH))
        return (2.5 * (means - means.mean(1, keepdim=True))).clamp(0, 1).flatten(2).transpose(1, 2)


class _Frames:
    """From a frame to pixels between 0 and 1."""

    num_frames = FRAMES

    def __call__(self, picture: Image) -> Tensor:
        pixels = np.asarray(picture.resize((SIDE, SIDE)), dtype=np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1)


class _Words:
    """A word is a token; others than these are refused."""

    pad_token_id = 0

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.vocabulary = list(vocabulary)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        unknown = {word for caption in captions for word in caption.split()} - set(self.vocabulary)
        if unknown:
            raise ValueError(f"captions: this model knows {', '.join(self.vocabulary)}, not {', '.join(unknown)}.")
        rows = [torch.tensor([self.vocabulary.index(word) + 1 for word in caption.split()]) for caption in captions]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return ["[pad]" if not token else self.vocabulary[token - 1] for token in ids]
