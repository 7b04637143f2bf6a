"""Figures against ground truth: right by hand, perfect for a perfect map, at chance for a random one."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark import scenes
from captum_m2ib.benchmark.methods import METHODS
from captum_m2ib.benchmark.scenes import (
    Estimate,
    auroc,
    bootstrap,
    image_figures,
    measure,
    pointing_game,
    relevance_mass,
    render,
    token_figures,
)
from captum_m2ib.scenes import CHECKPOINT, image_probes, token_probes

BITS = np.array([[0, 1, 2, 0], [0, 4, 4, 0], [1, 0, 3, 0], [4, 0, 0, 1]], dtype=np.float64)
MASK = np.zeros((4, 4), dtype=bool)
MASK[1:3, 1:3] = True


def test_by_hand():
    # Three maxima of 4, two of them on the mask; 4 + 4 + 0 + 3 of 20 bits on it.
    assert pointing_game(BITS, MASK) == pytest.approx(2 / 3)
    assert relevance_mass(BITS, MASK) == pytest.approx(11 / 20)
    # Off the mask: 4, 2, 1, 1, 1 and seven zeros. 4 beats 11 and ties with 1, twice; 3 beats 11; 0 ties with 7.
    assert auroc(BITS.ravel(), MASK.ravel()) == pytest.approx((2 * 11.5 + 11 + 3.5) / (4 * 12))


def test_pointing_game_is_a_hit_or_a_miss_where_nothing_ties():
    on, off = np.zeros((4, 4)), np.zeros((4, 4))
    on[2, 2], off[0, 0] = 1e-30, 1e-30
    assert pointing_game(on, MASK) == 1 and pointing_game(off, MASK) == 0


def test_a_map_without_bits_is_at_chance_and_holds_no_mass():
    nothing = np.zeros((4, 4))
    assert pointing_game(nothing, MASK) == MASK.mean()
    assert relevance_mass(nothing, MASK) == 0
    assert auroc(nothing.ravel(), MASK.ravel()) == 0.5


def test_an_even_map_is_at_chance():
    assert relevance_mass(np.full((4, 4), 0.3), MASK) == pytest.approx(MASK.mean())
    assert auroc(np.full(16, 0.3), MASK.ravel()) == 0.5


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30).filter(
        lambda rows: len({label for _, label in rows}) == 2
    )
)
@settings(max_examples=100, deadline=None)
def test_auroc_is_what_counting_pairs_gives(rows: list[tuple[int, bool]]):
    scores, labels = np.array([s for s, _ in rows], dtype=np.float64), np.array([label for _, label in rows])
    wins = [float(p > n) + 0.5 * float(p == n) for p in scores[labels] for n in scores[~labels]]
    assert auroc(scores, labels) == pytest.approx(np.mean(wins), abs=1e-12)
    assert auroc(-scores, labels) == pytest.approx(1 - np.mean(wins), abs=1e-12)
    assert auroc(np.exp(scores), labels) == pytest.approx(np.mean(wins), abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
@settings(max_examples=30, deadline=None)
def test_bootstrap_interval_lies_within_the_values(values: list[float]):
    found = bootstrap(values, draws=200)
    assert found.mean == pytest.approx(np.mean(values))
    assert min(values) - 1e-12 <= found.low <= found.high <= max(values) + 1e-12
    assert found == bootstrap(values, draws=200)


def test_bootstrap_interval_holds_the_mean_and_is_as_wide_as_its_error():
    values = np.random.default_rng(0).normal(2, 3, 400).tolist()
    found = bootstrap(values)
    error = np.std(values) / np.sqrt(len(values))
    assert found.low < found.mean < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert bootstrap(values, seed=1) != found and bootstrap(values, seed=1).mean == found.mean


def test_bootstrap_of_constant_values():
    assert bootstrap([0.25] * 7) == Estimate(0.25, 0.25, 0.25) == bootstrap([0.25])


class Fake:
    """A method whose map of a picture and caption is looked up; it stands for its own encoder."""

    def __init__(self, images: Any = None, tokens: Any = None) -> None:
        self.images, self.tokens = images, tokens
        self.forward_func = self
        self.batches: list[int] = []
        self.settings: list[dict[str, Any]] = []

    def prepare(self, images: Any, captions: Any) -> Any:
        self.given = list(zip(images, captions, strict=True))
        self.batches.append(len(self.given))
        count = len(self.given)
        inputs = (torch.zeros(count, 3, 64, 64), torch.zeros(count, 40, dtype=torch.long))
        return SimpleNamespace(inputs=inputs, additional_forward_args=(torch.ones(count, 40),))

    def attribute(self, inputs: Any, additional_forward_args: Any, **settings: Any) -> Any:
        self.settings.append(settings)
        if isinstance(inputs, torch.Tensor):
            assert len(additional_forward_args) == 2
            maps = np.stack([self.images(image, caption) for image, caption in self.given])
            return torch.from_numpy(maps)[:, None].expand(-1, 3, -1, -1) / 3
        assert len(inputs) == 2 and len(additional_forward_args) == 1
        rows = np.zeros((len(self.given), 40))
        for row, (image, caption) in zip(rows, self.given, strict=True):
            bits = self.tokens(image, caption)
            row[1 : 1 + len(bits)] = bits
        return torch.zeros(len(rows), 3, 64, 64), torch.from_numpy(rows)


def key(image: np.ndarray, caption: str) -> tuple[bytes, str]:
    return image.tobytes(), caption


def test_a_perfect_image_map_is_perfect():
    probes = image_probes(30, 0)
    truth = {key(p.image, p.caption): p.mask for p in probes}
    truth |= {key(p.image, p.wrong_caption): p.wrong_mask for p in probes}
    fake = Fake(images=lambda image, caption: truth[key(image, caption)].astype(np.float64))
    figures = image_figures(fake, probes, seed=4)
    assert set(figures) == {"pointing", "mass", "auroc", "pointing, other caption", "mass moved"}
    for name, values in figures.items():
        assert values == pytest.approx([1.0] * 30), name
    assert fake.batches == [25, 25, 5, 5] and fake.settings == [{"seed": 4}] * 4


def test_a_map_that_ignores_the_caption_moves_nothing():
    probes = image_probes(10, 1)
    truth = {p.image.tobytes(): p.mask for p in probes}
    figures = image_figures(Fake(images=lambda image, _: truth[image.tobytes()].astype(np.float64)), probes)
    assert figures["pointing"] == [1.0] * 10
    assert figures["pointing, other caption"] == figures["mass moved"] == [0.0] * 10


def test_a_random_image_map_is_at_chance():
    probes, rng = image_probes(200, 0), np.random.default_rng(0)
    figures = image_figures(Fake(images=lambda *_: rng.random((64, 64))), probes)
    area = np.array([probe.mask.mean() for probe in probes])
    other = np.array([probe.wrong_mask.mean() for probe in probes])
    chance = {"pointing": area, "mass": area, "auroc": 0.5, "pointing, other caption": other, "mass moved": 0.0}
    for name, expected in chance.items():
        difference = np.array(figures[name]) - expected
        assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(len(probes)), name


def test_perfect_token_bits_are_perfect_and_opposite_ones_all_wrong():
    probes = token_probes(30, 0)
    present = {key(p.image, p.caption): p.present_words for p in probes}
    absent = {key(p.image, p.caption): p.absent_words for p in probes}

    def at(where: dict[Any, Any]) -> Any:
        return lambda image, caption: np.isin(np.arange(len(caption.split())), where[key(image, caption)]) * 2.5

    assert all(len(p.caption.split()) == len(p.scene.words) for p in probes)
    fake = Fake(tokens=at(present))
    figures = token_figures(fake, probes, n_steps=2)
    assert figures == {name: [1.0] * 30 for name in ("auroc", "top-1", "auroc, all words")}
    assert fake.batches == [25, 5] and fake.settings == [{"n_steps": 2}] * 2
    figures = token_figures(Fake(tokens=at(absent)), probes)
    assert figures["auroc"] == figures["top-1"] == [0.0] * 30
    assert max(figures["auroc, all words"]) < 0.5


def test_bits_of_filler_words_count_in_one_figure_only():
    probes = token_probes(10, 2)

    def filler(image: np.ndarray, caption: str) -> np.ndarray:
        probe = next(p for p in probes if key(p.image, p.caption) == key(image, caption))
        words = np.full(len(probe.scene.words), 9.0)
        words[list(probe.present_words)], words[list(probe.absent_words)] = 1.0, 0.0
        return words

    figures = token_figures(Fake(tokens=filler), probes)
    assert figures["auroc"] == figures["top-1"] == [1.0] * 10
    for probe, value in zip(probes, figures["auroc, all words"], strict=True):
        assert value == pytest.approx(2 / (len(probe.scene.words) - 2))


def test_random_token_bits_are_at_chance():
    probes, rng = token_probes(200, 0), np.random.default_rng(0)
    figures = token_figures(Fake(tokens=lambda _, caption: rng.random(len(caption.split()))), probes)
    for name, values in figures.items():
        assert abs(np.mean(values) - 0.5) < 4 * np.std(values) / np.sqrt(len(probes)), name


def test_equal_token_bits_are_at_chance():
    figures = token_figures(Fake(tokens=lambda _, caption: np.ones(len(caption.split()))), token_probes(5, 0))
    assert figures == {name: [0.5] * 5 for name in ("auroc", "top-1", "auroc, all words")}


def test_measure_gathers_every_figure(monkeypatch: pytest.MonkeyPatch):
    asked = []

    def figures(kind: str) -> Any:
        def gather(method: Any, probes: Any, **settings: Any) -> dict[str, list[float]]:
            asked.append((kind, method, len(probes), probes[0].image.shape, settings))
            return {"auroc": [0.25, 0.75]}

        return gather

    monkeypatch.setattr(scenes, "image_figures", figures("image"))
    monkeypatch.setattr(scenes, "token_figures", figures("text"))
    # The probes are drawn at the size that the model receives.
    prepared = SimpleNamespace(inputs=(torch.zeros(1, 3, 32, 32),))
    method: Any = SimpleNamespace(forward_func=SimpleNamespace(prepare=lambda *_: prepared))
    found = measure(method, 3, 7, n_steps=2)
    assert list(found) == ["image auroc", "image area of the mask", "text auroc"]
    assert found["image auroc"] == found["text auroc"] == bootstrap([0.25, 0.75])
    assert found["image area of the mask"] == bootstrap([probe.mask.mean() for probe in image_probes(3, 7, 32)])
    assert asked == [
        ("image", method, 3, (32, 32, 3), {"n_steps": 2}),
        ("text", method, 3, (32, 32, 3), {"n_steps": 2}),
    ]
    with pytest.raises(ValueError, match=r"^probes: expected at least 1, got 0"):
        measure(method, 0)


def test_render_is_one_line_per_figure():
    text = render({"image auroc": Estimate(0.5, 0.25, 0.75), "text": Estimate(-0.0625, -1, 1)})
    assert text.splitlines() == ["image auroc  0.500 [0.250, 0.750]", "text         -0.062 [-1.000, 1.000]"]
    assert re.fullmatch(r"\S+ \[\S+, \S+\]", str(Estimate(1, 0, 2)))


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "rise"])
def test_every_method_can_be_measured(name: str, encoder: DualEncoder):
    figures = measure(METHODS[name](encoder), probes=2)
    assert set(figures) == set(measure(METHODS["centre"](encoder), probes=2))
    assert all(-1 <= estimate.mean <= 1 for estimate in figures.values())


def test_the_centre_prior_is_highest_in_the_middle_and_knows_no_tokens(encoder: DualEncoder):
    pixels, tokens = METHODS["centre"](encoder).attribute((torch.zeros(1, 3, 9, 15), torch.zeros(1, 4)))
    assert divmod(int(pixels[0, 0].argmax()), 15) == (4, 7) and torch.equal(tokens, torch.ones(1, 4))


def test_only_what_speaks_for_a_place_counts_as_mass():
    bits = np.array([[3.0, -5.0], [1.0, 0.0]])
    assert relevance_mass(bits, np.array([[True, True], [False, False]])) == 0.75
