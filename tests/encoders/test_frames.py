"""Videos: read in every form, sampled as the model reads them, and their time kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import zoo
from letters import Letters
from PIL import Image

from captum_m2ib import DualEncoder, Video
from captum_m2ib.encoders.frames import load_video, load_videos
from captum_m2ib.encoders.pictures import load_picture

LATER = pytest.mark.skipif(not hasattr(transformers, "VideoPrismClipModel"), reason="of a later transformers")


def frames(count: int = 9, height: int = 40, width: int = 60) -> np.ndarray:
    """Noise over a grey that tells the frame."""
    noise = np.random.default_rng(0).integers(0, 20, (count, height, width, 3))
    return (noise + 20 * np.arange(count)[:, None, None, None]).astype(np.uint8)


def greys(video: Video) -> list[int]:
    """Which frames these are."""
    return [round((float(np.asarray(load_picture(frame)).mean()) - 10) / 20) for frame in video.frames]


def xclip(reader: Any = None) -> DualEncoder:
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    reader = reader or transformers.CLIPImageProcessor(**sizes)
    return zoo.encoder_of(zoo.model_named("xclip"), processor=(reader, Letters()))


def test_forms_of_one_video_and_of_several(tmp_path: Path):
    given = frames(12)
    for index, frame in enumerate(given):
        Image.fromarray(frame).save(tmp_path / f"frame{index}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    pictures = [Image.fromarray(frame) for frame in given]
    paths = [tmp_path / f"frame{index}.png" for index in range(12)]
    forms = [given, torch.from_numpy(given), list(given), pictures, paths, tmp_path, str(tmp_path), Video(given)]
    for form in forms:
        (found,) = load_videos(form)
        # In the order of numbers: 2 before 10.
        assert greys(found) == list(range(12)) and found.seconds is None
    assert len(load_videos([given, tmp_path])) == 2
    assert len(load_videos(np.stack([given, given]))) == 2


def test_a_gif_says_when_each_frame_begins(tmp_path: Path):
    pictures = [Image.fromarray(frame) for frame in frames(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=[100, 200, 300, 400])
    found = load_video(tmp_path / "a.gif")
    assert greys(found) == [0, 1, 2, 3] and found.seconds == pytest.approx((0.0, 0.1, 0.3, 0.6))
    assert found.rate == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (3, r"videos\[0\]: expected frames|not iterable"),
        ([], "videos: expected at least one"),
        (frames()[..., :1], "frames: expected a uint8 array"),
        (torch.zeros(4, 3, 8, 8), "frames: expected a uint8 array of shape \\(frames, H, W, 3\\), got float32"),
        ("no_such.gif", "there is no file no_such.gif"),
        ("https://example.org/a.gif", "nothing is fetched"),
    ],
)
def test_refused(given: Any, says: str):
    with pytest.raises(ValueError, match=says):
        load_videos(given)


def test_files_that_hold_no_frames(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no pictures; expected one per frame"):
        load_video(tmp_path)
    (tmp_path / "a.mp4").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"cannot read .*a\.mp4 as frames.*ffmpeg"):
        load_video(tmp_path / "a.mp4")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"frames_per_second": 0}, "frames_per_second: expected a number above 0"),
        ({"seconds": [0.0]}, "seconds: expected one per frame, 9, got 1"),
    ],
)
def test_times_must_fit(options: Any, says: str):
    with pytest.raises(ValueError, match=says):
        Video(frames(), **options)


@pytest.mark.parametrize(
    ("there", "taken", "told"),
    [
        (4, (0, 1, 2, 3), ""),
        (9, (0, 3, 5, 8), "4 of 9 frames"),
        (2, (0, 0, 1, 1), "2 of 2 frames, some of them more than once"),
    ],
)
def test_as_many_frames_as_the_model_reads(there: int, taken: tuple[int, ...], told: str):
    given = frames(there)
    pairs = xclip().prepare(Video(given, frames_per_second=2), "a dog")
    (timeline,) = pairs.timelines
    assert timeline.frames == taken and timeline.taken == told
    assert timeline.seconds == tuple(index / 2 for index in taken)
    assert pairs.inputs[0].shape == (1, 4, 3, 32, 32)
    # What is shown is what the model sees: the middle of each frame that was taken.
    assert pairs.pictures[0].shape == (4, 40, 40, 3)
    seen = given[list(taken), :, 10:50].astype(int)
    assert np.abs(pairs.pictures[0] - seen).max() <= 1


@pytest.mark.parametrize("kind", ["CLIPImageProcessor", "VideoMAEImageProcessor"])
def test_the_score_of_xclip_is_the_model_s_own(kind: str):
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    encoder, given = xclip(getattr(transformers, kind)(**sizes)), frames(4)
    pairs = encoder.prepare(given, "a dog")
    read = encoder.processor.transform(list(given), return_tensors="pt")["pixel_values"]
    own = encoder.model(pixel_values=read.reshape(1, 4, 3, 32, 32), **Letters()(["a dog"]))
    expected = own.logits_per_video[0] / encoder.model.logit_scale.exp()
    torch.testing.assert_close(encoder(*pairs.inputs, *pairs.additional_forward_args), expected, atol=1e-5, rtol=1e-5)


@LATER
def test_a_processor_of_videos_samples_as_it_says():
    videos = transformers.PeVideoVideoProcessor(size={"height": 32, "width": 32}, num_frames=3)
    encoder = zoo.encoder_of(zoo.model_named("pe_video"), processor=(videos, Letters()))
    pairs = encoder.prepare([frames(9), frames(2)], "a dog")
    assert [timeline.frames for timeline in pairs.timelines] == [(0, 4, 8), (0, 1)]
    assert pairs.additional_forward_args[1].tolist() == [[True] * 3, [True, True, False]]
    own = videos(videos=[frames(9)], return_tensors="pt", do_sample_frames=True)["pixel_values_videos"]
    torch.testing.assert_close(pairs.inputs[0][:1], own.float())


@LATER
def test_so_many_frames_of_each_second_need_a_rate():
    videos = transformers.LlavaOnevisionVideoProcessor(
        size={"height": 32, "width": 32}, fps=2, do_sample_frames=True, do_convert_rgb=True
    )
    encoder = zoo.encoder_of(zoo.model_named("videoprism"), processor=(videos, Letters()))
    with pytest.raises(ValueError, match=r"reads 2 frames of each second.*frames_per_second"):
        encoder.prepare(frames(8), "a dog")
    (timeline,) = encoder.prepare(Video(frames(8), frames_per_second=4), "a dog").timelines
    assert timeline.frames == (0, 2, 4, 6) and timeline.seconds == (0.0, 0.5, 1.0, 1.5)


def test_frames_of_two_sizes_are_no_video():
    mixed = [Image.new("RGB", (40, 30)), Image.new("RGB", (30, 40))] * 2
    with pytest.raises(ValueError, match=r"videos\[0\]: expected frames of one size, got 30 x 40 and 40 x 30"):
        xclip().prepare(mixed, "a dog")


def test_a_file_of_too_many_pixels_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pictures = [Image.fromarray(frame) for frame in frames(4)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:])
    monkeypatch.setattr("captum_m2ib.encoders.frames._MOST_PIXELS", 4 * 40 * 60 - 1)
    with pytest.raises(ValueError, match="too many pixels to read whole"):
        load_video(tmp_path / "a.gif")


def test_videos_of_two_sizes_are_explained_one_by_one():
    sizes = {"do_resize": False, "do_center_crop": False}
    encoder = xclip(transformers.CLIPImageProcessor(**sizes))
    with pytest.raises(ValueError, match="videos: expected videos of one size in one batch"):
        encoder.prepare([frames(4, 32, 32), frames(4, 32, 40)], "a dog")
