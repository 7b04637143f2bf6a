"""Checkpoint directories of towers that read sounds and videos: loaded, prepared, scored as the model itself does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_files import (
    CAPTIONS,
    CROPPED,
    FEW,
    PICTURES,
    Checkpoint,
    clip_tokenizer,
    of_zoo,
    processors,
    roberta_tokenizer,
    standardised,
)
from torch import Tensor

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, Sound


def prepares(encoder: DualEncoder, media: Any, given: dict[str, Any]) -> None:
    """The inputs are what the processor makes, which refuses pictures."""
    pairs = encoder.prepare(media, CAPTIONS)
    arguments = dict(zip(encoder.argument_names, (*pairs.inputs, *pairs.additional_forward_args), strict=True))
    for name, values in arguments.items():
        torch.testing.assert_close(values, given[name], check_dtype=False)
    assert len(pairs.timelines) == 3 and not any(timeline.taken for timeline in pairs.timelines)
    with pytest.raises(ValueError, match=r"frames: expected a uint8 array|an array of samples"):
        encoder.prepare(PICTURES[0], CAPTIONS[0])


def agrees(encoder: DualEncoder, given: dict[str, Any], logits: Callable[[Any], Tensor]) -> None:
    """Every pair of what a processor made is scored and explained, in the order of ``argument_names``."""
    arguments = [given[name] for name in encoder.argument_names if name in given]
    count = len(arguments[0])
    rows, columns = torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count)
    own = [rows if index == 0 or name == "is_longer" else columns for index, name in enumerate(encoder.argument_names)]
    with torch.no_grad():
        scores = encoder(*(argument[chosen] for argument, chosen in zip(arguments, own, strict=False)))
        expected = logits(encoder.model(**given))
    torch.testing.assert_close(standardised(scores.view(count, count)), standardised(expected), rtol=0, atol=1e-3)
    inputs, additional = tuple(arguments[:2]), tuple(arguments[2:])
    bits = MultiModalInfoBottleneck(encoder).attribute(inputs, additional_forward_args=additional, **FEW)
    for attribution, given_input in zip(bits, inputs, strict=True):
        assert attribution.shape == given_input.shape and float(attribution.sum()) > 0
    assert not bits[1][given["attention_mask"] == 0].any()


def test_xclip_reads_videos(tmp_path: Path):
    checkpoint = Checkpoint(
        "xclip",
        of_zoo("xclip"),
        clip_tokenizer,
        processors("VideoMAEImageProcessor", "XCLIPProcessor", **CROPPED),
        (),
    )
    encoder = DualEncoder.from_pretrained(checkpoint.save(tmp_path))
    videos = [[np.roll(picture, 9 * frame, 1) for frame in range(4)] for picture in PICTURES]
    given = dict(encoder.processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt"))
    given["pixel_values"] = encoder.processor.image_processor(videos, return_tensors="pt")["pixel_values"]
    assert given["pixel_values"].shape == (3, 4, 3, 32, 32)
    prepares(encoder, videos, given)
    agrees(encoder, given, lambda output: output.logits_per_video)


def test_clap_reads_sounds(tmp_path: Path):
    # One second in steps of 8 samples makes 501 frames of 32 bands.
    settings = {
        "feature_extractor_type": "ClapFeatureExtractor",
        "processor_class": "ClapProcessor",
        "feature_size": 32,
        "sampling_rate": 4000,
        "hop_length": 8,
        "max_length_s": 1,
        "fft_window_size": 512,
        "frequency_max": 2000,
        "truncation": "rand_trunc",
        "padding": "repeatpad",
    }
    checkpoint = Checkpoint("clap", of_zoo("clap"), roberta_tokenizer, settings, ())
    encoder = DualEncoder.from_pretrained(checkpoint.save(tmp_path))
    times = np.linspace(0, 1, 4000)
    sounds = [np.sin(2 * np.pi * pitch * times).astype(np.float32) for pitch in (100, 300, 900)]
    given = dict(encoder.processor.tokenizer(CAPTIONS, padding=True, return_tensors="pt"))
    extracted = encoder.processor.feature_extractor(sounds, sampling_rate=4000, return_tensors="pt")
    given |= {name: torch.as_tensor(value) for name, value in extracted.items()}
    prepares(encoder, [Sound(sound, 4000) for sound in sounds], given)
    agrees(encoder, given, lambda output: output.logits_per_audio)
