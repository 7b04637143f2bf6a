"""Sounds compared with videos: each of the two has an explanation of its own, and both have one score."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import transformers
import zoo

from captum_m2ib import (
    DualEncoder,
    Explanation,
    MultiModalInfoBottleneck,
    Sound,
    Video,
    compare,
    explain,
    explain_media,
)

pytestmark = pytest.mark.skipif(not hasattr(transformers, "PeAudioVideoModel"), reason="of a later transformers")

RNG = np.random.default_rng(0)
SOUND = Sound(RNG.normal(scale=0.1, size=512).astype(np.float32), 16_000)
CLIP = Video(RNG.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8), frames_per_second=4)
FEW = {"n_steps": 2, "n_samples": 2}


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    extractor = transformers.PeAudioFeatureExtractor(sampling_rate=16_000, hop_length=32)
    frames = transformers.PeVideoVideoProcessor(size={"height": 32, "width": 32}, do_rescale=True)
    processor = SimpleNamespace(feature_extractor=extractor, video_processor=frames)
    return zoo.encoder_of(zoo.model_named("pe_audio_video"), processor=processor)


def test_pairs_are_what_the_processor_makes_of_each(encoder: DualEncoder):
    pairs = encoder.prepare([SOUND, SOUND], CLIP)
    read = encoder.processor.feature_extractor(SOUND.samples, sampling_rate=16_000, return_tensors="pt")
    seen = encoder.processor.video_processor(videos=[CLIP.frames], return_tensors="pt", do_sample_frames=False)
    np.testing.assert_array_equal(pairs.inputs[0][1], read["input_values"][0])
    np.testing.assert_array_equal(pairs.inputs[1][1], seen["pixel_values_videos"][0])
    assert len(pairs) == 2 and pairs.partners[0].shape == (4, 32, 32, 3)
    assert pairs.partner_timelines[1].seconds == CLIP.seconds and pairs.timelines[0].seconds == 512 / 16_000
    chosen = pairs.select(slice(1, 2)).to("cpu")
    assert len(chosen.partners) == len(chosen.partner_timelines) == len(chosen) == len(chosen.inputs[1]) == 1


def test_both_are_explained(encoder: DualEncoder, tmp_path: Path):
    ((heard, seen),) = explain_media(encoder, SOUND, CLIP, **FEW)
    pairs = encoder.prepare(SOUND, CLIP)
    own = float(encoder(*pairs.inputs, *pairs.additional_forward_args).detach())
    assert heard.score == seen.score == pytest.approx(own, rel=1e-4)
    assert (heard.kind, heard.image_bits.shape) == ("sound", (1, 16))
    assert (seen.kind, seen.image_bits.shape, seen.patch_bits.shape) == ("video", (4, 32, 32), (4, 4, 4))
    assert heard.image_total_bits > 0 and seen.image_total_bits == pytest.approx(seen.patch_bits.sum(), rel=1e-4)
    assert [line.split(" map")[0] for line in heard.check_lines] == ["sound", "video"]
    assert [line.split(" map")[0] for line in seen.check_lines] == ["video", "sound"]
    assert heard.check["image"] == seen.check["text"] and heard.record["text"] == seen.record["image"]
    assert "text" not in repr(heard) and heard.top_tokens() == []
    for one in (heard, seen):
        for suffix in (".npz", ".json"):
            again = Explanation.load(one.save(tmp_path / f"one{suffix}"))
            np.testing.assert_array_equal(again.image_bits, one.image_bits)
            assert again.tokens == () and again.timeline == one.timeline and again.check == one.check
        page = one.save(tmp_path / "one.html").read_text(encoding="utf-8")
        assert f"<bdi>{one.kind}, compared with a {one.settings['beside']}</bdi>" in page and "tokens," not in page
        assert one.save(tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")


def test_the_maps_are_the_methods_own(encoder: DualEncoder):
    turned = DualEncoder(encoder.model, modalities=("video", "audio"), processor=encoder.processor)
    for one, given in ((encoder, (SOUND, CLIP)), (turned, (CLIP, SOUND))):
        pairs = one.prepare(*given)
        bits = MultiModalInfoBottleneck(one).attribute(
            pairs.inputs, additional_forward_args=pairs.additional_forward_args, **FEW
        )
        (found,) = explain_media(one, *given, check=False, **FEW)
        for shown, own in zip(found, bits, strict=True):
            # Of a wave by steps of 32 samples, of frames by pixels.
            summed = own[0].unflatten(1, (-1, 32)).sum(2) if shown.kind == "sound" else own[0].sum(1)
            np.testing.assert_allclose(shown.image_bits, summed, rtol=1e-4, atol=1e-6)


def test_sounds_of_several_lengths_are_explained_alone(encoder: DualEncoder):
    short = Sound(SOUND.samples[:384], 16_000)
    found = explain_media(encoder, [SOUND, short], CLIP, check=False, **FEW)
    ((alone, _),) = explain_media(encoder, short, CLIP, check=False, **FEW)
    assert [heard.image_bits.shape for heard, _ in found] == [(1, 16), (1, 12)]
    np.testing.assert_allclose(found[1][0].image_bits, alone.image_bits, rtol=1e-4, atol=1e-5)


def test_refused(encoder: DualEncoder):
    with pytest.raises(ValueError, match=r"^encoder: compares sounds with videos, .*use explain_media"):
        explain(encoder, SOUND, "a dog")
    with pytest.raises(ValueError, match=r"^encoder: compares sounds with videos"):
        compare(encoder, SOUND, "a dog")
    with pytest.raises(
        ValueError, match=r"^encoder: expected one that compares sounds with videos, got image with text"
    ):
        explain_media(zoo.encoder_of(zoo.model_named("siglip")), SOUND, CLIP)
    with pytest.raises(ValueError, match=r"^videos: expected one per sound .* got 2 sounds and 3 videos"):
        encoder.prepare([SOUND] * 2, [CLIP] * 3)
    lacking = DualEncoder(
        encoder.model, processor=SimpleNamespace(feature_extractor=encoder.processor.feature_extractor)
    )
    with pytest.raises(ValueError, match=r"^processor: expected one with what reads video, got SimpleNamespace"):
        lacking.prepare(SOUND, CLIP)
