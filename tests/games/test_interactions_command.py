"""The command: a file and a summary, and what is wrong in one line."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from captum_m2ib.cli import main


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(path)
    return str(path)


def test_a_page_and_a_summary(checkpoint: Path, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "found.html"
    few = ["--cell", "32", "32", "--budget", "16", "8", "--model", str(checkpoint), "--output", str(output)]
    assert main(["interactions", picture, "a red cross", *few]) == 0
    told = capsys.readouterr().out
    assert "words    a " in told and "most with patch" in told and told.endswith(f"written  {output}\n")
    assert "a red cross" in output.read_text(encoding="utf-8")


def test_pairs_within_each_side_explain_more(checkpoint: Path, picture: str, tmp_path: Path):
    given = ["--cell", "16", "16", "--model", str(checkpoint), "--output", str(tmp_path / "found.html")]
    shares = []
    for more in ([], ["--within"]):
        assert main(["interactions", picture, "a red cross", *given, *more]) == 0
        page = (tmp_path / "found.html").read_text(encoding="utf-8")
        shares.append(int(re.search(r"explain (\d+)%", page)[1]))  # type: ignore[index]
    assert shares[1] > shares[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "TEXT: expected a caption after the picture"),
        (["a cross", "--p", "0"], "p: expected a probability between 0 and 1"),
        (["a cross", "--output", "i.txt"], "must end in one of .png, .pdf, .svg, .html"),
        (
            ["a cross", "--budget", "10", "8"],
            "budget: expected masked pictures that tell 65 coefficients",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    checkpoint: Path, picture: str, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
):
    assert main(["interactions", picture, *arguments, "--model", str(checkpoint)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and says in errors[0]
