"""Every named method through every door: explain, command, audit and report, benchmark, app; and what it refuses.

Where a method cannot explain a model it says so in one sentence, whichever door it was asked through.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from audit_cases import rows_of, write_scenes
from methods_table import answer, told

from captum_m2ib import DualEncoder, Explanation, compare
from captum_m2ib.app.asking import ask, fitting
from captum_m2ib.attr.registry import METHODS
from captum_m2ib.benchmark.methods import METHODS as MEASURED
from captum_m2ib.cli import main

pytestmark = pytest.mark.filterwarnings("ignore::captum_m2ib.NothingToExplainWarning")

# RISE draws thousands of masks, of which the command has no fewer.
NAMES = [pytest.param(name, marks=[pytest.mark.slow] if name == "rise" else []) for name in METHODS]
FEW = {"m2ib": ["--steps", "2"], "m2ib-published": ["--steps", "2"], "nib": ["--steps", "2"]}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), 1)


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_goes_through_every_door_or_is_refused_at_each(
    name: str,
    checkpoint: Path,
    encoder: DualEncoder,
    scenes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    picture, caption = str(scenes.parent / "0.png"), "a red cross"
    chosen = ["--model", str(checkpoint), "--method", name, *FEW.get(name, []), "--no-check"]
    settings = {"n_steps": 2} if name in FEW else {}
    sentence = told(lambda: compare(encoder, picture, caption, [name], check=False, **settings))
    status = main(["explain", picture, caption, *chosen, "--output", str(tmp_path / "one.npz")])
    said = capsys.readouterr().err
    audited = main(["audit", str(scenes), *chosen, "--output", str(tmp_path / "audit")])
    audit_said = capsys.readouterr().err
    measured = told(lambda: MEASURED[name](encoder)) if name in MEASURED else sentence
    on_page = told(lambda: ask(encoder, picture, caption, name, "quick"))
    assert (name in fitting(encoder)) == (on_page is None)
    if METHODS[name].late_only:
        assert sentence is not None and "expected a model of late interaction" in sentence
        assert status == audited == 2 and measured == on_page == sentence
        assert sentence in said and sentence in audit_said and said.count("\n") == audit_said.count("\n") == 1
        return
    assert (sentence, measured, on_page, status, audited) == (None, None, None, 0, 0), (said, audit_said)
    unit = METHODS[name].unit
    found = Explanation.load(tmp_path / "one.npz")
    assert found.unit == unit and np.isfinite(found.image_bits).all()
    (row,) = rows_of(tmp_path / "audit")
    # Sums of relative values mean nothing.
    assert row["error"] is None and (row["image_bits"] is None) == (unit == "relative")
    assert main(["report", str(tmp_path / "audit")]) == 0
    assert name in (tmp_path / "audit" / "report.html").read_text(encoding="utf-8")


NO_BLOCKS = "found no list of blocks in the image tower ConvTower; name the layers"
LEFT = "needs attention over the 16 tokens of layer"
REFUSED: dict[str, dict[str, str]] = {
    "towers without known blocks": {
        **dict.fromkeys(("m2ib-published", "m2ib-guided", "nib", "grad-eclip", "relevance", "legrad"), NO_BLOCKS),
        "similarity-map": "expected a model of late interaction, such as ColPali",
    },
    "late interaction": {"grad-eclip": LEFT, "relevance": LEFT},
}
"""Per model the methods that cannot explain it with layers of their own choice, and a part of what each says."""


@pytest.mark.parametrize("model", REFUSED)
@pytest.mark.parametrize("name", METHODS)
def test_models_that_a_method_cannot_explain(name: str, model: str):
    found, expected = answer(name, model), REFUSED[model].get(name)
    assert isinstance(found, str) == (expected is not None), found
    assert expected is None or (expected in found and "\n" not in found)
