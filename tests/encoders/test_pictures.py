"""Pictures come in upright, in eight bits, whatever holds them; what is no picture is refused and never waited for."""

from __future__ import annotations

import io
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from struct import pack, pack_into, unpack_from
from typing import Any
from zlib import compress, crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import captum_m2ib.encoders.pictures
from captum_m2ib.encoders.pictures import load_picture, load_pictures

LEVELS = np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)
DEEP = np.array([[0, 255, 256, 32_768, 65_535]], dtype=np.uint16)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def encoded(picture: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_are_read_as_the_file_they_come_from(kind: type, tmp_path: Path):
    data = encoded(Image.fromarray(LEVELS), "JPEG", exif=turned())
    (tmp_path / "a.jpg").write_bytes(data)
    expected = np.asarray(load_picture(tmp_path / "a.jpg"))
    assert expected.shape == (36, 24, 3)
    assert np.array_equal(load_picture(kind(data)), expected)
    assert [picture.size for picture in load_pictures(kind(data))] == [(24, 36)]
    assert len(load_pictures([kind(data), tmp_path / "a.jpg"])) == 2


def test_an_opened_picture_is_turned_upright_and_left_open():
    opened = Image.open(io.BytesIO(encoded(Image.fromarray(LEVELS), "PNG", exif=turned())))
    assert load_picture(opened).size == (24, 36)
    assert opened.size == (36, 24) and opened.getpixel((0, 0)) == tuple(LEVELS[0, 0])


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_greys_of_sixteen_bits_keep_their_brightness(kind: str, tmp_path: Path):
    data = encoded(Image.fromarray(DEEP), kind)
    (tmp_path / "a").write_bytes(data)
    for given_picture in (data, tmp_path / "a", Image.open(io.BytesIO(data)), Image.fromarray(DEEP)):
        levels = np.asarray(load_picture(given_picture))
        assert levels.shape == (1, 5, 3) and (levels == levels[:, :, :1]).all()
        assert levels[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_greys_of_sixteen_bits_are_turned_upright():
    picture = load_picture(encoded(Image.fromarray(DEEP), "PNG", exif=turned()))
    assert np.asarray(picture)[:, 0, 0].tolist() == [0, 0, 1, 128, 255]


def test_colours_of_sixteen_bits_lose_only_their_lower_half():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return pack(">I", len(data)) + kind + data + pack(">I", crc32(kind + data))

    line = b"\0" + np.array([[256, 32_767, 65_535]], dtype=">u2").tobytes()
    header = chunk(b"IHDR", pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", compress(line)) + chunk(b"IEND", b"")
    assert np.asarray(load_picture(data)).tolist() == [[[1, 127, 255]]]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_levels_of_unknown_range_are_refused_instead_of_cut_off(mode: str):
    for given_picture in (Image.new(mode, (3, 2), 70_000), encoded(Image.new(mode, (3, 2), 1), "TIFF")):
        with pytest.raises(ValueError, match=rf"^image: the given .* levels of 32 bits.*mode {mode}.*convert it"):
            load_picture(given_picture)


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_picture_are_refused_in_the_same_words_each_time(data: bytes):
    reasons = set()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^images\[1\]: cannot read the given bytes as a picture") as caught:
            load_pictures([LEVELS, data])
        reasons.add(str(caught.value))
    assert len(reasons) == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with a name")
def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, "/dev/zero"):
        with pytest.raises(ValueError, match="is not a file"):
            load_picture(path)


def test_addresses_are_not_fetched():
    with pytest.raises(ValueError, match=r"^image: https://example.org/a.png is an address, and nothing is fetched"):
        load_picture("https://example.org/a.png")


def test_a_path_that_no_file_can_have_is_a_missing_file():
    for path in ("a\0b.png", "a" * 5000, "no such folder/a.png"):
        with pytest.raises(ValueError, match="there is no file"):
            load_picture(path)


@pytest.mark.parametrize("kind", ["bytes", "opened"])
def test_the_size_is_checked_before_anything_is_decoded(kind: str, monkeypatch: pytest.MonkeyPatch):
    data = encoded(Image.fromarray(LEVELS), "PNG")
    given_picture = data if kind == "bytes" else Image.open(io.BytesIO(data))
    monkeypatch.setattr(captum_m2ib.encoders.pictures, "MAXIMUM_PIXELS", 100)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="36 x 24 pixels, more than the 100 allowed"):
        load_picture(given_picture)


@pytest.mark.parametrize("action", ["error", "ignore"])
@pytest.mark.parametrize("allowed", [10, 600])
def test_what_pillow_itself_finds_too_large_is_refused(action: Any, allowed: int, monkeypatch: pytest.MonkeyPatch):
    # Below twice its limit Pillow only warns; whether warnings are errors must make no difference.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", allowed)
    monkeypatch.setattr(captum_m2ib.encoders.pictures, "MAXIMUM_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(ValueError, match=r"^image: the given bytes has .*pixels"):
            load_picture(encoded(Image.fromarray(LEVELS), "PNG"))


def test_another_thread_leaves_the_filters_of_warnings_alone(monkeypatch: pytest.MonkeyPatch):
    inside, outside = threading.Event(), threading.Event()
    really_open = Image.open

    def slowly(*arguments: Any, **options: Any) -> Any:
        inside.set()
        assert outside.wait(60)
        return really_open(*arguments, **options)

    monkeypatch.setattr(Image, "open", slowly)
    before = list(warnings.filters)
    with ThreadPoolExecutor(1) as pool:
        with warnings.catch_warnings(record=True):
            warnings.simplefilter("always")
            reading = pool.submit(load_picture, encoded(Image.fromarray(LEVELS), "PNG"))
            assert inside.wait(60)
        # The other thread is still opening; whatever it puts back must not be what this one had meanwhile.
        outside.set()
        assert reading.result().size == (36, 24)
    assert list(warnings.filters) == before
    with pytest.raises(UserWarning, match="is heard"):
        warnings.warn("is heard", UserWarning, stacklevel=1)


def test_several_threads_read_at_once():
    data = [encoded(Image.fromarray(LEVELS), kind) for kind in FORMATS] * 20
    with ThreadPoolExecutor(4) as pool:
        assert {picture.size for picture in pool.map(load_picture, data)} == {(36, 24)}


INTACT = {
    kind: encoded(Image.fromarray(LEVELS), kind, **({"exif": turned()} if kind != "BMP" else {})) for kind in FORMATS
}


@given(
    kind=st.sampled_from(FORMATS),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=12),
)
@settings(deadline=None, max_examples=300)
def test_damaged_files_are_pictures_or_value_errors(kind: str, cut: float, changes: list[tuple[float, int]]):
    data = bytearray(INTACT[kind])
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        assert load_picture(bytes(data[: len(data) - int(cut * len(data) * (cut < 0.5))])).mode == "RGB"
    except ValueError as error:
        assert str(error).startswith("image: the given bytes") or str(error).startswith("image: cannot read the given")


def test_whatever_a_decoder_stumbles_over_is_a_value_error():
    data = bytearray(INTACT["TIFF"])
    (entries,) = unpack_from("<I", data, 4)
    # Where the strips lie, as a fraction: Pillow raises a TypeError.
    at = next(at for at in range(entries + 2, len(data), 12) if unpack_from("<H", data, at) == (273,))
    pack_into("<HHII", data, at, 273, 5, 1, 8)
    with pytest.raises(ValueError, match=r"^image: cannot read the given bytes as a picture \('IFDRational'"):
        load_picture(bytes(data))
