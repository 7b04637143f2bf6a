"""Audits of sounds and videos: as of pictures, with what a row holds of time, and a report that says what is shown."""

from __future__ import annotations

import io
import json
import re
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_cases import QUICK, rows_of
from commands import runner
from PIL import Image

from captum_m2ib import Sound, explain
from captum_m2ib.audit import Manifest, Worker, run_audit, write_report
from captum_m2ib.audit.decode import read_picture
from captum_m2ib.encoders.timelines import SoundTimeline, VideoTimeline, ensure_timeline
from captum_m2ib.explanations.stills import plane
from captum_m2ib.scenes.events import draw_sound, draw_video, listener, watcher

LISTENER, WATCHER = "captum_m2ib.scenes.events:listener", "captum_m2ib.scenes.events:watcher"
TONES = [{"low": (0.5, 1.0)}, {"high": (2.5, 3.0)}, {"middle": (1.0, 1.5)}]
SQUARES = [{"red": (2, 1, 4)}, {"blue": (4, 5, 0)}]
HEARD = ["a low tone", "a high tone", "a middle tone"]
SEEN = ["a red square", "a blue square"]


def wav(sound: Sound) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((1, 2, sound.sampling_rate, 0, "NONE", ""))
        file.writeframes((sound.samples * 32_767).astype("<i2").tobytes())
    return buffer.getvalue()


def gif(frames: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    first, *others = [Image.fromarray(frame) for frame in frames]
    first.save(buffer, format="GIF", save_all=True, append_images=others, duration=500)
    return buffer.getvalue()


def folder_of_frames(folder: Path, frames: np.ndarray) -> Path:
    folder.mkdir()
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{index}.png")
    return folder


def test_rows_of_sounds_are_those_of_explain():
    sounds = [draw_sound(tones) for tones in TONES]
    found = Worker(LISTENER, contrast=HEARD[0], **QUICK)({"sound": sounds, "caption": HEARD})
    assert found["error"] == [None] * 3 and found["kind"] == ["sound"] * 3
    for index, one in enumerate(explain(listener(), sounds, HEARD, **QUICK)):
        assert found["score"][index] == pytest.approx(one.score, abs=1e-5)
        assert found["image_bits"][index] == pytest.approx(one.image_total_bits, rel=1e-3)
        assert one.patch_bits is not None and one.check is not None
        np.testing.assert_allclose(found["map"][index], one.patch_bits, atol=2e-3 * one.patch_bits.max())
        timeline = ensure_timeline(json.loads(found["timeline"][index]))
        assert timeline == one.timeline and isinstance(timeline, SoundTimeline)
        assert found["image_check"][index] == one.check["image"]["verdict"]
        # A spectrogram of 32 bins, seven rows of pixels each, over 401 columns.
        assert read_picture(found["thumbnail"][index]).size == (128, 72)
    assert found["contrast_similarity"][0] == pytest.approx(1, abs=1e-4) and found["contrast_similarity"][1] < 0.9


def test_rows_of_videos_have_frames_side_by_side():
    videos = [draw_video(squares).frames for squares in SQUARES]
    found = Worker(WATCHER, **QUICK)({"video": videos, "frames_per_second": [None, "2"], "caption": SEEN})
    assert found["error"] == [None] * 2 and found["kind"] == ["video"] * 2
    for index, one in enumerate(explain(watcher(), videos, SEEN, **QUICK)):
        assert one.patch_bits is not None
        expected = plane(one.patch_bits, "video")
        # Six frames of 6 x 6 patches, three in a row.
        assert expected.shape == (12, 18)
        np.testing.assert_allclose(found["map"][index], expected, atol=2e-3 * expected.max())
        frame, row, column = next(iter(SQUARES[index].values()))
        top = np.unravel_index(np.argmax(found["map"][index]), expected.shape)
        assert top == (frame // 3 * 6 + row, frame % 3 * 6 + column)
        shown = np.asarray(read_picture(found["thumbnail"][index]))
        # Brighter in one colour than in the others where the square is.
        step = 128 / 18
        place = shown[int((top[0] + 0.5) * step), int((top[1] + 0.5) * step)].astype(int)
        assert place.max() - np.median(place) > 80
    timelines = [ensure_timeline(json.loads(one)) for one in found["timeline"]]
    assert isinstance(timelines[1], VideoTimeline) and timelines[1].seconds[-1] == 2.5 and timelines[0].seconds == ()


@pytest.mark.parametrize(("model", "name"), [(LISTENER, "sound"), (WATCHER, "video")])
def test_what_a_method_without_patches_says_is_kept_in_cells(model: str, name: str):
    media = [draw_sound(TONES[0])] if name == "sound" else [draw_video(SQUARES[0])]
    captions = [HEARD[0] if name == "sound" else SEEN[0]]
    found = Worker(model, method="nib", check=False, n_steps=2)({name: media, "caption": captions})
    assert found["error"] == [None] and found["unit"] == ["score"]
    expected = explain(
        listener() if name == "sound" else watcher(), media, captions, method="nib", check=False, n_steps=2
    )[0]
    assert np.shape(found["map"][0]) == ((16, 16) if name == "sound" else (32, 48))
    assert found["image_bits"][0] == pytest.approx(expected.image_total_bits, rel=1e-3)


def manifest_of_sounds(folder: Path) -> Path:
    for index, tones in enumerate(TONES):
        (folder / f"{index}.wav").write_bytes(wav(draw_sound(tones).at(12_000)))
    lines = [{"id": f"s{i}", "path": f"{i}.png", "audio": f"{i}.wav", "text": HEARD[i]} for i in range(3)]
    lines += [
        {"id": "gone", "audio": "gone.wav", "text": HEARD[0]},
        {"id": "no sound", "audio": "pairs.jsonl", "text": HEARD[0]},
        {"id": "none", "text": HEARD[0]},
        {"id": "boxed", "audio": "0.wav", "text": HEARD[0], "boxes": [[0, 0, 1, 1]]},
    ]
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sounds")
    summary = run_audit(manifest_of_sounds(folder), folder / "audit", model=LISTENER, decode_workers=2)
    assert summary.errors == {"sound": 3} and summary.kind == "sound"
    return folder / "audit"


def test_a_manifest_of_sounds_becomes_a_table(audited: Path):
    rows = rows_of(audited)
    assert [row["error_kind"] for row in rows] == [None] * 3 + ["sound"] * 3 + [None]
    assert "there is no file" in rows[3]["error"] and "cannot read" in rows[4]["error"]
    assert rows[5]["error"] == "there is no sound"
    assert "boxes and masks lie in pictures, and this is a sound" in rows[6]["warning"]
    taken = [json.loads(row["timeline"])["taken"] for row in rows if row["timeline"]]
    assert set(taken) == {"resampled from 12,000 to 16,000 Hz"}
    for row, tones in zip(rows[:3], TONES, strict=True):
        ((start, end),) = tones.values()
        over_time = np.array(row["map"]).sum(0)
        middles = (np.arange(len(over_time)) + 0.5) * json.loads(row["timeline"])["seconds"] / len(over_time)
        assert over_time[(middles > start - 0.1) & (middles < end + 0.1)].sum() > 0.9 * over_time.sum()


def test_a_report_says_what_its_maps_are_of(audited: Path):
    page = write_report(audited).read_text(encoding="utf-8")
    assert "median bits of the sound" in page and "check of the sound&#39;s map" in page.replace("'", "&#39;")
    assert "time goes from left to right" in page and '"kind":"sound"' in page.replace('": "', '":"')
    assert "resampled from 12,000 to 16,000 Hz" in page
    assert '<th scope="row">sounds</th>' in page and "pictures</th>" not in page


def test_the_command_tells_of_sounds(
    audited: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    # All of it is there already.
    run = runner(capsys, monkeypatch, "audit", audited.parent / "pairs.jsonl", "--model", LISTENER)
    found = run("--output", audited)
    assert found.status == 0 and re.search(r"^sound maps 4 hold", found.out, re.M), (found.out, found.err)
    assert "3 sound" in found.out


def test_videos_come_as_folders_lists_and_files(tmp_path: Path):
    frames = draw_video(SQUARES[0]).frames
    folder_of_frames(tmp_path / "clip", frames)
    (tmp_path / "clip.gif").write_bytes(gif(frames))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "0.png").write_bytes(b"no picture")
    names = [f"clip/{index}.png" for index in range(len(frames))]
    lines: list[dict[str, Any]] = [
        {"video": "clip", "fps": 2},
        {"video": "clip.gif"},
        {"video": names},
        {"video": "bad"},
        {"video": "clip", "fps": -1},
        {"file_name": "clip"},
    ]
    manifest = tmp_path / "pairs.jsonl"
    manifest.write_text("\n".join(json.dumps({**line, "caption": SEEN[0]}) for line in lines))
    run_audit(manifest, tmp_path / "audit", model=WATCHER, **QUICK)
    rows = rows_of(tmp_path / "audit")
    assert [row["error_kind"] for row in rows] == [None, None, None, "video", "video", None]
    assert "frames[0]: cannot read" in rows[3]["error"] and "frames_per_second: expected" in rows[4]["error"]
    assert rows[0]["score"] == rows[2]["score"] == rows[5]["score"]
    assert [json.loads(rows[index]["timeline"])["seconds"][-1:] for index in (0, 1, 2)] == [[2.5], [2.5], []]


def test_a_folder_and_shards_of_sounds(tmp_path: Path):
    import tarfile

    folder, data = tmp_path / "sounds", wav(draw_sound(TONES[0]))
    folder.mkdir()
    (folder / "one.wav").write_bytes(data)
    (folder / "one.txt").write_text(HEARD[0])
    rows = [row for manifest in (Manifest(folder),) for piece in manifest.pieces(9) for row in manifest.rows(piece)]
    assert [(row.id, row.caption) for row in rows] == [("one.wav", HEARD[0])]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, held in (("x.wav", data), ("x.txt", HEARD[0].encode()), ("x.json", b'{"video": "/etc/passwd"}')):
            member = tarfile.TarInfo(name)
            member.size = len(held)
            archive.addfile(member, io.BytesIO(held))
    shard = Manifest(tmp_path / "a.tar")
    (row,) = [row for piece in shard.pieces(9) for row in shard.rows(piece)]
    assert row.sound == data and row.caption == HEARD[0] and row.video is None
    found = Worker(LISTENER, **QUICK)(
        {"image": [rows[0].image, None], "sound": [None, row.sound], "caption": HEARD[:1] * 2}
    )
    assert found["error"] == [None, None] and found["score"][0] == pytest.approx(found["score"][1], abs=1e-6)


def test_halves_are_those_of_pictures():
    with pytest.raises(ValueError, match=r"^halves: are those of pictures, and .* reads video"):
        Worker(WATCHER, halves=True).load()
