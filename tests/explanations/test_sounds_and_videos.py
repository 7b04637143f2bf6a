"""Explanations of sounds and videos: planted events are found, and are shown, kept and told in seconds."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
import zoo
from commands import Run, assert_one_line, runner
from letters import Letters
from PIL import Image
from test_explanation import assert_equal, make

from captum_m2ib import DualEncoder, Explanation, Sound, Video, compare, explain
from captum_m2ib.encoders.timelines import SoundTimeline, VideoTimeline, ensure_timeline, to_plain
from captum_m2ib.explanations.stills import plane, still
from captum_m2ib.explanations.units import format_bits
from captum_m2ib.scenes.events import PITCHES, draw_sound, draw_video, listener, watcher

TONES = {"low": (0.5, 1.0), "high": (2.5, 3.0)}
SQUARES = {"red": (2, 1, 4), "blue": (4, 5, 0)}


@pytest.fixture(scope="module")
def heard() -> list[Explanation]:
    return explain(listener(), draw_sound(TONES), ["a low tone", "a high tone"])


@pytest.fixture(scope="module")
def seen() -> list[Explanation]:
    return explain(watcher(), draw_video(SQUARES), ["a red square", "a blue square"])


def test_the_span_of_a_tone_is_found(heard: list[Explanation]):
    for one, pitch in zip(heard, ("low", "high"), strict=True):
        assert isinstance(one.timeline, SoundTimeline) and one.kind == "sound"
        start, end = TONES[pitch]
        columns = len(one.time_bits)
        assert one.image_bits.shape == (32, columns) == one.image.shape[:2]
        middles = (np.arange(columns) + 0.5) * one.timeline.seconds / columns
        # A patch is 80 ms long, and maps are drawn smoothly.
        inside = (middles > start - 0.08) & (middles < end + 0.08)
        assert one.time_bits[inside].sum() > 0.9 * one.image_total_bits
        loudest = one.timeline.hertz[int(one.image_bits.sum(1).argmax())]
        assert 0.7 < loudest / PITCHES[pitch] < 1.4
        assert one.check["image"]["verdict"] == "holds" and one.check_lines[0].startswith("sound map holds")
        assert one.top_tokens(1)[0][0] == pitch


def test_the_frame_and_the_place_of_a_square_are_found(seen: list[Explanation]):
    for one, colour in zip(seen, ("red", "blue"), strict=True):
        assert isinstance(one.timeline, VideoTimeline) and one.kind == "video"
        assert one.image_bits.shape == (6, 48, 48) and one.patch_bits.shape == (6, 6, 6)
        assert np.unravel_index(one.patch_bits.argmax(), (6, 6, 6)) == SQUARES[colour]
        assert one.patch_bits.max() > 0.9 * one.image_total_bits
        assert one.time_bits.argmax() == SQUARES[colour][0]
        assert one.timeline.seconds[one.time_bits.argmax()] == SQUARES[colour][0] / 2
        assert one.check_lines[0].startswith("video map holds")


def test_other_events_do_not_move_the_score():
    """The models rest on the named event alone."""
    for encoder, draw, named, other in (
        (listener(), draw_sound, {"high": (1.0, 1.5)}, {"low": (2.0, 2.5)}),
        (watcher(), draw_video, {"red": (2, 1, 4)}, {"blue": (4, 5, 0)}),
    ):
        (name,) = named
        word = "tone" if name in PITCHES else "square"
        pairs = encoder.prepare([draw(named), draw(other), draw({})], f"a {name} {word}")
        there, wrong, none = encoder(*pairs.inputs, *pairs.additional_forward_args).tolist()
        assert there > 0.9 and wrong < 0.2 and none < 0.5


def test_a_sound_at_another_rate_has_the_same_map(heard: list[Explanation]):
    """Of samples that were taken for the model's rate, the tone would lie elsewhere in time and pitch."""
    sound = draw_sound(TONES).at(44_100)
    (one,) = explain(listener(), Sound(sound.samples, 44_100), "a low tone")
    assert "resampled from 44,100 to 16,000 Hz" in one.notes[0]
    assert np.abs(one.time_bits - heard[0].time_bits).max() < 0.1 * heard[0].time_bits.max()


def test_other_methods_have_maps_in_time():
    for encoder, media, caption in (
        (listener(), draw_sound(TONES), "a low tone"),
        (watcher(), draw_video(SQUARES), "a red square"),
    ):
        (one,) = explain(encoder, media, caption, method="nib", check=False)
        assert one.unit == "score" and one.patch_bits is None and np.isfinite(one.image_bits).all()
        most = int(one.time_bits.argmax())
        if one.kind == "sound":
            assert one.image_bits.shape == one.image.shape[:2]
            assert 0.4 < most * one.timeline.seconds / len(one.time_bits) < 1.1
        else:
            assert one.image_bits.shape == (6, 48, 48) and most == 2


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_files_load_back(heard: list[Explanation], seen: list[Explanation], tmp_path: Path, suffix: str):
    for one in (heard[0], seen[0]):
        assert_equal(Explanation.load(one.save(tmp_path / f"one{suffix}")), one)


def test_figures_and_pages(heard: list[Explanation], seen: list[Explanation], tmp_path: Path):
    for one in (heard[1], seen[0]):
        with Image.open(io.BytesIO(one._repr_png_())) as drawn:
            assert drawn.size[0] == 1350 and np.asarray(drawn.convert("L")).std() > 10
        page = one.save(tmp_path / "one.html").read_text(encoding="utf-8")
        assert page.count("data:image/png;base64,") == 1 and f'alt="{one.kind} and its map"' in page
        assert f"{one.kind} {format_bits(one.image_total_bits)} bits" in page
        assert one.kind in repr(one) and len(repr(one)) < 220


def test_axes_are_told_in_words(heard: list[Explanation], seen: list[Explanation]):
    figure = heard[1].plot()
    axes = [one for one in figure.axes if one.get_xlabel() or one.get_ylabel()]
    assert {one.get_xlabel() for one in axes} >= {"seconds"}
    assert "bits per second\nand mel bin" in {one.get_ylabel() for one in axes}
    pitches = {label.get_text() for one in figure.axes for label in one.get_yticklabels()}
    assert {"500 Hz", "1 kHz", "2 kHz", "5 kHz"} <= pitches
    figure = seen[0].plot(style="safe")
    told = {text.get_text() for text in figure.axes[0].texts}
    assert {f"{index / 2:.2f} s" for index in range(6)} <= told
    assert {one.get_ylabel() for one in figure.axes} >= {"bits per pixel"}


@pytest.mark.parametrize("kind", ["heard", "seen"])
def test_nothing_is_drawn_beyond_the_page(kind: str, request: pytest.FixtureRequest):
    figure = request.getfixturevalue(kind)[0].plot()
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        ticks = (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels())
        for text in (*axes.texts, *(ticks if axes.axison else ())):
            if text.get_text() and text.get_visible():
                box = text.get_window_extent(renderer)
                assert box.x0 >= 0 and box.y0 >= 0, text.get_text()
                assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text.get_text()


def test_a_wave_is_shown_over_time_alone():
    timeline = SoundTimeline(0.4, taken="mean of 2 channels")
    one = make(
        timeline=timeline, region=None, image_bits=np.array([[0.0, 3.0, 1.0, 0.0]]), patch_bits=None, unit="bits"
    )
    figure = one.plot()
    (steps,) = [axes for axes in figure.axes if axes.get_ylabel() == "bits per second"]
    # 3 bits in a tenth of a second.
    assert max(patch.get_data().values.max() for patch in steps.patches) == pytest.approx(30.0)
    assert "sound: mean of 2 channels" in one.notes
    assert_equal(Explanation(**{f.name: getattr(one, f.name) for f in dataclasses.fields(one)}), one)


def test_many_frames_take_several_rows():
    def drawn(count: int) -> Any:
        timeline = VideoTimeline(tuple(range(0, 10 * count, 10)))
        image, bits = np.zeros((count, 6, 8, 3), np.uint8), np.ones((count, 6, 8), np.float32)
        return make(image=image, image_bits=bits, patch_bits=None, region=None, timeline=timeline).plot()

    figure = drawn(10)
    assert figure.get_size_inches()[1] > drawn(8).get_size_inches()[1] + 1
    assert "frame 90" in {text.get_text() for text in figure.axes[0].texts}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda one: one.plot(np.zeros((4, 4, 3), np.uint8)), "original: .*this is a sound; leave it out"),
        (lambda one: one.plot(style="contour"), "style: expected heat or safe for a sound"),
        (lambda one: one.bits_over(np.zeros((4, 4, 3), np.uint8)), "original: where the map lies"),
        (lambda one: dataclasses.replace(one, timeline=VideoTimeline((0, 1))), r"image must be uint8 of shape \(2, H"),
        (lambda one: dataclasses.replace(one, timeline={"kind": "smell"}), "timeline: expected that of a sound"),
        (lambda one: dataclasses.replace(one, timeline=None).time_bits, "a picture has no time"),
    ],
)
def test_refused(heard: list[Explanation], call: Any, says: str):
    with pytest.raises(ValueError, match=says):
        call(heard[0])


def test_a_page_is_not_laid_over_a_picture(seen: list[Explanation], tmp_path: Path):
    with pytest.raises(ValueError, match=r"original, interactions: .*this is a video"):
        seen[0].save(tmp_path / "one.html", np.zeros((4, 4, 3), np.uint8))


def test_methods_and_captions_are_compared_on_a_sound_and_on_a_video(tmp_path: Path):
    clip, sound = draw_video(SQUARES), draw_sound(TONES)
    fewer = {"m2ib": {"n_steps": 2}, "nib": {"n_steps": 2}}
    seen = compare(watcher(), clip, ["a red square", "a blue square"], ["m2ib", "nib"], settings=fewer, check=False)
    heard = compare(listener(), sound, "a low tone", ["m2ib"], n_steps=2, check=False)
    for found, kind, maps in ((seen, "video", 4), (heard, "sound", 1)):
        assert {one.kind for row in found.rows for one in row.explanations} == {kind}
        page = found.save(tmp_path / f"{kind}.html").read_text(encoding="utf-8")
        assert page.count("<img ") == maps
        assert found.save(tmp_path / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"^image: expected a single picture, sound or video, got 2"):
        compare(watcher(), [clip, clip], "a red square")


def test_stills_are_frames_in_rows_and_spectrograms_that_can_be_seen(seen: list[Explanation]):
    frames = plane(seen[0].image, "video")
    high, wide = seen[0].image.shape[1:3]
    assert frames.shape == (2 * high, 3 * wide, 3)
    np.testing.assert_array_equal(frames[high:, wide : 2 * wide], seen[0].image[4])
    assert still(seen[0]).shape[1] == 720 and plane(np.zeros((4, 40)), "sound").shape == (20, 40)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"seconds": 0.0}, "seconds: expected a number of seconds above 0"),
        ({"seconds": 1.0, "period": float("nan")}, "period: expected"),
        ({"seconds": 1.0, "hertz": (float("inf"),)}, "hertz: expected finite"),
    ],
)
def test_timelines_of_sounds(fields: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        SoundTimeline(**fields)
    good = SoundTimeline(2.0, (3.0, 1.0), 0.5, "cut")
    assert ensure_timeline(json.loads(json.dumps(to_plain(good)))) == good


class TestCommand:
    @pytest.fixture
    def run(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
        monkeypatch.chdir(tmp_path)
        return runner(capsys, monkeypatch, "explain", "--steps", "2", "--samples", "2")

    def test_a_sound(self, run: Run, tmp_path: Path):
        sound = draw_sound(TONES).at(8_000)
        with wave.open("tones.wav", "wb") as file:
            file.setparams((1, 2, 8_000, 0, "NONE", ""))
            file.writeframes((sound.samples * 32_767).astype("<i2").tobytes())
        model = ("--model", "captum_m2ib.scenes.events:listener", "--output", "sound.npz")
        found = run("--sound", "tones.wav", "a low tone", *model)
        assert found.status == 0, found.err
        assert re.search(r"^taken    resampled from 8,000 to 16,000 Hz$", found.out, re.M)
        assert re.search(r"^sound    [\d.]+ bits$", found.out, re.M)
        assert Explanation.load("sound.npz").kind == "sound"
        found = run("--sound", "tones.wav", "a low tone", "a high tone", *model[:2], "--output", "both.html")
        assert found.status == 0 and (tmp_path / "both.html").read_text(encoding="utf-8").count("<img ") == 2, found.err

    def test_frames(self, run: Run, tmp_path: Path):
        frames = [Image.fromarray(frame) for frame in draw_video(SQUARES, frames=12).frames]
        (tmp_path / "frames").mkdir()
        for index, frame in enumerate(frames):
            frame.save(tmp_path / "frames" / f"{index}.png")
        model = ("--model", "captum_m2ib.scenes.events:watcher", "--output", "video.npz")
        found = run("--frames", "frames", "--frames-per-second", "4", "a red square", *model)
        assert found.status == 0, found.err
        assert re.search(r"^taken    6 of 12 frames$", found.out, re.M)
        assert Explanation.load("video.npz").timeline.seconds[-1] == 11 / 4

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("--sound", "a.wav"), "TEXT: expected a caption"),
            (("--sound", "a.wav", "--frames", "b", "a"), "--sound, --frames: expected one"),
            (("--frames-per-second", "2"), "--frames-per-second: is for --frames"),
            (("--sound", "a.wav", "a", "--whole"), "--sound: no --whole"),
            (("--sound", "a.wav", "a"), "--sound: there is no file a.wav"),
            (("--frames", "a.gif", "a"), "--frames: there is no file a.gif"),
        ],
    )
    def test_refused(self, run: Run, arguments: tuple[str, ...], says: str):
        assert_one_line(run(*arguments), says)


@pytest.mark.skipif(not hasattr(transformers, "PeVideoModel"), reason="of a later transformers")
def test_frames_of_padding_take_no_part():
    reader = transformers.PeVideoVideoProcessor(size={"height": 32, "width": 32}, do_rescale=True)
    encoder: DualEncoder = zoo.encoder_of(zoo.model_named("pe_video"), processor=(reader, Letters()))
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    found = explain(encoder, [frames, Video(frames[:2], 5)], "a dog", n_steps=1, n_samples=1, check=False)
    assert [one.image_bits.shape for one in found] == [(4, 32, 32), (2, 32, 32)]
    assert found[1].timeline.seconds == (0.0, 0.2)
    alone = encoder.prepare(frames[:2], "a dog")
    score = float(encoder(*alone.inputs, *alone.additional_forward_args).detach())
    assert found[1].score == pytest.approx(score, abs=1e-4)
