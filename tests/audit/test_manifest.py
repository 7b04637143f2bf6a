"""Every format gives the same rows, from any piece on, and what cannot be read becomes a row that says so."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from audit_cases import png
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from captum_m2ib.audit import Manifest
from captum_m2ib.audit.rows import even_runs, read_boxes, runs

COUNT = 23
PICTURES = [png(np.full((4, 5, 3), index, dtype=np.uint8)) for index in range(COUNT)]
CAPTIONS = [f"caption {index}, “quoted”\tand\nbroken ☃" for index in range(COUNT)]


def records(folder: Path) -> list[dict[str, Any]]:
    for index, data in enumerate(PICTURES):
        (folder / f"{index:02}.png").write_bytes(data)
    return [{"key": f"k{i}", "image": f"{i:02}.png", "text": caption} for i, caption in enumerate(CAPTIONS)]


def as_delimited(folder: Path, delimiter: str, ending: str) -> Path:
    path = folder / f"pairs{ending}"
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ("key", "image", "text"), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records(folder))
    return path


def as_json_lines(folder: Path) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in records(folder)), "utf-8")
    return path


def as_parquet(folder: Path) -> Path:
    parquet.write_table(pa.Table.from_pylist(records(folder)), folder / "pairs.parquet", row_group_size=5)
    return folder / "pairs.parquet"


def as_parquet_folder(folder: Path) -> Path:
    table = pa.Table.from_pylist([{**record, "image": "../" + record["image"]} for record in records(folder)])
    (folder / "parts").mkdir()
    for index, first in enumerate(range(0, COUNT, 9)):
        parquet.write_table(table.slice(first, 9), folder / "parts" / f"part-{index}.parquet")
    return folder / "parts"


def as_data_set(folder: Path) -> Path:
    """As ``datasets.Dataset.save_to_disk`` lays it out, pictures as bytes."""
    rows = [{"key": f"k{i}", "image": {"bytes": PICTURES[i], "path": None}, "text": CAPTIONS[i]} for i in range(COUNT)]
    saved = folder / "saved"
    saved.mkdir()
    for index, first in enumerate((0, 12)):
        table = pa.Table.from_pylist(rows[first : first + 12])
        with pa.ipc.new_stream(saved / f"data-{index:05}-of-00002.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    (saved / "state.json").write_text("{}")
    (saved / "dataset_info.json").write_text("{}")
    return saved


def as_tars(folder: Path) -> Path:
    shards = folder / "shards"
    shards.mkdir()
    for index, first in enumerate((0, 12)):
        with tarfile.open(shards / f"{index:03}.tar", "w") as archive:
            for row in range(first, min(first + 12, COUNT)):
                for ending, data in (("png", PICTURES[row]), ("txt", CAPTIONS[row].encode())):
                    member = tarfile.TarInfo(f"k{row}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return shards


def as_folder(folder: Path) -> Path:
    pictures = folder / "pictures" / "deep"
    pictures.mkdir(parents=True)
    for index in range(COUNT):
        (pictures / f"{index:02}.png").write_bytes(PICTURES[index])
        (pictures / f"{index:02}.txt").write_text(CAPTIONS[index], "utf-8")
    return folder / "pictures"


FORMATS: dict[str, Callable[[Path], Path]] = {
    "csv": lambda folder: as_delimited(folder, ",", ".csv"),
    "tsv": lambda folder: as_delimited(folder, "\t", ".tsv"),
    "jsonl": as_json_lines,
    "parquet": as_parquet,
    "parquet folder": as_parquet_folder,
    "data set": as_data_set,
    "webdataset": as_tars,
    "folder": as_folder,
}


def data_of(image: Any) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_every_format_gives_every_row_once(name: str, size: int, tmp_path: Path):
    manifest = Manifest(FORMATS[name](tmp_path))
    pieces = list(manifest.pieces(size))
    rows = [row for piece in pieces for row in manifest.rows(piece)]
    assert [row.row for row in rows] == list(range(COUNT))
    assert [row.caption for row in rows] == CAPTIONS
    assert [data_of(row.image) for row in rows] == PICTURES
    assert len({row.id for row in rows}) == COUNT and all(row.problem is None for row in rows)
    assert all(piece.rows <= size for piece in pieces)
    if name not in ("folder", "webdataset"):
        assert rows[3].id == "k3"


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_can_be_read_alone_and_in_any_order(name: str, tmp_path: Path):
    path = FORMATS[name](tmp_path)
    manifest = Manifest(path)
    pieces = list(manifest.pieces(4))
    expected = [list(manifest.rows(piece)) for piece in pieces]
    for index in reversed(range(len(pieces))):
        assert list(manifest.rows(pieces[index])) == expected[index]
        assert list(Manifest(path).rows(pieces[index])) == expected[index]


def changed_at(values: list[Any], index: int, value: Any) -> list[Any]:
    return [*values[:index], value, *values[index + 1 :]]


@pytest.mark.parametrize("name", FORMATS)
def test_a_fingerprint_is_the_contents_own(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fingerprint(folder: str) -> str:
        (tmp_path / folder).mkdir()
        return Manifest(FORMATS[name](tmp_path / folder)).fingerprint()

    before = fingerprint("before")
    assert fingerprint("copy") == before
    # As long as before, and in the middle.
    monkeypatch.setitem(globals(), "CAPTIONS", changed_at(CAPTIONS, 11, CAPTIONS[11].replace("quoted", "quotes")))
    changed = fingerprint("changed")
    monkeypatch.setitem(globals(), "CAPTIONS", changed_at(CAPTIONS, 12, CAPTIONS[12] + "?"))
    assert len({before, changed, fingerprint("longer")}) == 3


@pytest.mark.parametrize("name", ["data set", "webdataset"])
def test_a_picture_held_by_the_manifest_counts_by_its_size(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found, picture = [], PICTURES[5]
    for folder, data in (("a", picture), ("b", picture[:-1] + b"x"), ("c", picture + b"x")):
        monkeypatch.setitem(globals(), "PICTURES", changed_at(PICTURES, 5, data))
        (tmp_path / folder).mkdir()
        found.append(Manifest(FORMATS[name](tmp_path / folder)).fingerprint())
    assert found[0] == found[1] != found[2]


def test_of_parquet_every_page_of_text_counts_and_no_picture_is_read(tmp_path: Path):
    rows = [{"id": f"k{i}", "image": {"bytes": PICTURES[i], "path": None}, "text": CAPTIONS[i]} for i in range(COUNT)]
    # No statistics that would give the change away.
    layout: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    found = []
    for name, caption, picture in (
        ("a", CAPTIONS[11], PICTURES[5]),
        ("b", CAPTIONS[11], PICTURES[5][:-1] + b"x"),
        ("c", CAPTIONS[11].replace("quoted", "quotes"), PICTURES[5]),
        ("d", CAPTIONS[11], PICTURES[5] + b"x"),
    ):
        rows[11]["text"], rows[5]["image"] = caption, {"bytes": picture, "path": None}
        path = tmp_path / name / "pairs.parquet"
        path.parent.mkdir()
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=5, **layout)
        found.append(Manifest(path).fingerprint())
    assert found[0] == found[1] and len(set(found)) == 3


def test_a_column_that_is_not_read_does_not_count(tmp_path: Path):
    found = []
    for other in ("x", "y"):
        path = tmp_path / other / "pairs.parquet"
        path.parent.mkdir()
        rows = [{"image": "a.png", "said": "hello", "notes": other, "text": other}]
        parquet.write_table(pa.Table.from_pylist(rows), path)
        found.append([Manifest(path, columns).fingerprint() for columns in ({"caption": "said"}, {"caption": "notes"})])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


def test_parquet_is_read_on_from_where_the_last_piece_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parquet.write_table(pa.Table.from_pylist(records(tmp_path)), tmp_path / "pairs.parquet")
    manifest = Manifest(tmp_path / "pairs.parquet")
    opened = []
    begin = manifest.source._records  # type: ignore[attr-defined]
    monkeypatch.setattr(manifest.source, "_records", lambda *place: opened.append(place) or begin(*place))
    assert [row.row for piece in manifest.pieces(4) for row in manifest.rows(piece)] == list(range(COUNT))
    assert len(opened) == 1


def test_lines_that_cannot_be_read_become_rows_with_a_reason(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(
        b'{"image": "a.png", "caption": "a"}\n'
        b"not json\n"
        b"[1, 2]\n" + b"[" * 100_000 + b"\n"
        b'{"image": "a.png"}\n'
        b'{"image": "a.png", "caption": "\xff\xfe"}\n'
        b'{"image": "a.png", "caption": "b", "boxes": [[0, 0, 0, 5]]}\n'
        b'{"image": "a.png", "caption": "c"'
    )
    manifest = Manifest(path)
    (piece,) = manifest.pieces(100)
    rows = list(manifest.rows(piece))
    assert [row.row for row in rows] == list(range(8))
    assert [row.problem is None for row in rows] == [True, False, False, False, True, True, False, False]
    assert "not a line of JSON" in str(rows[1].problem) and "list" in str(rows[2].problem)
    assert "x0 < x1" in str(rows[6].problem)
    assert rows[4].caption is None


def test_a_field_without_its_closing_quote_does_not_end_the_table(tmp_path: Path):
    path = tmp_path / "pairs.csv"
    good = "".join(f"a.png,caption {index}\n" for index in range(20_000))
    path.write_text('image,caption\na.png,first\na.png,"never closed\n' + good)
    manifest = Manifest(path)
    pieces = list(manifest.pieces(500))
    rows = [row for piece in pieces for row in manifest.rows(piece)]
    assert sum(piece.rows for piece in pieces) == len(rows)
    assert rows[0].caption == "first" and rows[-1].caption == "caption 19999"
    assert any(row.problem and "field" in row.problem for row in rows)


def test_a_damaged_tar_keeps_what_is_before_the_damage(tmp_path: Path):
    shards = as_tars(tmp_path)
    damaged = (shards / "000.tar").read_bytes()
    (shards / "000.tar").write_bytes(damaged[: 512 * 4 * 5 + 700])
    manifest = Manifest(shards)
    rows = [row for piece in manifest.pieces(3) for row in manifest.rows(piece)]
    assert [row.row for row in rows] == list(range(len(rows)))
    assert [row.caption for row in rows[:5]] == CAPTIONS[:5]
    assert [row.caption for row in rows[-11:]] == CAPTIONS[12:]
    assert any(row.problem and "damaged" in row.problem for row in rows)
    assert Manifest(shards).fingerprint() == manifest.fingerprint()


def test_a_file_that_shrinks_during_the_audit_still_gives_all_rows(tmp_path: Path):
    path = as_json_lines(tmp_path)
    manifest = Manifest(path)
    pieces = list(manifest.pieces(10))
    path.write_bytes(path.read_bytes()[:400])
    rows = [row for piece in pieces for row in manifest.rows(piece)]
    assert [row.row for row in rows] == list(range(COUNT))
    assert "shorter" in str(rows[-1].problem)


def test_columns_and_root_can_be_named(tmp_path: Path):
    path = tmp_path / "pairs.csv"
    path.write_text('name,said,where\nx.png,hello,"[[1, 2, 3, 4]]"\n')
    manifest = Manifest(path, {"image": "name", "caption": "said", "boxes": "where"}, root="/pictures")
    (piece,) = manifest.pieces(10)
    (row,) = manifest.rows(piece)
    assert (row.image, row.caption, row.boxes) == (str(Path("/pictures/x.png")), "hello", [[1.0, 2.0, 3.0, 4.0]])


@pytest.mark.parametrize(
    ("name", "content", "columns", "says"),
    [
        ("pairs.csv", "a,b\n1,2\n", None, "none known to hold the image"),
        ("pairs.csv", "image,b\n1,2\n", None, "none known to hold the caption"),
        ("pairs.csv", "image,caption\n", {"image": "picture"}, "should be 'picture'"),
        ("pairs.csv", "image,caption\n", {"picture": "image"}, "expected some of id, image"),
        ("pairs.csv", "", None, "no header"),
        ("pairs.json", '[{"image": 1}]', None, "one object per line"),
        ("pairs.xlsx", "", None, "no known format"),
    ],
)
def test_a_manifest_that_cannot_work_is_refused(
    name: str, content: str, columns: dict[str, str] | None, says: str, tmp_path: Path
):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=says):
        Manifest(tmp_path / name, columns)


def test_what_is_not_there_or_has_several_splits_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="there is no"):
        Manifest(tmp_path / "missing.csv")
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(ValueError, match="choose one of train"):
        Manifest(tmp_path)


def test_a_table_in_a_folder_of_pictures_describes_them(tmp_path: Path):
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,hello\n")
    (tmp_path / "b.png").write_bytes(PICTURES[0])
    manifest = Manifest(tmp_path)
    (piece,) = manifest.pieces(10)
    (row,) = manifest.rows(piece)
    assert (row.image, row.caption) == (str(tmp_path / "a.png"), "hello")


@given(captions=st.lists(st.text(max_size=30), min_size=1, max_size=30), size=st.integers(1, 9))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_comes_back_from_csv_whatever_the_piece(captions: list[str], size: int, tmp_path: Path):
    path = tmp_path / "any.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["image", "caption"])
        writer.writerows(["a.png", caption.replace("\0", "")] for caption in captions)
    manifest = Manifest(path)
    rows = [row for piece in manifest.pieces(size) for row in manifest.rows(piece)]
    assert [row.caption for row in rows] == [caption.replace("\0", "") for caption in captions]


@given(st.integers(0, 50), st.integers(1, 60))
def test_runs_cover_every_position_once(total: int, size: int):
    found = list(even_runs(total, size))
    assert found == list(runs(range(total), size))
    assert [position for start, count in found for position in range(start, start + count)] == list(range(total))


@pytest.mark.parametrize(
    ("given_boxes", "expected"),
    [
        (None, None),
        ("", None),
        ([], None),
        ([1, 2, 3, 4], [[1, 2, 3, 4]]),
        ("[[1, 2, 3, 4.5]]", [[1, 2, 3, 4.5]]),
        (np.array([[0, 0, 2, 2]]), [[0, 0, 2, 2]]),
    ],
)
def test_boxes_in_the_forms_that_manifests_have(given_boxes: Any, expected: Any):
    assert read_boxes(given_boxes) == expected


@pytest.mark.parametrize("wrong", ["{", [[1, 2, 3]], [[3, 0, 1, 2]], [[0, 0, float("nan"), 1]], 7, [["a", 0, 1, 1]]])
def test_boxes_that_are_none_are_refused(wrong: Any):
    with pytest.raises(ValueError, match="expected boxes"):
        read_boxes(wrong)
