"""Verdicts on right and on wrong maps: what is checked, what counts as right, and how it is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.attr.map_check import check_maps
from captum_m2ib.benchmark.scenes.verdicts import (
    GROUNDS,
    MAPS,
    ON_TRUTH,
    Checked,
    main,
    measure,
    on_truth,
    table,
)
from captum_m2ib.engine.verdict import VERDICTS
from captum_m2ib.scenes import image_probes, token_probes

pytestmark = pytest.mark.filterwarnings("ignore::captum_m2ib.NothingToExplainWarning")


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


def test_every_pair_has_three_maps_on_each_ground(encoder: DualEncoder):
    weights = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    found = measure(encoder, 2, seed=4)
    kinds = [(row.ground, row.modality, row.source) for row in found]
    assert kinds == [(g, m, s) for g in GROUNDS for m in ("image", "text") for s in MAPS for _ in range(2)]
    assert all(row.verdict in VERDICTS for row in found)
    assert all(row.kept == 1 for row in found if row.source != MAPS[0])
    assert all(torch.equal(weights[name], tensor) for name, tensor in encoder.model.state_dict().items())


@pytest.mark.parametrize("modality", [0, 1])
def test_a_map_from_anywhere_is_checked_like_the_methods_own(encoder: DualEncoder, modality: int):
    probes = image_probes(2, 3) if modality == 0 else token_probes(2, 3)
    pairs = encoder.prepare([probe.image for probe in probes], [probe.caption for probe in probes])
    method = MultiModalInfoBottleneck(encoder)
    maps, record = method.attribute_with_record(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args, check=True, n_steps=2, n_samples=4
    )
    own = record.modalities[modality].check
    (check,) = check_maps(method, (*pairs.inputs, *pairs.additional_forward_args), modality, [maps[modality]])
    assert own is not None
    for name in ("top", "random", "score", "closed", "range"):
        torch.testing.assert_close(getattr(check, name), getattr(own, name), atol=1e-4, rtol=1e-3)


def test_the_truth_is_all_of_a_maps_way():
    pictures = image_probes(3, 0)
    masks = torch.stack([torch.from_numpy(probe.mask) for probe in pictures]).unsqueeze(1).float()
    assert on_truth(masks.expand(-1, 3, -1, -1), pictures) == pytest.approx([1, 1, 1])
    assert on_truth(torch.ones(3, 3, 64, 64), pictures) == pytest.approx([0, 0, 0])
    assert max(on_truth(1 - masks, pictures)) < 0
    captions = token_probes(2, 0)
    tokens = torch.zeros(2, 20)
    for row, probe in enumerate(captions):
        tokens[row, [word + 1 for word in probe.present_words]] = 1.0
        # What is no word counts neither way.
        tokens[row, 0] = tokens[row, 1 + len(probe.scene.words)] = 5.0
    assert on_truth(tokens, captions) == pytest.approx([1, 1])


def test_the_table_counts_verdicts_and_how_many_are_right():
    on, off = ON_TRUTH + 0.1, ON_TRUTH - 0.1
    rows = [
        *(Checked("textured", "image", MAPS[0], verdict, 0.5, 1.0, on) for verdict in ("holds", "holds", "weak")),
        *(Checked("textured", "image", MAPS[1], verdict, 0.5, 1.0, off) for verdict in ("fails", "holds")),
    ]
    lines = table(rows).splitlines()
    assert lines[2].startswith("| image, textured | its own | 3 | 3 | 2 | 1 | 0 | 0.67 [") and lines[2].endswith(
        "| – | – |"
    )
    assert lines[3].startswith("| image, textured | another pair's | 2 | 0 | 1 | 0 | 1 | – | 0.50 [")
    assert (
        lines[6:]
        and lines[7].startswith("| image holds | 3 | 0.67 [")
        and lines[9].startswith("| image fails | 1 | 0.00")
    )


def test_the_command(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["--model", str(checkpoint), "--probes", "1", "--csv", str(tmp_path / "maps.csv")])
    assert capsys.readouterr().out.count("| text, plain |") == 3
    assert len((tmp_path / "maps.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
