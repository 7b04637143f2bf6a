"""A pair's game is one that shapiq plays, and its exact values are ours."""

from __future__ import annotations

import importlib.util
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from captum_m2ib import DualEncoder, PairGame, interactions
from captum_m2ib.benchmark.interactions.regression import regression
from captum_m2ib.cli import main

# Where it must be, as in the phase of .ci/run that installs it, its absence is a failure.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("shapiq") is None and "M2IB_NEED_SHAPIQ" not in os.environ,
    reason="needs the package of the extra interactions",
)


@pytest.mark.filterwarnings("ignore")
def test_shapiq_s_exact_values_and_ours_agree(checkpoint: Path):
    import shapiq

    encoder = DualEncoder.from_pretrained(checkpoint, torch_dtype=torch.float64)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    found = interactions(encoder, picture, "a red cross", cell=(32, 32), budget=(16, 8), within=True)
    game = PairGame(encoder, encoder.prepare(picture, "a red cross"), cell=(32, 32))
    exact = shapiq.ExactComputer(game, n_players=game.n_players)
    theirs, ours = exact("BII", 2), found.to_shapiq()
    for first, second in product(range(7), repeat=2):
        if first < second:
            np.testing.assert_allclose(ours[first, second], theirs[first, second], rtol=0, atol=1e-10)
    values = exact("BV", 1)
    for player in range(7):
        np.testing.assert_allclose(ours[(player,)], values[(player,)], rtol=0, atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_shapiq_approximates_the_game(checkpoint: Path):
    import shapiq

    encoder = DualEncoder.from_pretrained(checkpoint, torch_dtype=torch.float64)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    game = PairGame(encoder, encoder.prepare(picture, "a red cross"), cell=(32, 32))
    sampled = shapiq.RegressionFBII(n=7, max_order=2, random_state=0).approximate(budget=128, game=game)
    found = interactions(encoder, picture, "a red cross", cell=(32, 32), budget=(16, 8), within=True)
    for patch, word in product(range(4), range(3)):
        np.testing.assert_allclose(sampled[patch, 4 + word], found.fit.across[word, patch], rtol=0, atol=1e-8)


@pytest.mark.filterwarnings("ignore")
def test_shapiq_s_regression_on_all_coalitions_is_ours(checkpoint: Path):
    encoder = DualEncoder.from_pretrained(checkpoint, torch_dtype=torch.float64)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    game = PairGame(encoder, encoder.prepare(picture, "a red cross"), cell=(32, 32))
    theirs = regression(game, 128, 0)
    ours = interactions(encoder, picture, "a red cross", cell=(32, 32), budget=(16, 8), within=True).fit
    assert theirs.mean == pytest.approx(ours.mean, abs=1e-10)
    for name in ("picture", "caption", "across", "in_picture", "in_caption"):
        np.testing.assert_allclose(getattr(theirs, name), getattr(ours, name), rtol=0, atol=1e-8)


def test_the_benchmark_has_a_row_of_shapiq_s_regression(checkpoint: Path, tmp_path: Path):
    given = ["benchmark", "interactions", "--model", str(checkpoint), "--probes", "1", "--output", str(tmp_path)]
    assert main([*given, "--shapiq", "64"]) == 0
    assert "| `shapiq-64` |" in (tmp_path / "table.md").read_text(encoding="utf-8")
