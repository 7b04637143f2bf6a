"""Every named method through every door: explain, command, audit and page, benchmark; and what it refuses.

Where a method cannot explain a model it says so in one sentence, whichever door it was asked through.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import late
import numpy as np
import pytest
import zoo
from audit_cases import rows_of, write_scenes
from families import conv_case

from captum_m2ib import DualEncoder, Explanation, compare
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


def told(run: Callable[[], Any]) -> str | None:
    """The sentence in which something is refused; None where it is not."""
    try:
        run()
    except ValueError as error:
        return str(error)
    return None


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
    if METHODS[name].late_only:
        assert sentence is not None and "expected a model of late interaction" in sentence
        assert status == audited == 2 and measured == sentence
        assert sentence in said and sentence in audit_said and said.count("\n") == audit_said.count("\n") == 1
        return
    assert (sentence, measured, status, audited) == (None, None, 0, 0), (said, audit_said)
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
    "convolutional": {
        **dict.fromkeys(("m2ib-published", "nib", "grad-eclip", "relevance", "legrad"), NO_BLOCKS),
        "similarity-map": "expected a model of late interaction, such as ColPali",
    },
    "late": {"grad-eclip": LEFT, "relevance": LEFT},
}
"""Per model the methods that cannot explain it with layers of their own choice, and a part of what each says."""


@pytest.mark.parametrize("model", REFUSED)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "rise"])
def test_models_that_a_method_cannot_explain(name: str, model: str):
    if model == "late":
        encoder = zoo.encoder_of(zoo.model_named("colpali"), processor=late.colpali())
        picture = np.random.default_rng(0).integers(0, 255, (40, 64, 3), dtype=np.uint8)
        pairs = encoder.prepare(picture, "revenue 2024")
        given = (encoder, pairs.inputs, pairs.additional_forward_args)
    else:
        case = conv_case()
        given = (case.forward, case.inputs, case.additional)
    sentence = told(lambda: attributed(name, *given))
    expected = REFUSED[model].get(name)
    assert (sentence is None) == (expected is None), sentence
    assert expected is None or (expected in sentence and "\n" not in sentence)  # type: ignore[operator]


def attributed(name: str, forward: Any, inputs: Any, additional: Any) -> None:
    settings = {"n_steps": 2} if name in FEW else {}
    METHODS[name].make(forward).attribute(inputs, additional_forward_args=additional, **settings)
