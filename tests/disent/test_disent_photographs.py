"""Sets of photographs: splits, classes, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest
from photograph_cases import COLOURS, draw, write_class, write_set

from captum_m2ib.disent.photographs import read_photographs


def test_a_share_of_each_class_is_held_out_and_the_rest_of_the_set_does_not_matter(tmp_path: Path):
    found = read_photographs(write_set(tmp_path / "a"), test_share=0.25, seed=3)
    assert found.classes == COLOURS
    assert [len(found.of(split)) for split in ("train", "test")] == [18, 6]
    tested = {found.photographs[index].name for index in found.of("test")}
    assert sum(name.startswith("red/") for name in tested) == 2

    (tmp_path / "a" / "blue").rename(tmp_path / "a" / "azure")
    again = read_photographs(tmp_path / "a", test_share=0.25, seed=3)
    assert {again.photographs[index].name for index in again.of("test")} & tested == {
        name for name in tested if not name.startswith("blue/")
    }
    other = read_photographs(tmp_path / "a", test_share=0.25, seed=4)
    assert other.of("test") == again.of("test") and other.photographs != again.photographs
    assert "25%" in other.told and "seed 4" in other.told


def test_a_split_that_is_given_is_kept(tmp_path: Path):
    write_set(tmp_path / "train", 3)
    write_set(tmp_path / "val", 2)
    found = read_photographs(tmp_path)
    assert found.told == "as given"
    assert all(one.name.startswith("train/" if one.split == "train" else "val/") for one in found.photographs)


def test_a_class_called_train_is_a_class(tmp_path: Path):
    write_class(tmp_path / "train", "red", 3)
    write_class(tmp_path / "bus", "blue", 3)
    assert read_photographs(tmp_path).classes == ("bus", "train")


def test_problems_are_told_and_left_out(tmp_path: Path):
    write_set(tmp_path / "train", 3)
    write_class(tmp_path / "test" / "red", "red", 2, first=5)
    write_class(tmp_path / "test" / "grey", "blue", 4)
    (tmp_path / "train" / "none").mkdir()
    found = read_photographs(tmp_path)
    assert found.classes == COLOURS
    told = {(problem.kind, problem.where): problem.reason for problem in found.problems}
    assert set(told) == {
        ("empty class", "none"),
        ("test only", "grey"),
        ("not tested", "blue"),
        ("not tested", "green"),
    }
    assert "its 4 left out" in told["test only", "grey"]
    assert len(found.of("test")) == 2


def test_one_picture_of_a_class_is_learnt_from(tmp_path: Path):
    write_set(tmp_path)
    write_class(tmp_path / "single", "red", 1)
    found = read_photographs(tmp_path)
    (place,) = [index for index, one in enumerate(found.photographs) if one.name.startswith("single/")]
    assert found.photographs[place].split == "train"
    assert ("not tested", "single") in {(problem.kind, problem.where) for problem in found.problems}


@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (lambda folder: folder / "missing", "there is no folder"),
        (lambda folder: folder, "holds no folder with pictures"),
        (lambda folder: write_class(folder / "red", "red", 4) or folder, "at least 2 classes"),
        (
            lambda folder: [write_class(folder / name, "red", 1) for name in ("a", "b")] and folder,
            "no class of .* has a picture to test on",
        ),
    ],
    ids=("missing", "empty", "one class", "nothing to test"),
)
def test_what_no_figure_could_be_made_of_is_an_error(tmp_path: Path, make, pattern: str):
    with pytest.raises(ValueError, match=f"--data: .*{pattern}"):
        read_photographs(make(tmp_path))


def test_a_hugging_face_data_set_is_the_same_set(tmp_path: Path):
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["unused", *COLOURS])})
    rows = {
        "image": [draw(colour, index) for colour in COLOURS for index in range(4)],
        "label": [label for label in (1, 2, 3) for _ in range(4)],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    found = read_photographs(tmp_path / "set", test_share=0.5)
    assert found.classes == COLOURS and len(found.of("test")) == 6
    for index, one in enumerate(found.photographs):
        row = int(one.name.rpartition("/")[2])
        assert found.classes[one.label] == COLOURS[row // 4]
        assert found.picture(index).tobytes() == rows["image"][row].tobytes()


def test_a_hugging_face_data_set_without_classes_is_refused(tmp_path: Path):
    import datasets

    datasets.Dataset.from_dict({"label": [1, 2]}).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"--data: expected the data set .* one column of pictures"):
        read_photographs(tmp_path / "set")
