"""Bits that move to where a late layer reads: the closed form, and what may not change it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from captum_m2ib.engine.gates import noise
from captum_m2ib.engine.guidance import moved
from captum_m2ib.engine.settings import Defaults, Settings


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def blurred(cells: list[list[float]], sigma: float) -> list[list[float]]:
    """A Gaussian kernel of two standard deviations, mirrored at the borders without repeating them."""
    high, wide, reach = len(cells), len(cells[0]), round(2 * sigma)
    kernel = {at: math.exp(-(at**2) / (2 * sigma**2)) for at in range(-reach, reach + 1)}
    total = sum(kernel.values()) ** 2

    def mirror(at: int, count: int) -> int:
        return -at if at < 0 else 2 * (count - 1) - at if at >= count else at

    return [
        [
            sum(
                a * b * cells[mirror(y + i, high)][mirror(x + j, wide)]
                for i, a in kernel.items()
                for j, b in kernel.items()
            )
            / total
            for x in range(wide)
        ]
        for y in range(high)
    ]


def test_the_product_is_the_closed_form():
    bits, late = draw(2, 3, 28, 30), draw(2, 2, 28, 30, seed=1).square()
    found = moved(bits, late)
    for pair in range(2):
        own = bits[pair].sum(0)
        reads = torch.tensor(blurred(late[pair].sum(0).tolist(), 2.0), dtype=torch.float64)
        d, r = own / own.sum(), reads / reads.sum()
        product = (d + 0.1 * r) * r * r
        expected = product / product.sum() * own.sum() / 3
        torch.testing.assert_close(found[pair], expected.expand(3, -1, -1), rtol=1e-9, atol=0)


def test_every_pair_keeps_its_bits_and_its_unit():
    bits, late = draw(3, 3, 16, 16), draw(3, 1, 16, 16, seed=1)
    found = moved(bits, late)
    torch.testing.assert_close(found.sum((1, 2, 3)), bits.sum((1, 2, 3)))
    torch.testing.assert_close(moved(bits, 1e6 * late), found)
    torch.testing.assert_close(moved(1e-6 * bits, late), 1e-6 * found)
    torch.testing.assert_close(moved(bits[1:2], late[1:2]), found[1:2], rtol=0, atol=0)


def test_a_pair_without_bits_keeps_its_map():
    bits, late = draw(3, 3, 16, 16), draw(3, 1, 16, 16, seed=1)
    bits[0], late[1] = 0.0, 0.0
    found = moved(bits, late)
    assert not bool(found[0].any())
    assert torch.equal(found[1], bits[1])
    assert not torch.allclose(found[2], bits[2])


def test_a_layer_that_reads_everywhere_alike_leaves_shares_but_for_the_floor():
    bits = draw(1, 1, 16, 16)
    found = moved(bits, torch.ones(1, 1, 16, 16, dtype=torch.float64))
    share = bits / bits.sum() + 0.1 / 256
    torch.testing.assert_close(found, share / share.sum() * bits.sum())


def test_bits_leave_what_no_late_layer_reads():
    bits, late = torch.ones(1, 1, 28, 28, dtype=torch.float64), torch.zeros(1, 1, 28, 28, dtype=torch.float64)
    late[..., :8, :8] = 1.0
    found = moved(bits, late)
    assert float(found[..., :12, :12].sum()) == pytest.approx(784)
    assert not bool(found[..., 12:, :].any())


def test_a_guide_takes_half_the_steps_of_one_draw_less():
    common = {"beta": 3.0, "variance": 1.0, "lr": None, "initial_gate": 0.5, "antithetic": True, "reach": 4.0}
    own = Defaults(**{**common, "beta": 1.2}, n_steps=4, n_samples=3, noiseless=0.7)
    words = Defaults(**common, n_steps=6, n_samples=2)
    for asked, steps, draws in (
        ({}, 2, 2),
        ({"n_steps": 1, "n_samples": 1}, 1, 1),
        ({"n_steps": 9, "n_samples": 8}, 5, 7),
    ):
        alone = Settings(**asked).per_layer([own, words])
        with_guide = alone.with_guides([0], Defaults(**common))
        assert with_guide.n_steps == (*alone.n_steps, steps) and with_guide.n_samples == (*alone.n_samples, draws)
        assert with_guide.beta == (1.2, 3.0, 3.0) and with_guide.noiseless == (0.7, 0.0, 0.0)
        assert with_guide.lr == (*alone.lr, 4.0 / max(steps, 4))
        assert alone.with_guides([], Defaults(**common)) == alone


def test_the_noise_of_a_guide_is_its_own():
    drawn = [noise(0, layer, step, 2, (5, 6)) for layer in (0, 1, 2**16, 2**16 + 1) for step in (0, 1)]
    assert len({tuple(one.flatten().tolist()) for one in drawn}) == len(drawn)
