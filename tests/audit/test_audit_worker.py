"""The worker: what a row gets depends on the row alone, errors and memory included."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from audit_cases import QUICK, png

from captum_m2ib import RISE, DualEncoder, MultiModalInfoBottleneck, explain
from captum_m2ib.attr.registry import METHODS
from captum_m2ib.audit import Worker
from captum_m2ib.audit.measures import half_scores
from captum_m2ib.audit.results import CHECKS, FIGURES
from captum_m2ib.engine.units import per_patch
from captum_m2ib.scenes import CHECKPOINT, draw_scene

SCENES = [draw_scene(index, 48) for index in range(7)]
BATCH: dict[str, list[Any]] = {
    "id": [f"scene-{index}" for index in range(len(SCENES))],
    "image": [png(scene.image) for scene in SCENES],
    "caption": [scene.caption for scene in SCENES],
}


def part(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
    return {name: [column[index] for index in indices] for name, column in batch.items()}


def assert_rows_equal(found: dict[str, list[Any]], i: int, expected: dict[str, list[Any]], j: int) -> None:
    assert found["tokens"][i] == expected["tokens"][j] and found["error"][i] == expected["error"][j]
    for name in CHECKS:
        assert found[name][i] == expected[name][j]
    for name in FIGURES:
        one, other = found[name][i], expected[name][j]
        assert (one is None) == (other is None), name
        assert one is None or np.isclose(one, other, rtol=1e-3, atol=1e-5), (name, one, other)
    for name in ("map", "token_bits"):
        if expected[name][j] is not None:
            bits = np.asarray(expected[name][j], dtype=np.float64)
            assert np.allclose(found[name][i], bits, atol=2e-3 * bits.max()), name


@pytest.fixture(scope="module")
def whole(checkpoint: Path) -> dict[str, list[Any]]:
    return Worker(str(checkpoint), **QUICK)(BATCH)


def test_results_are_those_of_the_method(checkpoint: Path, whole: dict[str, list[Any]]):
    encoder = DualEncoder.from_pretrained(checkpoint)
    pairs = encoder.prepare(SCENES[2].image, SCENES[2].caption)
    (image_bits, token_bits), record = MultiModalInfoBottleneck(encoder).attribute_with_record(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args, check=True, **QUICK
    )
    units = record.modalities[0].units
    assert units is not None
    assert np.isclose(whole["image_bits"][2], image_bits.sum().item(), rtol=1e-3)
    assert np.isclose(whole["text_bits"][2], token_bits.sum().item(), rtol=1e-3)
    cells = per_patch(encoder.layouts[0], units)[0]
    assert np.allclose(whole["map"][2], cells.numpy(), atol=2e-3 * cells.max().item())
    assert np.allclose(whole["token_bits"][2], token_bits[0].numpy(), atol=2e-3 * token_bits.max().item())
    assert np.isclose(whole["score"][2], encoder(*pairs.inputs, *pairs.additional_forward_args).item(), atol=1e-5)
    assert np.isclose(whole["text_score"][2], record.modalities[1].score_after.item(), atol=1e-4)
    for name, one in zip(("image", "text"), record.modalities, strict=True):
        assert one.check is not None and whole[f"{name}_check"][2] == one.check.verdicts()[0]
        assert np.isclose(whole[f"{name}_margin"][2], one.check.margin.item(), rtol=1e-3, atol=1e-3)
        assert np.isclose(whole[f"{name}_kept"][2], one.check.kept.item(), rtol=1e-3, atol=1e-3)
    assert whole["map"][2].dtype == np.float16
    assert " ".join(whole["tokens"][2][1:-1]) == SCENES[2].caption


@pytest.mark.filterwarnings("error::captum_m2ib.NothingToExplainWarning")
def test_the_check_is_told_by_verdicts_and_can_be_left_out(checkpoint: Path, whole: dict[str, list[Any]]):
    # An untrained model has little to lose: what else is a warning is a verdict here.
    again = Worker(str(checkpoint), **QUICK)(part(BATCH, [0, 1]))
    assert [again["image_check"], again["text_check"]] == [whole["image_check"][:2], whole["text_check"][:2]]
    assert set(whole["image_check"] + whole["text_check"]) <= {"holds", "weak", "fails"}
    worker = Worker(str(checkpoint), check=False, **QUICK)
    found = worker(part(BATCH, [0, 1]))
    assert worker.settings["check"] is False
    for name in ("image", "text"):
        for figure in ("check", "margin", "kept"):
            assert found[f"{name}_{figure}"] == [None, None]
    assert np.allclose(found["score"], whole["score"][:2]) and found["error"] == [None, None]


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [6, 2, 4], [3]])
def test_results_do_not_depend_on_batch_size_or_order(
    batch_size: int, order: list[int], checkpoint: Path, whole: dict[str, list[Any]]
):
    found = Worker(str(checkpoint), batch_size=batch_size, internal_batch_size=3, **QUICK)(part(BATCH, order))
    assert found["id"] == [BATCH["id"][index] for index in order]
    for i, j in enumerate(order):
        assert_rows_equal(found, i, whole, j)


class Exhausted(Worker):
    """Runs out of memory above a number of pairs, or of rows in one pass."""

    def __init__(
        self, *args: Any, pairs: int = 10**9, rows: int = 10**9, failure: Any = MemoryError, **kw: Any
    ) -> None:
        super().__init__(*args, **kw)
        self.limits, self.failure = (pairs, rows), failure
        self.tried: list[tuple[int, int | None]] = []

    def _attribute(self, ready: Any, pairs: Any) -> Any:
        self.tried.append((len(ready), self.internal_batch_size))
        if len(ready) > self.limits[0] or (self.internal_batch_size or 10**9) > self.limits[1]:
            raise self.failure
        return super()._attribute(ready, pairs)


def test_running_out_of_memory_halves_the_batch_and_goes_on(checkpoint: Path, whole: dict[str, list[Any]]):
    worker = Exhausted(str(checkpoint), pairs=2, batch_size=5, **QUICK)
    found = worker(BATCH)
    assert found["error"] == [None] * len(SCENES)
    for index in range(len(SCENES)):
        assert_rows_equal(found, index, whole, index)
    assert worker.batch_size <= 2
    assert [count for count, _ in worker.tried if count > 2] == [5, 3]


@pytest.mark.parametrize("rows", [16, None])
def test_one_pair_that_does_not_fit_goes_through_in_smaller_passes(
    rows: int | None, checkpoint: Path, whole: dict[str, list[Any]]
):
    failure = RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes.")
    worker = Exhausted(str(checkpoint), rows=3, batch_size=2, internal_batch_size=rows, failure=failure, **QUICK)
    found = worker(part(BATCH, [0, 1, 2]))
    assert found["error"] == [None] * 3 and worker.internal_batch_size == (1 if rows is None else 2)
    for index in range(3):
        assert_rows_equal(found, index, whole, index)


def test_a_pair_that_never_fits_is_an_error_row(checkpoint: Path):
    found = Exhausted(str(checkpoint), rows=0, internal_batch_size=4, **QUICK)(part(BATCH, [0, 1]))
    assert found["error_kind"] == ["memory", "memory"] and found["score"] == [None, None]


class Poisoned(Worker):
    """The model fails whenever a certain pair is in the batch."""

    def _attribute(self, ready: Any, pairs: Any) -> Any:
        if any(pair.caption == SCENES[4].caption for pair in ready):
            raise RuntimeError("the model\ncannot bear this pair " + "x" * 1000)
        return super()._attribute(ready, pairs)


def test_a_pair_that_breaks_the_model_fails_alone(checkpoint: Path, whole: dict[str, list[Any]]):
    found = Poisoned(str(checkpoint), **QUICK)(BATCH)
    assert [kind is not None for kind in found["error_kind"]] == [index == 4 for index in range(len(SCENES))]
    assert found["error_kind"][4] == "model" and found["error"][4].startswith("the model cannot bear this pair")
    assert len(found["error"][4]) == 500
    for index in (0, 1, 2, 3, 5, 6):
        assert_rows_equal(found, index, whole, index)


def test_an_interrupt_is_not_taken_for_a_bad_row(checkpoint: Path):
    with pytest.raises(KeyboardInterrupt):
        Exhausted(str(checkpoint), pairs=0, failure=KeyboardInterrupt, **QUICK)(part(BATCH, [0]))


def test_a_model_that_cannot_be_loaded_is_no_fault_of_the_rows(tmp_path: Path):
    with pytest.raises((ValueError, OSError)):
        Worker(str(tmp_path / "no model"), **QUICK)(BATCH)


def test_a_model_comes_from_a_function(
    checkpoint: Path, whole: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    code = f"from captum_m2ib import DualEncoder\n\nmodel = lambda: DualEncoder.from_pretrained({str(checkpoint)!r})\n"
    (tmp_path / "own_audited_model.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    worker = Worker("own_audited_model:model", **QUICK)
    assert worker.model_name == "own_audited_model:model"
    assert_rows_equal(worker(part(BATCH, [2])), 0, whole, 2)


def test_a_copy_is_made_from_settings_alone(checkpoint: Path, whole: dict[str, list[Any]]):
    worker = Worker(str(checkpoint), batch_size=3, thumbnail=0, **QUICK)
    worker.load()
    rebuild, arguments = worker.__reduce__()
    assert arguments == ()
    copy = rebuild()
    assert copy._method is None and copy.settings == worker.settings and copy.batch_size == 3
    assert_rows_equal(copy(part(BATCH, [1])), 0, whole, 1)


def test_figures_that_were_asked_for(checkpoint: Path, whole: dict[str, list[Any]]):
    batch = {**BATCH, "contrast": [None, SCENES[1].caption, None, SCENES[0].caption, *[None] * 3]}
    boxes = [[[0, 0, 48, 48]], [[0, 0, 24, 48]], *[None] * 5]
    found = Worker(str(checkpoint), halves=True, **QUICK)({**batch, "boxes": boxes})
    for index in range(len(SCENES)):
        assert found["best_half_score"][index] is not None
        assert np.isclose(found["score"][index], whole["score"][index], atol=1e-5)
    assert [value is not None for value in found["contrast_similarity"]] == [i in (1, 3) for i in range(7)]
    assert np.isclose(found["contrast_similarity"][1], 1.0, atol=1e-4) and found["contrast"][1] == SCENES[1].caption
    assert np.isclose(found["inside_share"][0], 1.0) and np.isclose(found["inside_area"][0], 1.0)
    bits = np.asarray(found["map"][1], dtype=np.float64)
    # The reduction to patches is exact here: the box ends between two of them.
    assert np.isclose(found["inside_share"][1], bits[:, :4].sum() / bits.sum(), atol=5e-3)
    assert np.isclose(found["inside_area"][1], 0.5, atol=5e-3) and found["inside_area"][2] is None


def test_halves_are_scored_with_the_mean_colour_elsewhere():
    pixels = torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]], [[[8.0, 0.0], [0.0, 0.0]]]])
    bits = torch.tensor([[[0.1, 4.0], [0.2, 3.0]], [[1.0, 1.0], [1.0, 1.0]]])
    encoder: Any = lambda values, ids: values.flatten(1) @ torch.tensor([1.0, 10.0, 100.0, 1000.0])  # noqa: E731
    pairs: Any = SimpleNamespace(inputs=(pixels, torch.zeros(2, 1)), additional_forward_args=())
    found = list(half_scores(encoder, pairs, list(bits)))
    # Means are 3 and 2; of equal bits the first half counts as the best.
    assert [half["best_half_score"] for half in found] == [3 + 20 + 300 + 6000, 8 + 0 + 200 + 2000]
    assert [half["other_half_score"] for half in found] == [1 + 30 + 300 + 3000, 2 + 20 + 0 + 0]


def test_contrast_similarity_is_the_cosine_of_two_maps():
    settings: dict[str, Any] = {"n_steps": 6, "n_samples": 2}
    captions = [SCENES[3].caption, SCENES[0].caption]
    maps = Worker(**settings)({"image": [BATCH["image"][3]] * 2, "caption": captions})["map"]
    first, second = (grid.astype(np.float64).ravel() for grid in maps)
    expected = first @ second / np.sqrt((first @ first) * (second @ second))
    found = Worker(contrast=captions[1], **settings)(part(BATCH, [3]))["contrast_similarity"]
    assert expected < 0.99 and np.isclose(found[0], expected, atol=2e-3)


class Packed(Worker):
    """A model that reads pictures of any shape as packed patches, each with a grid of its own."""

    def _load(self) -> MultiModalInfoBottleneck:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        words = {**sizes, "vocab_size": 48, "max_position_embeddings": 32, "projection_size": 32}
        words |= {"bos_token_id": 1, "eos_token_id": 2}
        config = transformers.Siglip2Config(
            vision_config={**sizes, "patch_size": 8, "num_patches": 16}, text_config=words
        )
        pictures = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT)
        processor = SimpleNamespace(tokenizer=tokenizer, image_processor=pictures)
        return MultiModalInfoBottleneck(DualEncoder(transformers.Siglip2Model(config).eval(), processor=processor))


def test_maps_of_packed_patches_have_the_grid_of_their_picture():
    picture = SCENES[0].image
    batch = {"image": [picture, picture[:24], picture[:, :16]], "caption": ["a red star"] * 3}
    boxes = [[[0, 0, 24, 48]], [[0, 0, 48, 24]], None]
    found = Packed(halves=True, **QUICK)({**batch, "boxes": boxes})
    assert found["error"] == [None] * 3
    pictures = transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=16)
    shapes = pictures(images=batch["image"], return_tensors="pt")["spatial_shapes"].tolist()
    assert [list(grid.shape) for grid in found["map"]] == shapes and len(set(map(tuple, shapes))) == 3
    for bits, total in zip(found["map"], found["image_bits"], strict=True):
        assert np.isclose(bits.sum(dtype=np.float64), total, rtol=1e-2) and total > 0
    left = found["map"][0].astype(np.float64)
    assert np.isclose(found["inside_share"][0], left[:, :2].sum() / left.sum(), atol=0.01)
    assert np.isclose(found["inside_share"][1], 1, atol=0.01)


@pytest.mark.parametrize("name", [name for name, one in METHODS.items() if not one.late_only])
def test_every_method_by_its_name(name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    # Its 4000 masks take longer than all other methods together.
    attribute = RISE.attribute
    few = functools.wraps(attribute)(lambda *given, **named: attribute(*given, **{"n_masks": 200, **named}))
    monkeypatch.setattr(RISE, "attribute", few)
    settings = QUICK if METHODS[name].unit == "bits" else {}
    worker = Worker(str(checkpoint), method=name, halves=True, contrast=SCENES[0].caption, **settings)
    batch = {**part(BATCH, [1, 2]), "boxes": [[[0, 0, 24, 48]], None]}
    found = worker(batch)
    encoder = DualEncoder.from_pretrained(checkpoint)
    pictures = [SCENES[index].image for index in (1, 2)]
    # Six masks at a time or 80: the same maps.
    expected = explain(encoder, pictures, batch["caption"], method=name, **settings)
    assert found["error"] == [None, None] and found["method"] == [name] * 2
    for index, one in enumerate(expected):
        assert found["unit"][index] == one.unit == METHODS[name].unit
        scale = np.abs(one.patch_bits).max()
        assert np.allclose(found["map"][index], one.patch_bits, atol=2e-3 * scale)
        assert np.allclose(found["token_bits"][index], one.token_bits, atol=2e-3 * np.abs(one.token_bits).max())
        assert np.isclose(found["score"][index], one.score, atol=1e-5)
        assert one.check is not None
        for modality in ("image", "text"):
            of_check = one.check[modality]
            assert found[f"{modality}_check"][index] == of_check["verdict"]
            margin = of_check["lost_top"] - of_check["lost_random"]
            assert np.isclose(found[f"{modality}_margin"][index], margin, atol=1e-3)
            assert (found[f"{modality}_kept"][index] is None) == (one.unit != "bits")
            assert (found[f"{modality}_score"][index] is None) == (one.unit != "bits")
            assert (found[f"{modality}_bits"][index] is None) == (one.unit == "relative")
        assert found["best_half_score"][index] is not None
    # Of a map with two signs what lies above zero counts.
    above = expected[0].image_bits.clip(min=0).astype(np.float64)
    assert np.isclose(found["inside_share"][0], above[:, : above.shape[1] // 2].sum() / above.sum(), atol=1e-3)
    other = explain(encoder, pictures[0], SCENES[0].caption, method=name, check=False, **settings)[0].patch_bits
    first, second = (grid.astype(np.float64).ravel() for grid in (expected[0].patch_bits, other))
    cosine = first @ second / np.sqrt((first @ first) * (second @ second))
    assert np.isclose(found["contrast_similarity"][0], cosine, atol=2e-3)


def test_published_is_a_method_by_its_name():
    assert Worker(published=True).settings == Worker(method="m2ib-published").settings
    assert Worker().settings["method"] == "m2ib" and Worker(method="legrad", seed=4)._options == {}


def test_one_contrast_for_all_rows(checkpoint: Path):
    found = Worker(str(checkpoint), contrast=SCENES[0].caption, **QUICK)(part(BATCH, [0, 1]))
    assert np.isclose(found["contrast_similarity"][0], 1.0, atol=1e-4)
    assert found["contrast"] == [SCENES[0].caption] * 2


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"n_steps": 0}, "n_steps: expected"),
        ({"batch_size": 0}, "batch_size: expected"),
        ({"thumbnail": -1}, "thumbnail: expected"),
        ({"seed": -1}, "seed: expected"),
        ({"published": True, "layers": ["a", "b"]}, "leave out"),
        ({"published": True, "method": "legrad"}, "published: is a method of its own"),
        ({"method": "legard"}, r"^method: expected one of m2ib, .*, got 'legard'"),
        ({"method": "m2ib-published", "layers": ["a", "b"]}, "layers: those of m2ib-published are fixed"),
        ({"method": "legrad", "n_steps": 3, "joint": True}, "^n_steps, joint: legrad takes no such setting"),
        ({"contrast": " "}, "contrast: expected"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], says: str):
    with pytest.raises(ValueError, match=says):
        Worker(**settings)


def test_thumbnails_are_small_pictures_of_what_the_model_saw(whole: dict[str, list[Any]], checkpoint: Path):
    from captum_m2ib.audit.decode import read_picture

    shown = np.asarray(read_picture(whole["thumbnail"][0])).astype(float)
    assert shown.shape == (48, 48, 3) and np.abs(shown - SCENES[0].image).mean() < 12
    small = Worker(str(checkpoint), thumbnail=16, **QUICK)(part(BATCH, [0]))["thumbnail"][0]
    assert read_picture(small).size == (16, 16)
    make: Callable[..., Worker] = Worker
    assert make(str(checkpoint), thumbnail=0, **QUICK)(part(BATCH, [0]))["thumbnail"] == [None]


def test_a_model_of_other_pairs_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = f"""from captum_m2ib import DualEncoder

def model():
    loaded = DualEncoder.from_pretrained({str(checkpoint)!r})
    return DualEncoder(loaded.model, modalities=("image", "image"), processor=loaded.processor)
"""
    (tmp_path / "own_siamese_model.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^model: audits take pictures, sounds or .* compares image with image; "):
        Worker("own_siamese_model:model").load()
