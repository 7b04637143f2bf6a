"""Drawn pages: truth where the ink is, the same for the same seed; and the model that ships with the package."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from captum_m2ib import DualEncoder
from captum_m2ib.scenes.pages import KINDS, PAGES_CHECKPOINT, draw_page, page_probes, train_pages
from captum_m2ib.scenes.pages.drawing import SIDE
from captum_m2ib.scenes.pages.training import _kinds_of_patches


def test_a_page_is_determined_by_its_arguments():
    first, same, other = draw_page(3, 7), draw_page(3, 7), draw_page(3, 8)
    assert_array_equal(np.asarray(first.picture), np.asarray(same.picture))
    assert first.items == same.items and other.items != first.items
    assert page_probes(2, 0, start=1)[0].query == page_probes(1, 0, start=1)[0].query


def test_ink_lies_within_the_boxes_and_reaches_their_edges():
    for index in range(40):
        page = draw_page(0, index)
        pixels = np.asarray(page.picture).astype(int)
        ground = np.median(pixels.reshape(-1, 3), 0)
        dark = pixels.max(2) < 112
        covered = np.zeros((SIDE, SIDE), dtype=bool)
        for item in page.items:
            box = dark[item.top : item.bottom, item.left : item.right]
            assert box[0].any() and box[-1].any() and box[:, 0].any() and box[:, -1].any()
            assert item.right <= SIDE and item.bottom <= SIDE
            covered |= page.mask(item.kind)
        # Grey lines are lighter than any ink.
        assert not (dark & ~covered).any() and (ground >= 225).all()
        assert len({item.kind for item in page.items}) == len(page.items)


def test_queries_name_what_stands_there():
    for probe in page_probes(30, 1):
        assert probe.kind in probe.query.split() and probe.page.mask(probe.kind).any()


def test_every_kind_is_drawn():
    seen = {item.kind for index in range(100) for item in draw_page(5, index).items}
    assert seen == set(KINDS)


def test_patches_are_labelled_with_what_covers_them():
    page = draw_page(0, 3)
    found = _kinds_of_patches(page)
    assert found.shape == (12, 12)
    assert {KINDS[label - 1] for label in found.flatten() if label} == {item.kind for item in page.items}
    for item in page.items:
        rows, columns = np.nonzero(found == 1 + KINDS.index(item.kind))
        assert (rows >= item.top // 8).all() and (columns <= (item.right - 1) // 8).all()


@torch.no_grad()
def test_the_shipped_model_finds_the_page_that_a_query_means():
    encoder = DualEncoder.from_pretrained(PAGES_CHECKPOINT)
    probes = page_probes(24, 9)
    pairs = encoder.prepare([probe.page.picture for probe in probes], [probe.query for probe in probes])
    scores = encoder.similarities(*pairs.inputs, *pairs.additional_forward_args)
    holds = torch.tensor([[any(i.kind == q.kind for i in p.page.items) for q in probes] for p in probes])
    # Every page that holds what a query names scores above every page that does not.
    for column, is_there in zip(scores.T, holds.T, strict=True):
        if not is_there.all():
            assert float(column[is_there].min()) > float(column[~is_there].max())
    report = json.loads((PAGES_CHECKPOINT / "report.json").read_text(encoding="utf-8"))
    assert report["parameters"] == sum(p.numel() for p in encoder.model.parameters())


def test_training_writes_a_checkpoint_that_loads(tmp_path: Path):
    output = tmp_path / "model"
    report = train_pages(output, reading_steps=2, steps=2, batch_size=4, warmup_steps=1, show_progress=False)
    assert json.loads((output / "report.json").read_text(encoding="utf-8")) == report
    encoder = DualEncoder.from_pretrained(output)
    assert encoder.score_name == "MaxSim" and next(encoder.parameters()).dtype == torch.float32
    with pytest.raises(FileExistsError, match=r"^output: expected a path that does not exist"):
        train_pages(output)
