"""The table of shares and maps per layer holds what the parts measure on their own."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.benchmark.scenes.bypass import FIGURES, Row, main, measure, table
from captum_m2ib.benchmark.scenes.run import Plan
from captum_m2ib.metrics import Summary, auroc, relevance_mass
from captum_m2ib.metrics.bypass import measure_bypass
from captum_m2ib.scenes import image_probes, token_probes

PROBES = 3
SEED = Plan(probes=PROBES, seed=4, split="validation").probes_seed


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


def test_rows_hold_every_layer_with_its_share_and_its_figures(encoder: DualEncoder):
    rows, towers = measure(encoder, PROBES, seed=4)
    image, text = towers
    assert [row.layer for row in rows] == [*image.layers, *text.layers]
    assert [row.layer for row in rows if row.is_default] == ["inputs[0]", "text_model.embeddings"]
    pictures, captions = image_probes(PROBES, SEED), token_probes(PROBES, SEED)
    seen = encoder.prepare([p.image for p in pictures], [p.caption for p in pictures])
    read = encoder.prepare([p.image for p in captions], [p.caption for p in captions])
    for index, (pairs, tower) in enumerate(((seen, image), (read, text))):
        expected = measure_bypass(encoder, pairs.inputs, pairs.additional_forward_args)[index]
        torch.testing.assert_close(tower.share, expected.share)
        of_tower = [row for row in rows if row.modality == tower.modality]
        for row, share in zip(of_tower, expected.mean_share, strict=True):
            assert row.share.mean == pytest.approx(float(share), abs=1e-6) and row.share.count == PROBES
            assert tuple(row.figures) == FIGURES[row.modality]
    second, words = rows[3], rows[len(image.layers) + 1]
    layers = [encoder.model.vision_model.encoder.layers[1], encoder.model.text_model.encoder.layers[0]]
    method = MultiModalInfoBottleneck(encoder, layers, statistics=["pair", "pair"])
    bits = method.attribute(seen.inputs[0], additional_forward_args=(seen.inputs[1], *seen.additional_forward_args))
    masks = torch.stack([torch.from_numpy(probe.mask) for probe in pictures])
    assert second.layer == "vision_model.encoder.layers.1"
    assert second.figures["image mass"].mean == pytest.approx(float(relevance_mass(bits, masks).mean()), rel=1e-3)
    _, tokens = method.attribute(read.inputs, additional_forward_args=read.additional_forward_args)
    flags = torch.zeros(2, *tokens.shape, dtype=torch.bool)
    for place, probe in enumerate(captions):
        # The first token starts the caption.
        flags[0, place, [1 + word for word in probe.present_words]] = True
        flags[1, place, [1 + word for word in (*probe.present_words, *probe.absent_words)]] = True
    assert words.layer == "text_model.encoder.layers.0"
    assert words.figures["text auroc"].mean == pytest.approx(float(auroc(tokens, flags[0], valid=flags[1]).mean()))


def test_the_command_prints_the_table_and_draws_the_figure(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    figure = tmp_path / "shares.png"
    main(["--model", str(checkpoint), "--probes", "2", "--figure", str(figure)])
    told = capsys.readouterr().out
    assert figure.read_bytes()[:4] == b"\x89PNG"
    lines = [line for line in told.splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines if "` * |" in line] == [
        "inputs[0]",
        "text_model.embeddings",
    ]
    assert len(lines) == 5 + 3 and len({line.count("|") for line in lines}) == 1
    with pytest.raises(SystemExit):
        main(["--figure", str(tmp_path / "nowhere" / "shares.png")])
    assert "--figure: the directory of" in capsys.readouterr().err


def test_a_share_that_never_varies_has_no_correlation():
    even, figures = Summary(1.0, 1.0, 1.0, 2, 0), dict.fromkeys(FIGURES["text"], Summary(0.5, 0.4, 0.6, 2, 0))
    lines = table([Row("text", "last", even, figures, math.nan, False)]).splitlines()
    assert lines[2] == "| `last` | 1.000 [1.000, 1.000] |" + " 0.500 [0.400, 0.600] |" * 3 + " – |"
