"""A folder of everything that pictures and captions can do wrong: every row is there, explained or with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_cases import QUICK, png, rows_of, table_of
from PIL import Image

from captum_m2ib.audit import Worker, run_audit
from captum_m2ib.audit.decode import RowError, cover_of, read_ahead, read_picture, read_region
from captum_m2ib.audit.rows import Row

CAPTION = "a picture with a red circle"
MARKUP = '</script><script>evil()</script><img src=x onerror="evil()"> \x1b[31m\x07\u202e'
PICTURE = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)

EXPLAINED = (
    "good.jpg",
    "wrong_extension.jpg",
    "animated.gif",
    "cmyk.jpg",
    "deep.png",
    "grey_alpha.png",
    "markup.png",
    "rotated.jpg",
)
FAILED = {
    "huge.png": ("image", "too many pixels"),
    "long.png": ("caption", "more than the"),
    "no_caption.png": ("caption", "no caption"),
    "blank_caption.png": ("caption", "empty"),
    "bytes_caption.png": ("caption", "not UTF-8"),
    "text.jpg": ("image", "cannot read"),
    "truncated.jpg": ("image", "cannot read"),
    "zero.png": ("image", "cannot read"),
}


def encoded(picture: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    return buffer.getvalue()


def header_only(width: int, height: int) -> bytes:
    """A PNG that promises a picture of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def write_hostile(folder: Path) -> Path:
    folder.mkdir()
    whole = Image.fromarray(PICTURE)
    jpeg = encoded(whole, "JPEG", quality=95)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [Image.fromarray(np.full((48, 40, 3), level, dtype=np.uint8)) for level in (10, 200)]
    files = {
        "good.jpg": jpeg,
        "wrong_extension.jpg": png(PICTURE),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cmyk.jpg": encoded(whole.convert("CMYK"), "JPEG"),
        "deep.png": encoded(Image.fromarray((np.arange(64 * 64, dtype=np.uint16) * 16).reshape(64, 64)), "PNG"),
        "grey_alpha.png": encoded(whole.convert("LA"), "PNG"),
        "markup.png": png(PICTURE),
        "rotated.jpg": encoded(whole, "JPEG", exif=turned),
        "huge.png": header_only(50_000, 50_000),
        "long.png": png(PICTURE),
        "no_caption.png": png(PICTURE),
        "blank_caption.png": png(PICTURE),
        "bytes_caption.png": png(PICTURE),
        "text.jpg": b"this is no picture\n" * 50,
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "zero.png": b"",
    }
    captions = {
        "markup.png": MARKUP,
        "long.png": "red " * 10_000,
        "no_caption.png": None,
        "blank_caption.png": " \n\t",
        "bytes_caption.png": b"\xff\xfe\x80",
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
        caption = captions.get(name, CAPTION)
        if caption is not None:
            text = caption if isinstance(caption, bytes) else caption.encode()
            (folder / name).with_suffix(".txt").write_bytes(text)
    return folder


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    base = tmp_path_factory.mktemp("hostile")
    run_audit(write_hostile(base / "pairs"), base / "out", model=str(checkpoint), batch_size=4, **QUICK)
    return base / "out"


@pytest.mark.parametrize("decode_workers", [0, 3])
def test_who_decodes_makes_no_difference(decode_workers: int, audited: Path, checkpoint: Path, tmp_path: Path):
    settings: dict[str, Any] = {"model": str(checkpoint), "batch_size": 4, **QUICK}
    run_audit(audited.parent / "pairs", tmp_path / "out", decode_workers=decode_workers, **settings)
    assert table_of(tmp_path / "out").equals(table_of(audited))


def test_every_row_is_there_once(audited: Path):
    rows = rows_of(audited)
    assert sorted(row["id"] for row in rows) == sorted([*EXPLAINED, *FAILED])
    assert [row["row"] for row in rows] == list(range(len(rows)))


def test_the_right_ones_are_explained(audited: Path):
    rows = {row["id"]: row for row in rows_of(audited)}
    for name in EXPLAINED:
        row = rows[name]
        assert row["error"] is None, (name, row["error"])
        assert np.isfinite([row["score"], row["image_bits"], row["text_bits"]]).all()
        assert np.isclose(np.sum(row["map"]), row["image_bits"], rtol=1e-2, atol=1e-6)
        assert len(row["tokens"]) == len(row["token_bits"]) == len(row["special"]) > 2
    assert rows["markup.png"]["caption"] == MARKUP.strip()


@pytest.mark.parametrize("name", FAILED)
def test_the_others_say_why(name: str, audited: Path):
    row = next(row for row in rows_of(audited) if row["id"] == name)
    kind, reason = FAILED[name]
    assert row["error_kind"] == kind and reason in row["error"], row["error"]
    assert row["score"] is None and row["map"] is None and row["tokens"] is None
    assert len(row["error"]) <= 500 and "\n" not in row["error"]


def test_good_rows_are_explained_as_without_the_bad_ones(audited: Path, checkpoint: Path, tmp_path: Path):
    pairs = write_hostile(tmp_path / "pairs")
    alone = Worker(str(checkpoint), **QUICK)
    rows = {row["id"]: row for row in rows_of(audited)}
    for name in EXPLAINED:
        caption = (pairs / name).with_suffix(".txt").read_text().strip()
        found = alone({"image": [str(pairs / name)], "caption": [caption]})
        assert np.isclose(found["score"][0], rows[name]["score"], atol=1e-5)
        assert np.allclose(found["map"][0], np.array(rows[name]["map"]), atol=1e-3 * np.max(rows[name]["map"]))


def test_captions_too_long_can_be_cut(checkpoint: Path):
    worker = Worker(str(checkpoint), cut_captions=True, **QUICK)
    found = worker({"image": [png(PICTURE)], "caption": ["red " * 10_000]})
    assert found["error"] == [None] and "rest is cut" in found["warning"][0]


class TestPictures:
    def test_every_way_in_gives_the_same_picture(self, tmp_path: Path):
        path = tmp_path / "picture.png"
        path.write_bytes(png(PICTURE))
        for given in (str(path), path, path.read_bytes(), PICTURE, Image.fromarray(PICTURE)):
            assert np.array_equal(np.asarray(read_picture(given)), PICTURE)
        for given in ({"bytes": path.read_bytes(), "path": None}, {"bytes": None, "path": str(path)}):
            assert np.array_equal(np.asarray(read_picture(given)), PICTURE)

    def test_errors_do_not_name_files_that_nobody_gave(self):
        with pytest.raises(RowError, match=r"^cannot read the given bytes as a picture"):
            read_picture(b"no picture")

    @pytest.mark.parametrize("missing", [None, "", b"", {"bytes": None, "path": None}])
    def test_no_picture_is_said_to_be_missing(self, missing: Any):
        with pytest.raises(RowError, match="there is no image"):
            read_picture(missing)

    def test_addresses_are_not_fetched(self):
        with pytest.raises(RowError, match="nothing is fetched"):
            read_picture("https://example.org/a.png")


class TestReadAhead:
    def test_what_is_wrong_waits_in_place_of_the_picture(self):
        row = read_ahead(Row(0, "a", image=b"no picture", mask=png(PICTURE)))
        assert isinstance(row.image, RowError) and np.array_equal(np.asarray(row.mask), PICTURE)
        with pytest.raises(RowError, match="no known format") as caught:
            read_picture(row.image)
        assert caught.value.kind == "image"

    def test_a_wrong_mask_is_the_masks_fault(self, checkpoint: Path):
        row = read_ahead(Row(0, "a", image=png(PICTURE), caption=CAPTION, mask=b"no picture"))
        found = Worker(str(checkpoint), **QUICK)({"image": [row.image], "caption": [CAPTION], "mask": [row.mask]})
        assert found["error_kind"] == ["mask"]

    def test_a_row_that_could_not_be_read_stays_as_it_is(self):
        row = Row(0, "a", image="x.png", problem="not a line of JSON")
        assert read_ahead(row) is row

    def test_without_a_mask_there_is_none(self):
        assert read_ahead(Row(0, "a", image=png(PICTURE))).mask is None


class TestRegions:
    def test_boxes_cover_their_share_of_each_patch(self):
        region = read_region((8, 4), [[2, 0, 5, 2]], None)
        assert region is not None
        cover = cover_of(np.asarray(region), (2, 4))
        assert np.allclose(cover, [[0, 1, 0.5, 0], [0, 0, 0, 0]], atol=0.01)

    def test_a_mask_must_be_as_large_as_the_picture(self):
        mask = np.zeros((4, 8), dtype=np.uint8)
        mask[:, :4] = 1
        region = read_region((8, 4), None, png(mask))
        assert region is not None and np.allclose(cover_of(np.asarray(region), (1, 2)), [[1, 0]])
        with pytest.raises(RowError, match="expected 4 x 4 pixels, got 8 x 4"):
            read_region((4, 4), None, png(mask))

    def test_boxes_outside_are_refused(self):
        with pytest.raises(RowError, match="outside"):
            read_region((8, 4), [[9, 0, 12, 2]], None)
