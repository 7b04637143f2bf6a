"""Figures against ground truth: perfect for a perfect map, at chance for a random one; what each group asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.methods import METHODS
from captum_m2ib.benchmark.scenes import measures as scenes
from captum_m2ib.benchmark.scenes.measures import (
    FIGURES,
    GROUPS,
    REDRAWS,
    Block,
    draw_probes,
    measure,
    pictures_on_truth,
    robustness,
    sanity,
    stability,
    words_on_truth,
)
from captum_m2ib.encoders.pairs import Pairs
from captum_m2ib.metrics import summarise
from captum_m2ib.scenes import CHECKPOINT, image_probes, token_probes

PICTURES = ("image pointing", "image mass", "image auroc", "image pointing, other caption", "image mass moved")
WORDS = ("text auroc", "text top-1", "text auroc, all words")


class Fake:
    """A method whose map of a picture and caption is looked up; it stands for its own encoder."""

    def __init__(self, images: Any = None, tokens: Any = None) -> None:
        self.images = images if images is not None else lambda *_: np.zeros((64, 64))
        self.tokens = tokens if tokens is not None else lambda *_: np.zeros(3)
        self.forward_func = self
        self.calls: list[tuple[str, int]] = []

    def prepare(self, images: Any, captions: Any) -> Any:
        given = list(zip(images, captions, strict=True))
        # The row of each pair travels in its pixels and its ids.
        start = len(self.seen) if hasattr(self, "seen") else 0
        self.seen = [*getattr(self, "seen", []), *given]
        rows = torch.arange(start, start + len(given))
        pixels = rows.float().view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
        names = tuple(tuple(caption.split()) for caption in captions)
        special = tuple((False,) * 40 for _ in captions)
        inputs = (pixels, rows.view(-1, 1).expand(-1, 40))
        return Pairs(inputs, (torch.ones(len(given), 40),), tuple(captions), names, special, tuple(images))

    def attribute(self, inputs: Any, additional_forward_args: Any) -> Any:
        if isinstance(inputs, torch.Tensor):
            assert len(additional_forward_args) == 2
            self.calls.append(("image", len(inputs)))
            maps = np.stack([self.images(*self.seen[int(row[0, 0, 0])]) for row in inputs])
            return torch.from_numpy(maps)[:, None].expand(-1, 3, -1, -1) / 3
        pixels, ids = inputs
        self.calls.append(("both", len(pixels)))
        rows = np.zeros((len(ids), 40))
        for row, one in zip(rows, ids[:, 0].tolist(), strict=True):
            bits = self.tokens(*self.seen[one])
            row[1 : 1 + len(bits)] = bits
        return torch.zeros(len(rows), 3, 64, 64), torch.from_numpy(rows)


def key(image: np.ndarray, caption: str) -> tuple[bytes, str]:
    return image.tobytes(), caption


def on_pictures(fake: Fake, probes: Any) -> dict[str, list[float]]:
    found = scenes.localisation(Block(fake, probes, token_probes(1, 0)))
    return {name: found[name] for name in PICTURES}


def on_words(fake: Fake, probes: Any) -> dict[str, list[float]]:
    return words_on_truth(Block(fake, (), probes))


def test_a_perfect_image_map_is_perfect():
    probes = image_probes(30, 0)
    truth = {key(p.image, p.caption): p.mask for p in probes}
    truth |= {key(p.image, p.wrong_caption): p.wrong_mask for p in probes}
    fake = Fake(images=lambda image, caption: truth[key(image, caption)].astype(np.float64))
    for name, values in on_pictures(fake, probes).items():
        assert values == pytest.approx([1.0] * 30), name
    assert pictures_on_truth(Block(fake, probes, ())) == {name: [1.0] * 30 for name in PICTURES[:3]}


def test_a_map_that_ignores_the_caption_moves_nothing():
    probes = image_probes(10, 1)
    truth = {p.image.tobytes(): p.mask for p in probes}
    figures = on_pictures(Fake(images=lambda image, _: truth[image.tobytes()].astype(np.float64)), probes)
    assert figures["image pointing"] == [1.0] * 10
    assert figures["image pointing, other caption"] == figures["image mass moved"] == [0.0] * 10


def test_a_random_image_map_is_at_chance():
    probes, rng = image_probes(200, 0), np.random.default_rng(0)
    figures = on_pictures(Fake(images=lambda *_: rng.random((64, 64))), probes)
    area = np.array([probe.mask.mean() for probe in probes])
    other = np.array([probe.wrong_mask.mean() for probe in probes])
    for name, expected in zip(PICTURES, (area, area, 0.5, other, 0.0), strict=True):
        difference = np.array(figures[name]) - expected
        assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(probes)), name


def test_only_what_speaks_for_a_place_counts_as_mass():
    probe = image_probes(1, 0)[0]

    def signed(image: np.ndarray, caption: str) -> np.ndarray:
        return np.where(probe.mask, 1.0, -5.0)

    assert on_pictures(Fake(images=signed), [probe])["image mass"] == [1.0]


def test_perfect_token_bits_are_perfect_and_opposite_ones_all_wrong():
    probes = token_probes(30, 0)
    present = {key(p.image, p.caption): p.present_words for p in probes}
    absent = {key(p.image, p.caption): p.absent_words for p in probes}

    def at(where: dict[Any, Any]) -> Any:
        return lambda image, caption: np.isin(np.arange(len(caption.split())), where[key(image, caption)]) * 2.5

    assert all(len(p.caption.split()) == len(p.scene.words) for p in probes)
    assert on_words(Fake(tokens=at(present)), probes) == {name: [1.0] * 30 for name in WORDS}
    figures = on_words(Fake(tokens=at(absent)), probes)
    assert figures["text auroc"] == figures["text top-1"] == [0.0] * 30
    assert max(figures["text auroc, all words"]) < 0.5


def test_bits_of_filler_words_count_in_one_figure_only():
    probes = token_probes(10, 2)

    def filler(image: np.ndarray, caption: str) -> np.ndarray:
        probe = next(p for p in probes if key(p.image, p.caption) == key(image, caption))
        words = np.full(len(probe.scene.words), 9.0)
        words[list(probe.present_words)], words[list(probe.absent_words)] = 1.0, 0.0
        return words

    figures = on_words(Fake(tokens=filler), probes)
    assert figures["text auroc"] == figures["text top-1"] == [1.0] * 10
    for probe, value in zip(probes, figures["text auroc, all words"], strict=True):
        assert value == pytest.approx(2 / (len(probe.scene.words) - 2))


def test_random_token_bits_are_at_chance():
    probes, rng = token_probes(200, 0), np.random.default_rng(0)
    figures = on_words(Fake(tokens=lambda _, caption: rng.random(len(caption.split()))), probes)
    for name, values in figures.items():
        assert abs(np.mean(values) - 0.5) < 4 * np.std(values) / np.sqrt(len(probes)), name


def test_equal_token_bits_are_at_chance():
    figures = on_words(Fake(tokens=lambda _, caption: np.ones(len(caption.split()))), token_probes(5, 0))
    assert figures == {name: pytest.approx([0.5] * 5) for name in WORDS}


def test_maps_are_made_once_and_shared_with_the_first_probes():
    rng = np.random.default_rng(0)
    fake = Fake(lambda *_: rng.random((64, 64)), lambda _, caption: rng.random(len(caption.split())))
    whole = Block(fake, image_probes(5, 0), token_probes(5, 0))
    part = whole.first(2)
    first, found = scenes.localisation(part), scenes.localisation(whole)
    assert first == {name: values[:2] for name, values in found.items()}
    assert fake.calls == [("image", 5), ("image", 5), ("both", 5)]
    assert len(part.worded) == 2 and torch.equal(part.worded.inputs[1], whole.worded.inputs[1][:2])


def test_measure_gathers_every_figure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scenes, "localisation", lambda block: {"image auroc": [p.mask.mean() for p in block.pictures]})
    # The probes are drawn at the size that the model receives.
    prepared = SimpleNamespace(inputs=(torch.zeros(1, 3, 32, 32),))
    method: Any = SimpleNamespace(forward_func=SimpleNamespace(prepare=lambda *_: prepared))
    found = measure(method, 30, 7)
    expected = summarise([float(probe.mask.mean()) for probe in image_probes(30, 7, 32)])
    assert list(found) == ["image auroc"] and str(found["image auroc"]) == str(expected)
    with pytest.raises(ValueError, match=r"^probes: expected at least 1, got 0"):
        measure(method, 0)


def test_every_figure_is_named_once_and_measured_by_one_group():
    names = [figure.name for figure in FIGURES]
    assert len(set(names)) == len(names) and {figure.better for figure in FIGURES} == {-1, 0, 1}


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


def block_of(name: str, encoder: DualEncoder, probes: int = 2) -> Block:
    method = METHODS[name]
    return Block(method(encoder), *draw_probes(encoder, probes, 0), method, method.family.seeded)


def test_every_group_measures_the_figures_that_are_named(encoder: DualEncoder):
    block = block_of("relevance", encoder)
    found = {name: values for group in GROUPS.values() for name, values in group(block).items()}
    named = [figure.name for figure in FIGURES if figure.group != "cost"]
    assert sorted(found) == sorted(named)
    assert all(len(values) == 2 and np.isfinite(values).all() for values in found.values())


def test_sanity_tells_maps_that_know_nothing(encoder: DualEncoder):
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    statistics = dict(encoder.statistics)
    known, nothing = sanity(block_of("relevance", encoder)), sanity(block_of("centre", encoder))
    assert nothing["image prompt sensitivity"] == pytest.approx([0.0] * 2)
    assert nothing["image random model"] == nothing["image random model, by chance"] == pytest.approx([1.0] * 2)
    assert nothing["image random model, signed"] == pytest.approx([1.0] * 2)
    assert min(known["image prompt sensitivity"]) > 0.05 and max(known["image random model"]) < 0.9
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert encoder.statistics == statistics and statistics


def test_chance_is_what_maps_of_other_pictures_have_in_common(encoder: DualEncoder):
    generator = torch.Generator().manual_seed(0)

    class Drawn:
        """Maps that no pixel has a part in, new ones at each call, as smooth as a column is long."""

        def __init__(self, encoder: DualEncoder) -> None:
            self.forward_func = encoder

        def attribute(self, inputs: Any, **kwargs: Any) -> Any:
            pixels, *ids = inputs if isinstance(inputs, tuple) else (inputs,)
            columns = torch.randn(len(pixels), 1, 1, pixels.shape[-1], generator=generator)
            maps = columns.expand(-1, *pixels.shape[1:])
            return (maps, ids[0].float()) if ids else maps

    pictures, captions = draw_probes(encoder, 24, 0)
    block = Block(METHODS["centre"](encoder), pictures, captions[:1], lambda encoder: Drawn(encoder))
    found = sanity(block)
    # Ranks of 64 independent columns: a normal deviate of 1 / sqrt(63).
    expected = (2 / np.pi / 63) ** 0.5
    assert np.mean(found["image random model, by chance"]) == pytest.approx(expected, rel=0.2)
    assert np.mean(found["image random model"]) == pytest.approx(expected, rel=0.4)
    # The mean of three correlations of each of 24 pairs.
    assert abs(np.mean(found["image random model, signed"])) < 3 / (63 * 3 * 24) ** 0.5
    redraws = np.abs(found["image random model, signed"]) <= np.array(found["image random model"]) + 1e-9
    assert redraws.all()


def test_sanity_takes_no_prior_from_the_model_that_was_trained(encoder: DualEncoder):
    seen = []

    def make(encoder: DualEncoder) -> Any:
        seen.append(dict(encoder.statistics))
        return METHODS["centre"](encoder)

    sanity(Block(make(encoder), *draw_probes(encoder, 1, 0), make))
    assert seen[0] and seen[1:] == [{}] * 2 * (1 + REDRAWS)


def test_stability_is_of_methods_that_draw(encoder: DualEncoder):
    assert stability(block_of("relevance", encoder)) == {"image seeds": [1.0] * 2, "text seeds": [1.0] * 2}
    random = stability(block_of("random", encoder))
    assert max(np.abs(random["image seeds"])) < 0.1


def test_robustness_of_a_map_that_never_moves(encoder: DualEncoder):
    found = robustness(block_of("centre", encoder))
    assert found["image sensitivity"] == found["text sensitivity"] == [0.0] * 2
    assert min(found["image infidelity"]) >= 0


def test_sanity_needs_a_way_to_make_the_method_anew(encoder: DualEncoder):
    with pytest.raises(ValueError, match=r"^make: expected a function"):
        sanity(Block(METHODS["centre"](encoder), (), ()))
