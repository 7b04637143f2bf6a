"""Maps in other units of the score, on other grounds and in low precision: figures, verdicts and the command."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.benchmark.scenes.run import Plan
from captum_m2ib.benchmark.scenes.situations import (
    FIGURES,
    GROUNDS,
    LOW_PRECISION,
    UNITS,
    Situation,
    main,
    measure,
    table,
)
from captum_m2ib.metrics import relevance_mass
from captum_m2ib.scenes import CHECKPOINT, image_probes

PROBES = 2


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def found(encoder: DualEncoder) -> list[Situation]:
    return measure(encoder, PROBES, seed=2)


def test_rows_hold_every_situation_and_the_unit_changes_no_map(found: list[Situation]):
    assert [(one.ground, one.score) for one in found] == [(g, s) for g in GROUNDS for s in (*UNITS, LOW_PRECISION)]
    assert all(sum(one.verdicts) == PROBES and tuple(one.figures) == FIGURES for one in found)
    for start in range(0, len(found), 4):
        plain, *others, low = found[start : start + 4]
        for one in others:
            assert one.verdicts == plain.verdicts
            for figure in FIGURES:
                assert one.figures[figure].mean == pytest.approx(plain.figures[figure].mean, abs=1e-3)
        assert low.figures != plain.figures
    lines = table(found).splitlines()
    assert len(lines) == 2 + 12 and lines[2].startswith("| textured | as it is |")


def test_figures_are_those_of_the_default(encoder: DualEncoder, found: list[Situation]):
    drawn = image_probes(PROBES, Plan(probes=PROBES, seed=2, split="validation").probes_seed, ground="white")
    pairs = encoder.prepare([probe.image for probe in drawn], [probe.caption for probe in drawn])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bits = MultiModalInfoBottleneck(encoder).attribute(
            pairs.inputs[0], additional_forward_args=(pairs.inputs[1], *pairs.additional_forward_args)
        )
    mass = relevance_mass(bits, torch.stack([torch.from_numpy(probe.mask) for probe in drawn])).nan_to_num()
    (white,) = (one for one in found if (one.ground, one.score) == ("white", "as it is"))
    assert white.figures["mass"].mean == pytest.approx(float(mass.mean()), rel=1e-3)


def test_the_shipped_model_is_right_in_every_unit_and_on_every_ground():
    found = measure(DualEncoder.from_pretrained(CHECKPOINT), 4, seed=1)
    assert all(one.figures["right"].mean >= 0.75 for one in found), found


def test_the_command(checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    main(["--model", str(checkpoint), "--probes", "1"])
    assert capsys.readouterr().out.count("| in bfloat16 |") == len(GROUNDS)
