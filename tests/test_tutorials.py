"""The tutorials run in fresh kernels without a warning, and what is committed is what they give."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

FOLDER = Path(__file__).parents[1] / "tutorials"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 500_000

_LOCAL = re.compile(r"/(?:home|root|tmp|work|Users|private|var|usr|opt|mnt|builds)/|[A-Z]:\\\\|\.venv|site-packages")
_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+|object at ")
_SECONDS = re.compile(r"\d+(?:\.\d+)? ?(?:s|ms|it/s|pairs/s|seconds)\b|\d+%\|")


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def written(output: Any) -> str:
    """What an output says to a reader, pictures left out."""
    data = output.get("data", {})
    parts = [output.get("text", ""), *(value for kind, value in data.items() if kind.startswith("text/"))]
    return "".join("".join(part) for part in parts)


def essence(cell: Any) -> list[Any]:
    """What must not differ between two runs, on whatever machine: kinds of output, lines, and what was found true."""
    return [
        (output["output_type"], sorted(output.get("data", {})), written(output).count("\n"), facts(written(output)))
        for output in cell["outputs"]
    ]


def facts(text: str) -> list[str]:
    return re.findall(r"\b(?:True|False|None|nan|inf|\w+Error)\b", text)


@pytest.fixture(params=NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture
def notebook(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_all_eight_are_here_and_in_the_index():
    index = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name[:2] for path in NOTEBOOKS] == [f"0{number}" for number in range(1, 9)]
    assert re.findall(r"\]\(([^)]+\.ipynb)\)", index) == [path.name for path in NOTEBOOKS]


def test_is_small_enough_to_be_shown(path: Path):
    assert path.stat().st_size < MOST_BYTES


def test_was_run_from_top_to_bottom(notebook: Any):
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) > len(cells) / 2
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])


def test_outputs_hold_no_error_warning_path_or_time(notebook: Any):
    for output in (output for cell in code_cells(notebook) for output in cell["outputs"]):
        text = written(output)
        assert output["output_type"] != "error" and output.get("name") != "stderr"
        for pattern in (_LOCAL, _ADDRESS, _SECONDS, re.compile("Traceback|Warning|<Figure size [^>]*>$")):
            found = pattern.search(text)
            assert found is None or "image/png" in output.get("data", {}), (found, text)


def test_pictures_are_not_blank(notebook: Any):
    for output in (output for cell in code_cells(notebook) for output in cell["outputs"]):
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))
            assert min(picture.size) > 150 and len(picture.getcolors(1 << 24)) > 20


def test_changes_only_where_its_text_or_outputs_do(notebook: Any):
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    assert set(notebook["metadata"]["language_info"]) == {"name"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])


def test_links_lead_somewhere(notebook: Any):
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            for target in re.findall(r"\]\(([^)#]+)", "".join(cell["source"])):
                assert target.startswith("https://") or (FOLDER / target).exists(), target


@pytest.mark.slow
def test_runs_and_gives_what_is_committed(path: Path, notebook: Any):
    fresh = runner().run(path)
    assert [essence(cell) for cell in code_cells(fresh)] == [essence(cell) for cell in code_cells(notebook)]


@pytest.mark.slow
def test_a_warning_is_refused(tmp_path: Path):
    import nbformat

    cell = nbformat.v4.new_code_cell("import warnings\nwarnings.warn('look here')")
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "warns.ipynb")
    with pytest.raises(RuntimeError, match=r"expected nothing on stderr, got .*look here"):
        runner().run(tmp_path / "warns.ipynb")


def runner() -> Any:
    """The module that runs the notebooks; it is no part of the package."""
    spec = importlib.util.spec_from_file_location("tutorials_execute", FOLDER / "execute.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
