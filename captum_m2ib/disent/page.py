"""One page about a study: accuracy, what is wrong with the data, and every class; no other file, no network."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from captum_m2ib.disent._grid import cell_box
from captum_m2ib.disent.prototypes import ClassHalf, Prototype, Prototypes, explain_classes
from captum_m2ib.disent.scores import shown_interval
from captum_m2ib.disent.study import Study
from captum_m2ib.explanations.reports import page_environment, page_policy, page_style, trusted

_HERE = Path(__file__).parent
_THUMBNAIL = 160


def write_page(
    study: Study,
    output: str | os.PathLike[str] | None = None,
    *,
    head: str = "infodisent",
    seed: int = 0,
    n_halves: int = 4,
) -> Path:
    r"""Write a page about a study.

    Args:

        study (Study): With at least one fitted head.
        output (path, optional): Default: None (``report.html`` in the study's folder)
        head (str, optional): Whose classes are shown. Default: ``"infodisent"``
        seed (int, optional): Which fit of it. Default: 0
        n_halves (int, optional): Halves of channels per class. Default: 4

    Returns:
        Path: the page.

    Raises:
        ValueError: if the head is not fitted.
        RuntimeError: if Jinja2 is not installed.
    """
    environment = page_environment(_HERE, "disent")
    figures, model, told = study.figures(), study.model(head, seed), study.told()
    prototypes = study.prototypes(model)
    shown = _Shown(study, prototypes, model.reader.patch)
    names = study.photographs.classes
    classes = [
        {
            "index": page.index,
            "name": page.name,
            "share": page.share,
            "halves": [shown.half(half, names) for half in page.halves],
        }
        for page in explain_classes(model, study.train, prototypes, n_halves)
    ]
    style = page_style(_HERE / "page.css")
    page = environment.get_template("page.html").render(
        title=Path(study.settings.data).name,
        style=trusted(style),
        policy=page_policy(style),
        settings=told["settings"],
        split=told["split"],
        own=told["own"],
        lossless=max((row["lossless"] for row in figures.get("epic", ())), default=None),
        names=names,
        table=[_row(name, rows) for name, rows in figures.items()],
        problems=study.problems,
        head=head,
        seed=seed,
        classes=classes,
        size=prototypes.size,
    )
    path = study.folder / "report.html" if output is None else Path(output)
    # Names of files may hold bytes that are no text.
    path.write_text(page, encoding="utf-8", errors="backslashreplace")
    return path


def _row(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def told(key: str, scale: float, digits: int) -> str:
        return shown_interval([scale * row[key] for row in rows], digits)

    return {
        "name": name,
        "seeds": len(rows),
        "top1": told("top1", 100, 1),
        "train": told("train", 100, 1),
        "held_back": "–" if rows[0]["held_back"] is None else told("held_back", 100, 1),
        "halves": told("halves", 1, 1),
        "margin_halves": told("margin_halves", 1, 1),
        "purity": told("purity", 1, 3),
        "residual": f"{max(row['residual'] for row in rows):.0e}",
        "epochs": told("epochs", 1, 0),
        "chosen": rows[0]["chosen"],
        "seconds": told("seconds", 1, 1),
    }


class _Shown:
    """Halves with their pictures, each picture encoded once."""

    def __init__(self, study: Study, prototypes: Prototypes, patch: tuple[int, int] | None) -> None:
        self.study, self.prototypes, self.patch = study, prototypes, patch
        self.encoded: dict[int, str] = {}

    def half(self, half: ClassHalf, names: Sequence[str]) -> dict[str, Any]:
        return {
            "name": f"channel {half.channel} {'positive' if half.sign > 0 else 'negative'}",
            "mean": half.mean_contribution,
            "shared": [names[other] for other in half.shared_with],
            "pictures": [self._picture(one, names) for one in half.prototypes],
        }

    def _picture(self, one: Prototype, names: Sequence[str]) -> dict[str, Any]:
        top, left, bottom, right = cell_box(one.cell, self.prototypes.grid, self.prototypes.size, self.patch)
        if one.image not in self.encoded:
            self.encoded[one.image] = _encoded(Image.fromarray(self.study.crops[one.image]))
        labels = self.study.train.labels
        assert labels is not None
        return {
            "name": names[int(labels[one.image])],
            "purity": one.purity,
            "box": (top, left, bottom - top, right - left),
            "data": self.encoded[one.image],
        }


def _encoded(picture: Image.Image) -> str:
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
