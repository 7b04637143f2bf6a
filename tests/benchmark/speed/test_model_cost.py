"""What full-size models cost, on a model small enough to be measured here."""

from __future__ import annotations

import pytest
from families import tiny_clip

from captum_m2ib import DualEncoder
from captum_m2ib.benchmark.meters import count_flops
from captum_m2ib.benchmark.speed import models


def test_costs_of_a_small_model(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(models.MODELS, "tiny", (tiny_clip, 12, 63, True))
    monkeypatch.setattr(models, "random_pair", small_pair)
    found = models.measure("tiny", repeats=2)
    encoder, (first, second, mask) = DualEncoder(tiny_clip().eval()), small_pair(12, 63, True)
    once = count_flops(lambda: encoder(first, second, mask)) / 1e9
    # A pass forwards and backwards takes two to three times a forward one. The default has 12 through whole towers, and
    # 8 closed ones, the recorded pass with a row more, and two that reruns are held against, forwards alone.
    assert 12 * 2 < found["default"]["gflop"] / once < 12 * 3 + 8 + 2 + 2
    # The paper's layer has the last of four blocks behind it, of which most runs at one position: 100 passes forwards
    # and backwards are less than the whole block forwards.
    assert 100 / 40 < found["published"]["gflop"] / once < 100 / 4
    assert len(found["default"]["seconds"]) == 2 and found["published"]["peak"] >= found["default"]["peak"] >= 0
    lines = models.table({"tiny": found}).splitlines()
    assert len(lines) == 4 and all(line.count("|") == 7 for line in lines)


def small_pair(length: int, end: int, masked: bool) -> models.Arguments:
    first, second, *mask = REAL_PAIR(length, end, masked)
    return first[..., :32, :32], second % 60 + 2, *mask


REAL_PAIR = models.random_pair


def test_a_caption_ends_after_eleven_tokens():
    first, second, mask = models.random_pair(14, 63, True)
    assert first.shape == (1, 3, 224, 224) and second.shape == mask.shape == (1, 14)
    assert bool((second[:, 11:] == 63).all())


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        models.main(["no-such-model"])
    assert "unknown models: no-such-model" in capsys.readouterr().err
