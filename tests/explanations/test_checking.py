"""The check of a map: its figures in closed form, its verdicts on planted models, its words, and what it costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from torch import Tensor, nn

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, NothingToExplainWarning, explain
from captum_m2ib.attr.map_check import check_maps
from captum_m2ib.engine.check import FRACTIONS, Check, joined, verdicts
from captum_m2ib.engine.suffix import Suffix
from captum_m2ib.engine.verdict import worst
from captum_m2ib.explanations.checking import FIGURES, ensure_check, pair_checks, told

FEW: dict[str, Any] = {"n_steps": 8, "n_samples": 4}


def checked(**changes: Any) -> Check:
    """Two pairs; the first loses half of its range with its top positions, and a tenth with random ones."""
    given = {
        "top": torch.tensor([[3.0, 1.0], [2.0, 2.0]]),
        "random": torch.tensor([[4.0, 3.2], [1.0, 1.0]]),
        "score": torch.tensor([4.0, 2.0]),
        "after": torch.tensor([3.0, 2.0]),
        "closed": torch.tensor([0.0, 1.9]),
        "range": torch.tensor([4.0, 2.0]),
    }
    return Check(**{**given, **changes})


class TestFigures:
    def test_closed_forms(self):
        check = checked()
        assert check.lost_top.tolist() == [0.5, 0.0] and check.lost_random.tolist() == pytest.approx([0.1, 0.5])
        assert check.margin.tolist() == pytest.approx([0.4, -0.5])
        assert check.kept.tolist() == pytest.approx([0.75, 0.05])
        assert check.is_idle.tolist() == [False, True]
        assert check.verdicts() == ["holds", "fails"]

    def test_unit_and_zero_of_the_score_do_not_matter(self):
        check = checked()
        parts = {name: getattr(check, name) for name in Check.__dataclass_fields__}
        moved = {name: 100 * value + (0 if name == "range" else 7) for name, value in parts.items()}
        other = Check(**moved)
        for name in ("lost_top", "lost_random", "margin", "kept"):
            torch.testing.assert_close(getattr(other, name), getattr(check, name), atol=1e-4, rtol=0)

    def test_without_a_range_nothing_is_lost_or_kept(self):
        check = checked(range=torch.zeros(2))
        assert check.margin.tolist() == [0, 0] and check.kept.tolist() == [0, 0]
        assert check.verdicts() == ["fails", "fails"]

    def test_parts_of_a_batch_are_joined(self):
        both = joined([checked(), checked(score=torch.tensor([5.0, 6.0]))])
        assert both is not None and both.score.tolist() == [4, 2, 5, 6] and both.top.shape == (4, 2)
        assert joined([]) is None


class TestVerdicts:
    @pytest.mark.parametrize(
        "margin, kept, idle, expected",
        [
            (0.9, 0.9, False, "holds"),
            (0.35, 0.5, False, "holds"),
            (0.9, 0.49, False, "weak"),
            (0.34, 0.9, False, "weak"),
            (0.21, 0.9, False, "weak"),
            (0.19, 0.9, False, "fails"),
            (-1.0, 2.0, False, "fails"),
            (0.9, 0.9, True, "fails"),
            (float("nan"), 0.9, False, "weak"),
        ],
    )
    def test_thresholds(self, margin: float, kept: float, idle: bool, expected: str):
        assert verdicts(torch.tensor([margin]), torch.tensor([kept]), torch.tensor([idle])) == [expected]

    def test_a_pair_is_as_good_as_its_worse_modality(self):
        assert worst(["holds", "holds"]) == "holds"
        assert worst(["holds", "weak"]) == worst(["weak", "holds"]) == "weak"
        assert worst(["weak", "fails"]) == worst(["fails", "holds"]) == "fails"


def on_a_square(pictures: Tensor) -> Tensor:
    """How bright one square of each picture is: high in the first half of the batch at one place."""
    return pictures[:, :, 8:16, 8:16].mean((1, 2, 3))


class Named(nn.Module):
    """What two of eight words say; the others are never read."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 6)
        self.register_buffer("meant", self.embedding.weight[[5, 7]].detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cosine_similarity(self.embedding(ids)[:, 2:4], self.meant, dim=-1).mean(1)


def pictures(count: int = 3) -> Tensor:
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 0.3
    noise[:, :, 8:16, 8:16] += 3.0
    return noise


IDS = torch.tensor([[1, 2, 5, 7, 3, 4, 6, 8], [9, 10, 5, 7, 11, 12, 13, 14]])


@pytest.mark.parametrize("planted", ["picture", "words"])
def test_a_right_map_holds_and_a_moved_one_fails(planted: str):
    model, layer, inputs = (
        (on_a_square, None, pictures()) if planted == "picture" else (Named().eval(), "embedding", IDS)
    )
    method = MultiModalInfoBottleneck(model, [layer])
    bits, record = method.attribute_with_record(inputs, check=True, beta=0.3, **FEW)
    check = record.modalities[0].check
    assert check is not None and check.top.shape == check.random.shape == (len(inputs), len(FRACTIONS))
    assert check.verdicts() == ["holds"] * len(inputs)
    moved = bits.roll(16, -1) if planted == "picture" else bits.roll(3, -1)
    again, wrong = check_maps(method, (inputs,), 0, [bits, moved])
    torch.testing.assert_close(again.top, check.top)
    torch.testing.assert_close(again.random, check.random)
    assert wrong.verdicts() == ["fails"] * len(inputs)


def test_a_map_that_leaves_out_most_of_the_score_is_weak():
    method = MultiModalInfoBottleneck(on_a_square, [None])
    # Random orders that keep to colours close more of the square at once, so that no margin is so wide.
    _, record = method.attribute_with_record(pictures(), check=True, beta=1.2, smoothing_colour=None, **FEW)
    check = record.modalities[0].check
    assert check is not None and bool((check.margin > 0.5).all()) and bool((check.kept < 0.5).all())
    assert check.verdicts() == ["weak"] * 3
    assert all("it keeps only" in line for line in told(pair_checks([check, check])[0]))


@pytest.mark.parametrize("score", ["constant", "higher without"])
def test_where_there_is_nothing_to_lose_the_check_fails_and_says_why(score: str):
    def forward(given: Tensor) -> Tensor:
        return 1 + 0 * given.sum((1, 2, 3)) if score == "constant" else -on_a_square(given)

    method = MultiModalInfoBottleneck(forward, [None])
    with pytest.warns(NothingToExplainWarning):
        _, record = method.attribute_with_record(pictures(), check=True, **FEW)
    check = record.modalities[0].check
    assert check is not None and check.verdicts() == ["fails"] * 3
    for pair in pair_checks([check, check]):
        assert ensure_check(pair) == pair and pair["verdict"] == "fails"
        for line in told(pair):
            assert "map fails: the score is about as high with everything hidden" in line


@pytest.fixture(scope="module")
def encoder(checkpoint: Any) -> DualEncoder:
    return DualEncoder.from_pretrained(checkpoint)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[tuple[bool, int]]]:
    """Rows per pair of each pass behind a layer so far, and whether it had gradients."""
    seen: list[tuple[bool, int]] = []
    run = Suffix.run

    def counted(self: Suffix, values: dict[int, Tensor], draws: int, *precision: Any) -> Tensor:
        score = run(self, values, draws, *precision)
        seen.append((score.requires_grad, draws))
        return score

    monkeypatch.setattr(Suffix, "run", counted)

    def taken() -> list[tuple[bool, int]]:
        found, seen[:] = list(seen), []
        return found

    return taken


PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
CAPTION = "a red circle"


@pytest.mark.filterwarnings("ignore::captum_m2ib.NothingToExplainWarning")
@pytest.mark.parametrize("published", [False, True])
def test_the_switch_and_what_a_check_costs(encoder: DualEncoder, published: bool, rows: Any):
    method = MultiModalInfoBottleneck.published(encoder) if published else MultiModalInfoBottleneck(encoder)
    (plain,) = explain(encoder, PICTURE, CAPTION, method=method, check=False, n_steps=2, n_samples=2)
    without = rows()
    (one,) = explain(encoder, PICTURE, CAPTION, method=method, n_steps=2, n_samples=2)
    with_check = rows()
    assert plain.check is None and plain.check_lines == []
    assert np.array_equal(plain.image_bits, one.image_bits) and np.array_equal(plain.token_bits, one.token_bits)
    for gradients in (True, False):
        counts = [sum(draws for has, draws in seen if has is gradients) for seen in (without, with_check)]
        # Twice, for two modalities; where the score is taken as it is, its range is measured for the check alone.
        assert counts[1] - counts[0] == (0 if gradients else 2 * (9 + 8 * published))
    assert one.check is not None and ensure_check(one.check) == one.check
    assert one.check["verdict"] == worst(one.check[name]["verdict"] for name in ("image", "text"))
    for name in ("image", "text"):
        assert set(one.check[name]) == {*FIGURES, "verdict"}
        assert one.check[name]["score"] == pytest.approx(one.score)
        assert one.check[name]["range"] >= one.check[name]["score"] - one.check[name]["closed"] - 1e-6
    assert f"check: {one.check['verdict']}" in repr(one) and "check" not in repr(plain)


def test_the_published_objective_stays_as_it_is(encoder: DualEncoder):
    pairs = encoder.prepare(PICTURE, CAPTION)
    _, record = MultiModalInfoBottleneck.published(encoder).attribute_with_record(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args, check=True, n_steps=1, n_samples=2
    )
    for part in record.modalities:
        assert part.score_range.tolist() == [1.0] and part.score_closed is None
        assert part.check is not None and part.check.range.tolist() != [1.0]


def figures(verdict: str, **changes: float) -> dict[str, Any]:
    given = {"score": 0.3, "closed": 0.0, "range": 0.3, "kept": 1.0, "lost_top": 1.104, "lost_random": 0.14}
    return {**given, **changes, "verdict": verdict}


WORDED = {
    "image": figures("holds"),
    "text": figures("weak", kept=0.4, lost_top=1.0, lost_random=-1.0),
    "verdict": "weak",
}


def test_in_words():
    assert told(WORDED) == [
        "image map holds: hiding what it marks takes 110 % of what the score can lose, random parts 14 %",
        "text map is weak: hiding what it marks takes 100 % of what the score can lose, random parts −100 %; "
        "it keeps only 40 %",
    ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda check: check.pop("verdict"),
        lambda check: check.update(verdict="perfect"),
        lambda check: check.pop("image"),
        lambda check: check.update(text=3),
        lambda check: check["text"].pop("kept"),
        lambda check: check["text"].update(kept=float("nan")),
        lambda check: check["text"].update(kept="<b>"),
        lambda check: check["image"].update(verdict=None),
    ],
)
def test_what_is_no_check_is_refused(spoil: Callable[[dict[str, Any]], Any]):
    check = {name: dict(part) if isinstance(part, dict) else part for name, part in WORDED.items()}
    assert ensure_check(check) == WORDED
    spoil(check)
    with pytest.raises(ValueError, match=r"check: expected"):
        ensure_check(check)


def test_a_figure_shows_the_whole_of_it(encoder: DualEncoder):
    from dataclasses import replace

    (one,) = explain(encoder, PICTURE, CAPTION, check=False, n_steps=1, n_samples=2)
    shown = replace(one, check=WORDED).plot()
    texts = {text.get_text(): text for text in shown.findobj(Text)}
    for line in told(WORDED):
        box = texts[f"check: {line}"].get_window_extent()
        assert box.x0 >= 0 and box.x1 <= shown.bbox.width
    assert not any("check" in text.get_text() for text in one.plot().findobj(Text))
