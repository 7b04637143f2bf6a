"""Run the notebooks, each in a kernel of its own, and write back what they print and draw.

``python tutorials/execute.py [NOTEBOOK ...]``, all of them without a name. A notebook's text is edited by hand, its
outputs only ever come from here, so that they are what the code gives, in order, without a warning.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
SECONDS_PER_CELL = 300

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def notebooks() -> list[Path]:
    """All notebooks, in the order of their numbers."""
    return sorted(FOLDER.glob("*.ipynb"))


def run(path: Path) -> NotebookNode:
    r"""A notebook with the outputs of a run from top to bottom, offline, in a fresh kernel.

    Args:

        path (Path): The notebook; it is read, not written.

    Returns:
        NotebookNode: tidied.

    Raises:
        CellExecutionError: if a cell fails.
        RuntimeError: if a cell writes to stderr, where warnings go.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=SECONDS_PER_CELL,
        kernel_name=_METADATA["kernelspec"]["name"],
        resources={"metadata": {"path": str(path.parent)}},
        record_timing=False,
        coalesce_streams=True,
    )
    client.execute(env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"})
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.get("name") == "stderr":
                raise RuntimeError(
                    f"{path.name}: expected nothing on stderr, got {output['text']!r} from {cell.source!r}"
                )
    return tidy(notebook)


def tidy(notebook: NotebookNode) -> NotebookNode:
    """The same notebook without what changes from one machine or program to another."""
    notebook.metadata = NotebookNode(_METADATA)
    for cell in notebook.cells:
        cell.metadata = NotebookNode()
        for output in cell.get("outputs", []):
            if "metadata" in output:
                output["metadata"] = NotebookNode()
            if "image/png" in output.get("data", {}):
                output["data"]["image/png"] = _smaller(output["data"]["image/png"])
    return notebook


def _smaller(picture: str) -> str:
    """A PNG with six bits per channel: half the size, and no difference to the eye. Once small, it stays the same."""
    opened = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    buffer = io.BytesIO()
    opened.point(lambda value: round((value >> 2) * 255 / 63)).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def main(arguments: list[str]) -> None:
    for path in [Path(name) for name in arguments] or notebooks():
        nbformat.write(run(path), path)
        print(path.name)


if __name__ == "__main__":
    main(sys.argv[1:])
