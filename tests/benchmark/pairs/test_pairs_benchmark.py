"""Methods on pairs of one's own: right values, errors that stay in their rows, and runs that go on."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from captum_m2ib import DualEncoder, PackedLayout
from captum_m2ib.audit.manifest import Manifest
from captum_m2ib.benchmark.faithfulness import faithfulness, maskable_tokens
from captum_m2ib.benchmark.methods import METHODS
from captum_m2ib.benchmark.pairs import measures as benchmark
from captum_m2ib.benchmark.pairs.command import add_pairs
from captum_m2ib.benchmark.pairs.measures import FIGURES, Plan, measure, run_settings, write_tables
from captum_m2ib.benchmark.store import Store
from captum_m2ib.benchmark.truth import grids_of, truth_of
from captum_m2ib.encoders.spelling import blank_token
from captum_m2ib.metrics import auroc, pointing_game, relevance_mass
from captum_m2ib.scenes import draw_scene

QUICK = Plan(steps=4)


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def cropping(checkpoint: Path) -> DualEncoder:
    """With a processor that resizes the shorter side to 64 and cuts 64 x 64 from the middle, as CLIP's does."""
    encoder = DualEncoder.from_pretrained(checkpoint)
    processor = type(encoder.processor.image_processor)(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, do_center_crop=True
    )
    encoder.processor.image_processor = processor
    return encoder


def write_manifest(folder: Path, count: int, **columns: list[Any]) -> Path:
    """Drawn scenes as a table, pictures beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = [draw_scene(index, 64) for index in range(count)]
    for index, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(folder / f"{index}.png")
    rows = {
        "id": [f"pair-{index}" for index in range(count)],
        "image": [f"{index}.png" for index in range(count)],
        "caption": [scene.caption for scene in scenes],
        **columns,
    }
    path = folder / "pairs.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows)
        writer.writerows(zip(*rows.values(), strict=True))
    return path


def run_on(encoder: DualEncoder, path: Path, output: Path, *names: str, plan: Plan = QUICK):
    manifest = Manifest(path)
    store = Store(output, run_settings(manifest, encoder, plan))
    return measure(manifest, encoder, [METHODS[name] for name in names], store, plan), store


def test_figures_are_those_of_the_metrics(encoder: DualEncoder, tmp_path: Path):
    boxes = [[[8, 16, 40, 48]], None, [[0, 0, 20, 64], [30, 0, 64, 10]]]
    path = write_manifest(tmp_path, 3, boxes=["" if box is None else json.dumps(box) for box in boxes])
    found, _ = run_on(encoder, path, tmp_path / "out", "m2ib", "saliency")
    prepared = encoder.prepare(
        [draw_scene(i, 64).image for i in range(3)], [draw_scene(i, 64).caption for i in range(3)]
    )
    for name, outcome in found.items():
        assert outcome.ids == ["pair-0", "pair-1", "pair-2"] and outcome.errors == [None] * 3
        explainer = METHODS[name](encoder)
        maps = explainer.attribute(prepared.inputs, prepared.additional_forward_args)
        expected = faithfulness(
            encoder,
            prepared.inputs,
            maps,
            prepared.additional_forward_args,
            maskable=maskable_tokens(prepared),
            replacement=blank_token(encoder),
            steps=4,
        )
        for figure, values in expected.items():
            np.testing.assert_allclose(outcome.figures[figure], values, rtol=1e-4, atol=1e-6, err_msg=figure)
        with torch.no_grad():
            score = encoder(*prepared.inputs, *prepared.additional_forward_args)
        np.testing.assert_allclose(outcome.figures["score"], score, atol=1e-6)
        assert all(seconds > 0 for seconds in outcome.figures["seconds per pair"])
        bits = maps[0].detach().sum(1).double()
        truth = torch.zeros(3, 64, 64, dtype=torch.bool)
        truth[0, 16:48, 8:40] = True
        truth[2, :, :20] = truth[2, :10, 30:] = True
        for figure, metric in (("pointing", pointing_game), ("mass", relevance_mass), ("auroc", auroc)):
            values = metric(bits, truth)
            values[1] = torch.nan
            np.testing.assert_allclose(outcome.figures[f"image {figure}"], values, rtol=1e-4, err_msg=figure)
        np.testing.assert_allclose(outcome.figures["image area"], [0.25, np.nan, (64 * 20 + 10 * 34) / 4096])
    assert found["saliency"].figures["image seeds"] == [1.0] * 3
    assert all(0.1 < value < 1 - 1e-6 for value in found["m2ib"].figures["text seeds"])


def test_the_truth_is_cropped_as_the_processor_crops(cropping: DualEncoder):
    # Columns 16 to 80 of 96 are seen.
    region = np.zeros((64, 96, 3), dtype=np.uint8)
    region[:32, 16:48] = 255
    found = truth_of(cropping, Image.fromarray(region), "a circle", (64, 64))
    expected = torch.zeros(1, 64, 64, dtype=torch.bool)
    expected[0, :32, :32] = True
    assert torch.equal(found, expected)
    # Of a patch, half of which lies inside, and of one that does less.
    coarse = truth_of(cropping, Image.fromarray(region), "a circle", (4, 4))
    assert torch.equal(coarse[0].int(), torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [0] * 4, [0] * 4]).int())


def test_masks_and_boxes_of_the_same_region_agree(encoder: DualEncoder, tmp_path: Path):
    (tmp_path / "with").mkdir()
    mask = np.zeros((64, 64, 3), dtype=np.uint8)
    mask[16:48, 8:40] = 255
    Image.fromarray(mask).save(tmp_path / "with" / "mask.png")
    by_mask, _ = run_on(
        encoder, write_manifest(tmp_path / "with", 2, mask=["mask.png"] * 2), tmp_path / "one", "centre"
    )
    by_box, _ = run_on(
        encoder, write_manifest(tmp_path / "boxes", 2, boxes=["[[8, 16, 40, 48]]"] * 2), tmp_path / "two", "centre"
    )
    for name in ("image pointing", "image mass", "image auroc", "image iou", "image best iou", "image area"):
        np.testing.assert_array_equal(by_mask["centre"].figures[name], by_box["centre"].figures[name])


def test_a_truth_outside_of_what_the_model_sees_has_no_value(cropping: DualEncoder, tmp_path: Path):
    path = write_manifest(tmp_path, 1, boxes=["[[0, 0, 10, 64]]"])
    Image.fromarray(np.zeros((64, 128, 3), dtype=np.uint8)).save(tmp_path / "0.png")
    found, _ = run_on(cropping, path, tmp_path / "out", "centre")
    assert found["centre"].errors == [None]
    assert np.isnan(found["centre"].figures["image auroc"][0]) and found["centre"].figures["image area"] == [0.0]


def test_a_bad_row_is_an_error_row_and_no_stop(encoder: DualEncoder, tmp_path: Path):
    path = write_manifest(
        tmp_path,
        10,
        boxes=["", "", "", "[[5, 5, 1, 1]]", "", "[[900, 900, 950, 950]]", "", "", "", ""],
        mask=["", "", "", "", "", "", "wrong.png", "", "", ""],
    )
    lines = path.read_text().splitlines()
    lines[2] = lines[2].replace("1.png", "missing.png")
    lines[3] = lines[3].replace(draw_scene(2, 64).caption, " ")
    path.write_text("\n".join(lines) + "\n")
    (tmp_path / "4.png").write_bytes(b"no picture")
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(tmp_path / "wrong.png")
    found, store = run_on(encoder, path, tmp_path / "out", "saliency", "centre")
    kinds = {1: "image", 2: "caption", 3: "manifest", 4: "image", 5: "boxes", 6: "mask"}
    for outcome in found.values():
        assert {place: error[0] for place, error in enumerate(outcome.errors) if error} == kinds
        for place in range(10):
            assert np.isnan(outcome.figures["score"][place]) == (place in kinds)
    write_tables(store.folder, found)
    with (store.folder / "rows.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 20
    for row in written:
        assert row["error_kind"] == kinds.get(int(row["row"]), "") and row["id"] == f"pair-{row['row']}"
        assert bool(row["error"]) == bool(row["error_kind"]) and bool(row["score"]) != bool(row["error"])


class Stubborn:
    """A method that fails on captions of one length, or stops after so many runs; notes how many pairs it was given."""

    name, family, settings, is_floor = "stubborn", METHODS["centre"].family, ({}, {}), True

    def __init__(self, length: int | None = None, stop: int | None = None) -> None:
        self.length, self.stop = length, stop
        self.calls: list[int] = []

    def __call__(self, encoder: DualEncoder) -> Any:
        self.forward_func = encoder
        return self

    def attribute(self, inputs: Any, additional_forward_args: Any = None, seed: int = 0) -> Any:
        self.calls.append(len(inputs[0]))
        if self.stop is not None and len(self.calls) > self.stop:
            raise KeyboardInterrupt
        if self.length is not None and bool((additional_forward_args[0].sum(1) == self.length).any()):
            raise ArithmeticError("will not explain this")
        return METHODS["centre"](self.forward_func).attribute(inputs, additional_forward_args)


def test_what_a_method_does_to_one_row_stays_there(encoder: DualEncoder, tmp_path: Path):
    path = write_manifest(tmp_path, 4, caption=["a circle", "a red circle there", "a square", "a star"])
    method, plan, manifest = Stubborn(length=6), Plan(steps=4, stability=False), Manifest(path)
    found = measure(manifest, encoder, [method], Store(tmp_path / "out", run_settings(manifest, encoder, plan)), plan)
    found = found["stubborn"]
    assert found.errors == [None, ["model", "will not explain this"], None, None]
    assert np.isnan(found.figures["score"]).tolist() == [False, True, False, False]
    assert method.calls == [4, 1, 1, 1, 1]


def test_an_interrupted_run_goes_on_where_it_stopped(
    encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(benchmark, "BLOCK", 2)
    plan = Plan(faithfulness=False, stability=False)
    path = write_manifest(tmp_path / "pairs", 6)
    manifest = Manifest(path)
    whole = measure(
        manifest, encoder, [METHODS["centre"]], Store(tmp_path / "whole", run_settings(manifest, encoder, plan)), plan
    )["centre"]
    method = Stubborn(stop=2)
    with pytest.raises(KeyboardInterrupt):
        measure(manifest, encoder, [method], Store(tmp_path / "out", run_settings(manifest, encoder, plan)), plan)
    method.stop, method.calls = None, []
    again = measure(manifest, encoder, [method], Store(tmp_path / "out", run_settings(manifest, encoder, plan)), plan)
    assert method.calls == [2]
    for name, values in again["stubborn"].figures.items():
        if name != "seconds per pair":
            np.testing.assert_array_equal(values, whole.figures[name])
    assert again["stubborn"].ids == whole.ids and again["stubborn"].errors == [None] * 6
    # A part without its notes is measured again, never half known.
    (next((tmp_path / "out").rglob("notes-0001.json"))).unlink()
    measure(manifest, encoder, [method], Store(tmp_path / "out", run_settings(manifest, encoder, plan)), plan)
    assert method.calls == [2, 2]


def test_other_pairs_or_settings_are_refused(encoder: DualEncoder, tmp_path: Path):
    path = write_manifest(tmp_path / "pairs", 1)
    plan = Plan(faithfulness=False, stability=False)
    run_on(encoder, path, tmp_path / "out", "centre", plan=plan)
    with pytest.raises(ValueError, match=r"measured with other settings.*steps"):
        run_on(encoder, path, tmp_path / "out", "centre", plan=Plan(steps=3, faithfulness=False, stability=False))
    path.write_text(path.read_text().replace(draw_scene(0, 64).caption, "another caption"))
    with pytest.raises(ValueError, match=r"measured with other settings.*manifest"):
        run_on(encoder, path, tmp_path / "out", "centre", plan=plan)


def test_limit_takes_the_first_rows(encoder: DualEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "BLOCK", 2)
    path = write_manifest(tmp_path / "pairs", 6)
    plan = Plan(faithfulness=False, stability=False, limit=3)
    found, _ = run_on(encoder, path, tmp_path / "out", "centre", plan=plan)
    assert found["centre"].ids == ["pair-0", "pair-1", "pair-2"]
    with pytest.raises(ValueError, match="--limit: expected at least 1, got 0"):
        Plan(limit=0)


def test_a_manifest_without_rows_is_an_error(encoder: DualEncoder, tmp_path: Path):
    with pytest.raises(ValueError, match=r"FILE: .* has no pairs"):
        run_on(encoder, write_manifest(tmp_path, 0), tmp_path / "out", "centre")


def test_packed_pictures_are_measured_by_their_patches():
    layout = PackedLayout(mask_argument=2, shapes_argument=3)
    maps = torch.zeros(1, 8, 5)
    maps[0, :6] = torch.arange(6.0)[:, None] / 5
    pairs = SimpleNamespace(
        inputs=(maps, torch.zeros(1, 3)), additional_forward_args=(torch.ones(1, 8), torch.tensor([[2, 3]]))
    )
    (grid,) = grids_of(SimpleNamespace(layouts=(layout,)), pairs, maps)
    torch.testing.assert_close(grid, torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]))


def command(*arguments: Any) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmarks = parser.add_subparsers(required=True)
    add_pairs(benchmarks, lambda given: DualEncoder.from_pretrained(given.model))
    return parser.parse_args([str(argument) for argument in ("pairs", *arguments)])


def test_the_command_writes_tables_and_tells_of_errors(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = write_manifest(tmp_path / "pairs", 3, title=["a circle", "", "a star"], caption=["x"] * 3)
    output = tmp_path / "out"
    given = command(
        path, "--model", checkpoint, "--columns", "caption=title", "--output", output, "--steps", 4,
        "--method", "saliency", "centre",
    )  # fmt: skip
    given.run(given)
    told = capsys.readouterr().out
    assert "saliency: 1 of 3 rows are errors (1 caption), see rows.csv" in told and "faithfulness, pictures" in told
    assert f"written  {output / 'rows.csv'}" in told
    table = (output / "table.md").read_text()
    assert "| `saliency` |" in table and "localisation" not in table
    names = {row["figure"] for row in csv.DictReader((output / "summary.csv").read_text().splitlines())}
    assert {"image deletion", "text confidence drop", "score", "seconds per pair"} <= names
    assert not names & {figure.name for figure in FIGURES if figure.group.startswith("localisation")}
    given.run(given)
    assert capsys.readouterr().out == told


def test_the_command_refuses_unknown_methods_and_columns(checkpoint: Path, tmp_path: Path):
    path = write_manifest(tmp_path / "pairs", 1)
    for arguments, says in (
        (("--method", "guess"), "--method: expected some of m2ib.*got guess"),
        (("--columns", "caption"), "--columns: expected NAME=COLUMN"),
        (("--columns", "caption=nothing"), "columns: caption should be 'nothing'"),
        (("--steps", "0"), "--steps: expected at least 1"),
    ):
        given = command(path, "--model", checkpoint, "--output", tmp_path / "out", *arguments)
        with pytest.raises(ValueError, match=says):
            given.run(given)
    assert not (tmp_path / "out").exists()


def test_methods_that_a_model_cannot_have_are_left_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(self: Any, encoder: DualEncoder) -> Any:
        if self.name == "relevance":
            raise ValueError("layers: no attention here")
        return original(self, encoder)

    original = type(METHODS["centre"]).__call__
    monkeypatch.setattr(type(METHODS["centre"]), "__call__", refuse)
    path = write_manifest(tmp_path / "pairs", 1)
    base = (path, "--model", checkpoint, "--output", tmp_path / "out", "--without-faithfulness", "--without-stability")
    given = command(*base, "--method", "relevance", "centre")
    given.run(given)
    assert "left out  relevance: layers: no attention here" in capsys.readouterr().err
    given = command(*base, "--method", "relevance")
    with pytest.raises(ValueError, match="--method: none of them works on this model"):
        given.run(given)
