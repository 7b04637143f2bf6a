"""Sounds: read with their sampling rate, brought to the model's, and their time kept."""

from __future__ import annotations

import io
import struct
import sys
import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zoo
from letters import Letters
from tiny_parts import LEGACY

from captum_m2ib import DualEncoder, Sound, explain
from captum_m2ib.encoders.sounds import load_sound, load_sounds

RATE = 16_000


def tone(hertz: float, rate: int, seconds: float = 0.5, amplitude: float = 0.5) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def wav(samples: np.ndarray, rate: int, width: int = 2) -> bytes:
    """A WAV file of samples, (channels, samples), from -1 to 1."""
    top = 2.0 ** (8 * width - 1)
    levels = np.clip(np.rint(np.atleast_2d(samples) * top), -top, top - 1).astype(np.int64).T.reshape(-1)
    levels = levels + 128 if width == 1 else levels
    data = b"".join(int(level).to_bytes(width, "little", signed=width > 1) for level in levels)
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(np.atleast_2d(samples)))
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(data)
    return buffer.getvalue()


@pytest.mark.parametrize(("width", "off"), [(1, 1 / 128), (2, 2**-15), (3, 2**-23), (4, 2**-23)])
def test_wav_files_of_every_width(tmp_path: Path, width: int, off: float):
    samples = tone(440, 8_000, 0.05)
    path = tmp_path / "tone.wav"
    path.write_bytes(wav(samples, 8_000, width))
    found = load_sound(path)
    assert found.sampling_rate == 8_000 and found.samples.dtype == np.float32 and found.taken == ""
    np.testing.assert_allclose(found.samples, samples, atol=off)
    np.testing.assert_array_equal(load_sound(path.read_bytes()).samples, found.samples)


def test_channels_become_their_mean_and_that_is_said():
    both = np.stack([tone(440, 8_000), np.zeros(4_000)])
    found = load_sound(wav(both, 8_000))
    np.testing.assert_allclose(found.samples, both[0] / 2, atol=2**-14)
    assert found.taken == "mean of 2 channels"
    assert Sound(both[:1], 8_000).taken == ""


@pytest.mark.parametrize(("before", "after"), [(8_000, 16_000), (44_100, 16_000), (16_000, 48_000), (22_050, 48_000)])
def test_a_tone_keeps_its_pitch_at_another_rate(before: int, after: int):
    found = Sound(tone(440, before), before).at(after)
    assert found.sampling_rate == after and found.taken == f"resampled from {before:,} to {after:,} Hz"
    expected = tone(440, after)
    assert abs(len(found.samples) - len(expected)) <= 1
    # The ends are mirrored, which no tone is.
    inner = slice(after // 50, -after // 50)
    np.testing.assert_allclose(found.samples[: len(expected)][inner], expected[inner], atol=2e-3)


def test_what_the_lower_rate_cannot_hold_is_gone():
    found = Sound(tone(7_000, 48_000), 48_000).at(8_000)
    assert float(np.abs(found.samples[400:-400]).max()) < 1e-3


def test_the_same_rate_changes_nothing():
    sound = Sound(tone(440, RATE), RATE)
    assert sound.at(RATE) is sound and sound.first(10**6) is sound


def test_forms_of_one_sound_and_of_several():
    samples = tone(440, RATE)
    held = {"array": samples, "sampling_rate": RATE, "path": None}
    for one in (Sound(samples, RATE), held, Sound(torch.from_numpy(samples), RATE)):
        (found,) = load_sounds(one)
        np.testing.assert_allclose(found.samples, samples, atol=1e-7)
    assert len(load_sounds([held, wav(samples, RATE)])) == 2


REFUSED: dict[str, tuple[Any, str]] = {
    "array": (np.zeros(10), r"sounds\[0\]: an array of samples does not say how many are a second"),
    "tensor": (torch.zeros(10), "pass Sound\\(array, sampling_rate\\)"),
    "none": ([], "sounds: expected at least one"),
    "number": ([3], r"sounds\[0\]: expected the path of a WAV file.*got int"),
    "address": ("https://example.org/a.wav", "nothing is fetched"),
    "missing": ("no_such.wav", "there is no file no_such.wav"),
    "mp3": (b"ID3\x03" + bytes(200), "install soundfile, or convert it"),
    "no samples": (wav(np.zeros(0), RATE), "holds no samples"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    given, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        load_sounds(given)


@pytest.mark.parametrize(
    ("samples", "rate", "says"),
    [
        (np.zeros(4), 0, "sampling_rate: expected samples per second"),
        (np.zeros(4), 1.5, "a whole number"),
        (np.zeros(4), None, "sampling_rate"),
        (np.zeros((4, 2)), RATE, "more channels than samples; transpose"),
        (np.zeros((1, 2, 3)), RATE, "samples: expected numbers of shape"),
        (np.array(["a"]), RATE, "samples: expected numbers"),
        (np.array([0, np.nan]), RATE, "NaN"),
    ],
)
def test_no_sound(samples: Any, rate: Any, says: str):
    with pytest.raises(ValueError, match=says):
        Sound(samples, rate)


def test_floats_in_a_wav_file_are_left_to_soundfile(monkeypatch: pytest.MonkeyPatch):
    """The standard library reads whole numbers only; where soundfile is there, it reads the rest."""
    data = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 44, b"WAVE", b"fmt ", 16, 3, 1, 8, 32, 4, 32, b"data", 8)
    data += struct.pack("<2f", 0.25, -0.5)
    read = SimpleNamespace(read=lambda file, dtype, always_2d: (np.array([[0.25], [-0.5]], np.float32), 8))
    monkeypatch.setitem(sys.modules, "soundfile", read)
    assert load_sound(data).samples.tolist() == [0.25, -0.5]


def clap(**options: Any) -> DualEncoder:
    from transformers import ClapFeatureExtractor

    given = {"feature_size": 32, "sampling_rate": RATE, "hop_length": 128, "max_length_s": 4, "fft_window_size": 512}
    extractor = ClapFeatureExtractor(**{**given, "frequency_max": 8_000, "truncation": "rand_trunc", **options})
    name = "clap_fused" if options.get("truncation") == "fusion" else "clap"
    return zoo.encoder_of(zoo.model_named(name), processor=(extractor, Letters()))


def test_the_score_of_clap_is_the_model_s_own():
    encoder, sound = clap(), Sound(tone(440, RATE, 1.0), RATE)
    pairs = encoder.prepare(sound, ["a dog", "a bell"])
    read = encoder.processor.transform(sound.samples, sampling_rate=RATE, return_tensors="pt")
    text = Letters()(["a dog", "a bell"])
    own = encoder.model(input_features=read["input_features"].repeat(2, 1, 1, 1), **text)
    expected = torch.cosine_similarity(own.audio_embeds, own.text_embeds)
    torch.testing.assert_close(encoder(*pairs.inputs, *pairs.additional_forward_args), expected, atol=1e-5, rtol=1e-5)


def test_a_sound_at_another_rate_scores_as_at_the_model_s():
    encoder = clap()
    low, right = Sound(tone(440, 8_000, 4.0), 8_000), Sound(tone(440, RATE, 4.0), RATE)
    pairs = encoder.prepare([low, right], "a dog")
    assert [timeline.taken for timeline in pairs.timelines] == ["resampled from 8,000 to 16,000 Hz", ""]
    inner = slice(20, -20)
    # In decibels; above 4 kHz the first holds nothing.
    apart = (pairs.inputs[0][0] - pairs.inputs[0][1])[0, inner, :8]
    assert float(apart.abs().max()) < 1.0


@pytest.mark.parametrize("truncation", ["rand_trunc", "fusion"])
def test_of_a_long_sound_the_beginning_is_taken(truncation: str):
    """Feature extractors cut long sounds at random, and say nothing of where."""
    encoder = clap(truncation=truncation)
    samples = np.concatenate([tone(440, RATE, 4.0), tone(3_000, RATE, 2.0)])
    pairs = encoder.prepare([Sound(samples, RATE), Sound(samples[: 4 * RATE], RATE)], "a dog")
    assert torch.equal(pairs.inputs[0][0], pairs.inputs[0][1])
    first, second = pairs.timelines
    assert first.taken == "the first 4 of 6 s" and second.taken == ""
    assert first.seconds == pytest.approx(4.008) and first.period is None


def test_a_short_sound_that_is_repeated_says_so():
    (timeline,) = clap().prepare(Sound(tone(440, RATE, 1.5), RATE), "a dog").timelines
    assert timeline.taken == "heard 2 times to fill 4 s" and timeline.period == 1.5


def test_rows_are_told_in_hertz():
    """The loudest row of a tone's spectrogram is the one whose frequency is nearest."""
    encoder = clap()
    for hertz in (440.0, 1_500.0, 4_000.0):
        pairs = encoder.prepare(Sound(tone(hertz, RATE, 4.0), RATE), "a dog")
        row = int(pairs.pictures[0][:, 200:300, 0].astype(int).sum(1).argmax())
        nearest = int(np.abs(np.array(pairs.timelines[0].hertz) - hertz).argmin())
        assert abs(row - nearest) <= 1
    assert list(pairs.timelines[0].hertz) == sorted(pairs.timelines[0].hertz, reverse=True)


@pytest.mark.skipif(not hasattr(transformers, "PeAudioModel"), reason="of a later transformers")
def test_waves_of_several_lengths_come_with_a_mask():
    extractor = transformers.PeAudioFeatureExtractor(sampling_rate=RATE, hop_length=32)
    encoder = zoo.encoder_of(zoo.model_named("pe_audio"), processor=(extractor, Letters()))
    sounds = [Sound(tone(440, RATE, 0.05), RATE), Sound(tone(900, RATE, 0.031), RATE)]
    pairs = encoder.prepare(sounds, "a dog")
    assert pairs.inputs[0].shape == (2, 1, 800) and pairs.additional_forward_args[1].sum(1).tolist() == [800, 512]
    assert [timeline.seconds for timeline in pairs.timelines] == [0.05, 0.032]
    # Its convolutions read the padding behind a short sound, so that its score depends on what it is padded to.
    assert encoder.holds_sizes(pairs) and not encoder.holds_sizes(encoder.prepare(sounds[1], "a dog"))
    found = explain(encoder, sounds, "a dog", n_steps=1, n_samples=1, check=False)
    alone = [encoder.prepare(sound, "a dog") for sound in sounds]
    expected = torch.cat([encoder(*one.inputs, *one.additional_forward_args) for one in alone])
    assert [one.score for one in found] == pytest.approx(expected.tolist(), abs=1e-4)
    assert [one.image_bits.shape for one in found] == [(1, 25), (1, 16)]


def test_what_has_no_rate_is_no_reader_of_sounds():
    encoder = zoo.encoder_of(zoo.model_named("clap"), processor=(lambda samples: samples, Letters()))
    with pytest.raises(ValueError, match="processor: expected a feature extractor with a sampling_rate, got function"):
        encoder.prepare(Sound(np.zeros(100), RATE), "a dog")


@pytest.mark.skipif(LEGACY, reason="passes of this transformers' CLVP cannot be followed")
def test_sounds_as_codes_are_tensors():
    encoder = zoo.encoder_of(zoo.model_named("clvp"), processor=(lambda samples: samples, Letters()))
    with pytest.raises(ValueError, match="this one compares sounds as codes with text; make tensors"):
        encoder.prepare(Sound(np.zeros(100), RATE), "a dog")


def test_numbers_of_sounds_and_captions_must_fit():
    with pytest.raises(ValueError, match="expected one per sound or a single one for all, got 2 sounds and 3 captions"):
        clap().prepare([Sound(tone(440, RATE), RATE)] * 2, ["a", "b", "c"])
