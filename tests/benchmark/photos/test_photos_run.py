"""``captum-m2ib benchmark photos`` on small models: right figures, runs that go on, and what it refuses."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coco_cases import annotation, usual, write_coco
from commands import Result, Run, assert_one_line, runner
from PIL import Image

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.faithfulness import faithfulness
from captum_m2ib.benchmark.methods import METHODS, Family, Method
from captum_m2ib.benchmark.parts import Model
from captum_m2ib.benchmark.photos import measures
from captum_m2ib.benchmark.photos import run as photos_run
from captum_m2ib.benchmark.photos.ablation import ABLATION
from captum_m2ib.benchmark.photos.coco import Photos, read_photos
from captum_m2ib.benchmark.photos.measures import FIGURES, Block
from captum_m2ib.benchmark.photos.probes import Known
from captum_m2ib.benchmark.photos.run import Plan, Probes, choose_probes, measure_all, run_settings
from captum_m2ib.benchmark.store import Store
from captum_m2ib.benchmark.tables import WIDTH
from captum_m2ib.metrics import auroc, pointing_game, relevance_mass

pytestmark = pytest.mark.filterwarnings("ignore:captions")

PLAN = Plan(steps=3)


@pytest.fixture(scope="module")
def encoder(checkpoint: Path) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Photos:
    return read_photos(write_coco(tmp_path_factory.mktemp("coco") / "data", usual()), "instances.json")


@pytest.fixture(scope="module")
def probes(photos: Photos) -> Probes:
    return choose_probes([Known(photo, name, 1, 0.2) for photo in photos.photos for name in photo.outlines], PLAN)


class Fake:
    """Each picture's map is the place that is looked up for the caption: its truth, or something else."""

    def __init__(self, encoder: DualEncoder, boxes: dict[str, tuple[int, int, int, int]]) -> None:
        self.forward_func, self.boxes = encoder, boxes

    def attribute(self, pixels: torch.Tensor, additional_forward_args: Any) -> torch.Tensor:
        tokenizer: Any = self.forward_func.processor.tokenizer
        maps = torch.zeros_like(pixels)
        for row, ids in zip(maps, additional_forward_args[0], strict=True):
            left, top, right, bottom = self.boxes[tokenizer.decode(ids, skip_special_tokens=True).split()[-1]]
            row[:, top:bottom, left:right] = 1.0
        return maps


def test_figures_are_those_of_the_metrics(encoder: DualEncoder, probes: Probes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measures, "perf_counter", iter([1.0, 7.0]).__next__)
    block = Block(METHODS["saliency"](encoder), probes.photos[:3], 3)
    found = {**measures.photographs(block), **measures.faithfulness(block)}
    assert set(found) == {figure.name for figure in FIGURES if not figure.name.startswith("mosaic")}
    pairs = encoder.prepare([one.picture for one in block.shown], [one.caption for one in block.shown])
    (pixels, ids), rest = pairs.inputs, pairs.additional_forward_args
    maps = METHODS["saliency"](encoder).attribute(pixels, (ids, *rest))
    truth = torch.zeros(3, 64, 64, dtype=torch.bool)
    for row, one in zip(truth, block.shown, strict=True):
        small = one.region.convert("L").resize((64, 64), Image.Resampling.BOX)
        row |= torch.from_numpy(np.asarray(small) >= 128)
    for name, metric in (("pointing", pointing_game), ("mass", relevance_mass), ("auroc", auroc)):
        np.testing.assert_allclose(found[f"image {name}"], metric(maps, truth), rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(found["image area"], truth.double().mean((1, 2)))
    for name, values in faithfulness(encoder, (pixels, ids), (maps, None), rest, steps=3).items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    assert found["seconds per pair"] == [2.0] * 3


def test_a_right_map_is_right_for_both_captions(encoder: DualEncoder, photos: Photos):
    third = next(photo for photo in photos.photos if photo.id == 3)
    asked = choose_probes([Known(third, name, 1, 0.2) for name in third.outlines], PLAN).photos
    assert [(probe.name, probe.other) for probe in asked] == [("cross", "star"), ("star", "cross")]
    # Wholly inside of the two rectangles, at 64 pixels for 120 and for 80.
    right = {"cross": (23, 18, 35, 46), "star": (40, 10, 49, 54)}
    found = measures.localisation(Block(Fake(encoder, right), asked))
    for name in ("pointing", "mass", "pointing, other caption", "mass moved"):
        assert found[f"image {name}"] == pytest.approx([1.0, 1.0]), name
    swapped = measures.localisation(Block(Fake(encoder, {"cross": right["star"], "star": right["cross"]}), asked))
    for name, expected in (("pointing", 0.0), ("mass", 0.0), ("pointing, other caption", 0.0), ("mass moved", -1.0)):
        assert swapped[f"image {name}"] == pytest.approx([expected] * 2), name


class Stub:
    """A map from the picture alone, and how often it was asked."""

    calls = 0
    fails_after = 10**9

    def __init__(self, encoder: DualEncoder) -> None:
        self.forward_func = encoder

    def attribute(self, pixels: torch.Tensor, additional_forward_args: Any) -> torch.Tensor:
        type(self).calls += 1
        if type(self).calls > self.fails_after:
            raise KeyboardInterrupt
        return pixels.abs()


STUBS = [Method(name, Family(name, Stub)) for name in ("m2ib", "rival")]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stub, "calls", 0)
    monkeypatch.setattr(photos_run, "BLOCK", 3)
    # What is measured of a map must not depend on when it is measured.
    monkeypatch.setattr(measures, "perf_counter", lambda: 0.0)


def measured(folder: Path, encoder: DualEncoder, photos: Photos, probes: Probes) -> Any:
    model = Model("small", "", encoder)
    return measure_all(model, STUBS, probes, PLAN, Store(folder, run_settings(photos, model, PLAN)))


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.json")}


def test_every_probe_has_a_value(encoder: DualEncoder, photos: Photos, probes: Probes, tmp_path: Path):
    values = measured(tmp_path, encoder, photos, probes)
    assert list(values) == ["m2ib", "rival"] and len(probes.photos) == len(probes.mosaics) == 7
    for name in ("image pointing", "image deletion", "mosaic auroc", "seconds per pair"):
        assert np.isfinite(values["m2ib"][name][0]).tolist() == [True] * 7, name
    has_other = [probe.other is not None for probe in probes.photos]
    assert np.isfinite(values["m2ib"]["image mass moved"][0]).tolist() == has_other


def test_an_interrupted_run_goes_on(
    encoder: DualEncoder, photos: Photos, probes: Probes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole, written = measured(tmp_path / "whole", encoder, photos, probes), files(tmp_path / "whole")
    assert Stub.calls > 8
    for after in (1, 4, 8):
        stopped = tmp_path / f"stopped{after}"
        monkeypatch.setattr(Stub, "calls", 0)
        monkeypatch.setattr(Stub, "fails_after", after)
        with pytest.raises(KeyboardInterrupt):
            measured(stopped, encoder, photos, probes)
        done = files(stopped)
        monkeypatch.setattr(Stub, "fails_after", 10**9)
        np.testing.assert_equal(measured(stopped, encoder, photos, probes), whole)
        assert files(stopped) == written
        assert done.items() <= written.items()
        # Finished, it is only read.
        monkeypatch.setattr(Stub, "fails_after", -1)
        np.testing.assert_equal(measured(stopped, encoder, photos, probes), whole)


def test_other_probes_or_options_are_refused(encoder: DualEncoder, photos: Photos, probes: Probes, tmp_path: Path):
    measured(tmp_path, encoder, photos, probes)
    with pytest.raises(ValueError, match=r"^--output: .* \(steps: 3 there, 4 here\)"):
        Store(tmp_path, run_settings(photos, Model("small", "", encoder), Plan(steps=4)))
    fewer = Probes(probes.named, probes.photos[1:], probes.mosaics)
    with pytest.raises(ValueError, match=r"^--output: .* was measured with other settings \(probes: "):
        measured(tmp_path, encoder, photos, fewer)


def test_a_method_that_does_not_work_is_left_out(
    encoder: DualEncoder, photos: Photos, probes: Probes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class Broken(Stub):
        def attribute(self, *_: Any, **__: Any) -> torch.Tensor:
            raise ValueError("layers: there is no attention")

    model = Model("small", "", encoder)
    store = Store(tmp_path, run_settings(photos, model, PLAN))
    broken = Method("broken", Family("broken", Broken))
    assert list(measure_all(model, [broken, STUBS[0]], probes, PLAN, store)) == ["m2ib"]
    assert capsys.readouterr().err == "left out  broken: layers: there is no attention\n"
    with pytest.raises(ValueError, match=r"^--method: none of them works on this model \(broken: layers"):
        measure_all(model, [broken], probes, PLAN, store)


def test_what_the_model_does_not_know_is_not_asked(photos: Photos):
    named = [Known(photo, name, 3, 0.2) for photo in photos.photos for name in photo.outlines]
    with pytest.raises(ValueError, match=r"^--rank: of 7 categories .* the model names 0 among its first 2"):
        choose_probes(named, Plan(rank=2))
    assert str(choose_probes(named, Plan(rank=3))).startswith("5 photographs hold 7 categories; ")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    write_coco(tmp_path / "data", usual())
    photos = runner(capsys, monkeypatch, "benchmark", "photos")

    def call(*arguments: Any, model: Any = checkpoint, data: Any = "data") -> Result:
        return photos("--data", data, "--model", model, *arguments)

    return call


FEW = ("--method", "saliency", "centre", "--steps", 3, "--output", "out")


def test_the_command(run: Run, tmp_path: Path):
    status, out, err = run(*FEW)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("5 photographs hold 7 categories; the model's first name is right in ")
    assert lines[1] == "asked of 7 photographs with masks, 7 mosaics"
    assert max(map(len, lines[:-1])) <= WIDTH
    for head in ("localisation, photographs", "localisation, mosaics", "faithfulness, photographs", "cost"):
        assert any(line.startswith(head) for line in lines), head
    written = {"figures.csv", "summary.csv", "table.md", "names.csv", "examples.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"run.json", "parts", *written}
    rows = list(csv.DictReader((tmp_path / "out" / "figures.csv").read_text().splitlines()))
    assert {row["model"] for row in rows} == {"checkpoint"} and {row["method"] for row in rows} == {
        "saliency",
        "centre",
    }
    names = list(csv.DictReader((tmp_path / "out" / "names.csv").read_text().splitlines()))
    assert len(names) == 7 and {row["photograph"] for row in names} == {row["mosaic"] for row in names} == {"1"}
    with Image.open(tmp_path / "out" / "examples.png") as page:
        assert np.asarray(page).std() > 10
    # Again: nothing is measured, all is the same.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").rglob("*.json")}
    assert run(*FEW).out == out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "parts").rglob("*.json")} == before
    assert_one_line(run(*FEW, "--split", "validation"), r"--output: .*run.json .*split: 'test' there")


def test_every_method_is_asked_unless_some_are_named(run: Run, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []

    def stop(_: Any, methods: list[Method], *rest: Any, **options: Any) -> None:
        asked.extend(method.name for method in methods)
        raise KeyboardInterrupt

    monkeypatch.setattr(photos_run, "measure_all", stop)
    status, _, err = run("--output", "out")
    assert status == 130 and "same command again" in err
    assert {"m2ib", "m2ib-published", "nib", "integrated-gradients", "occlusion", "centre", "random"} <= set(asked)
    assert "rise" not in asked and not any(name.endswith("-tuned") for name in asked)
    asked.clear()
    assert run("--ablation", "--output", "changed").status == 130
    assert asked == [method.name for method in ABLATION] and asked[0] == "m2ib"


def test_what_is_changed_changes_the_map(encoder: DualEncoder):
    pairs = encoder.prepare([np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)], "a red disc")
    (pixels, ids), rest = pairs.inputs, pairs.additional_forward_args
    maps = {method.name: method(encoder).attribute(pixels, (ids, *rest)) for method in ABLATION}
    assert len(maps) == len(ABLATION)
    default = maps.pop("m2ib")
    for name, changed in maps.items():
        assert changed.shape == default.shape and float((changed - default).abs().max()) > 0, name


def test_without_masks_there_are_mosaics_and_no_faithfulness(run: Run, tmp_path: Path):
    write_coco(tmp_path / "bare", [annotation(number, 1 + number // 2 % 2, None) for number in range(1, 13)])
    status, out, err = run(*FEW, data="bare")
    assert (status, err) == (0, "") and "asked of 0 photographs with masks, 6 mosaics" in out
    assert "localisation, mosaics" in out and "faithfulness" not in out and "localisation, photographs" not in out


def test_faithfulness_can_be_left_out(run: Run):
    status, out, _ = run(*FEW, "--without-faithfulness", "--limit", 4)
    assert status == 0 and "faithfulness" not in out and "4 photographs" in out


FACTORY = """
from captum_m2ib import DualEncoder

def model():
    return DualEncoder.from_pretrained({checkpoint!r})

def bare():
    encoder = model()
    encoder.processor = None
    return encoder

def number():
    return 7

def failing():
    import not_to_be_found_anywhere
"""


def test_a_model_of_one_s_own_comes_from_a_function(run: Run, tmp_path: Path, checkpoint: Path):
    (tmp_path / "own_photo_model.py").write_text(FACTORY.format(checkpoint=str(checkpoint)))
    plain = run(*FEW)
    status, out, err = run(*FEW[:-1], "own", model="own_photo_model:model")
    assert (status, err) == (0, "") and out.replace("own/", "out/") == plain.out
    for function, says in (
        ("bare", r"model: expected own_photo_model:bare to return a DualEncoder with a processor, got one without"),
        ("number", "model: expected own_photo_model:number to return a DualEncoder with a processor, got int"),
        ("none", "model: own_photo_model has no function none"),
    ):
        assert_one_line(run(*FEW[:-1], "other", model=f"own_photo_model:{function}"), says)
    assert_one_line(
        run(*FEW, model="no_such.module:model"), "model: there is no module no_such for no_such.module:model"
    )
    assert_one_line(
        run(*FEW[:-1], "other", model="own_photo_model:failing"),
        "model: own_photo_model:failing needs what cannot be imported here: No module named 'not_to_be_found_anywhere'",
    )


@pytest.mark.parametrize(
    "given, says",
    [
        (("--rank", 0), "--rank: expected at least 1, got 0"),
        (("--limit", 0), "--limit: expected at least 1, got 0"),
        (("--steps", 0), "--steps: expected at least 1, got 0"),
        (("--seed", -1), "--seed: expected at least 0, got -1"),
        (("--method", "m2ib", "magic"), "--method: expected some of m2ib, .*, got magic"),
        (("--annotations", "none.json"), "--annotations: there is no file none.json"),
        (("--data", "none"), "--data: none is not a directory"),
        (("--model", "./none"), "model: ./none is not a directory"),
        (("--device", "abacus"), "--device: there is no 'abacus' here"),
        (("--settings", "none"), ".*none"),
        (("--ablation", "--method", "nib"), "--ablation: brings its own methods, got --method nib; leave out one"),
    ],
)
def test_arguments_that_cannot_be(run: Run, tmp_path: Path, given: tuple[Any, ...], says: str):
    assert_one_line(run(*given, "--output", "out"), says)
    assert not (tmp_path / "out").exists()


def test_a_missing_picture_ends_in_one_sentence(run: Run, tmp_path: Path):
    (tmp_path / "data" / "images" / "000000000003.png").unlink()
    assert_one_line(run(*FEW), "--data: data lacks 1 of 5 pictures, 000000000003.png among them")
