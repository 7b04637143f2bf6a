"""Convolutions whose windows do not overlap: the same values to the bit, the same gradient but for rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_m2ib.engine import windows
from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import input_layer
from captum_m2ib.engine.suffix import Suffix, Tap


class Doubled(nn.Conv2d):
    def forward(self, given: Tensor) -> Tensor:
        return 2 * super().forward(given)


def run(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    return module(*args, **kwargs)


def gradients(made: Tensor, given: Tensor) -> Tensor:
    weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(2), dtype=made.dtype)
    return torch.autograd.grad(made, given, weights)[0]


def is_cut(made: Tensor) -> bool:
    return type(made.grad_fn).__name__ == "_CutBackward"


@pytest.mark.parametrize(("kernel", "size"), [((4, 4), (8, 12)), ((3, 2), (8, 7)), ((1, 1), (3, 3))])
def test_windows_have_the_gradient_of_the_convolution(kernel: tuple[int, int], size: tuple[int, int]):
    torch.manual_seed(0)
    module = nn.Conv2d(3, 5, kernel, kernel).double().requires_grad_(False)
    given = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    plain, made = module(given), windows.call(run, module, (given,), {})
    assert is_cut(made) and torch.equal(made, plain)
    torch.testing.assert_close(gradients(made, given), gradients(plain, given), rtol=0, atol=1e-12)
    # As a model may work in place on what its modules return.
    doubled = windows.call(run, module, (given,), {}).mul_(2)
    torch.testing.assert_close(gradients(doubled, given), 2 * gradients(module(given), given), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_batch_norm_before_gets_its_gradient_in_order(rows: int):
    # Given one row whose channels lie next to each other, torch's own backward pass of a batch norm is wrong.
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(64).double().eval().requires_grad_(False)
    norm.running_var.uniform_(0.5, 2.0)
    module = nn.Conv2d(64, 8, 1).double().requires_grad_(False)
    given = torch.randn(rows, 64, 4, 4, dtype=torch.float64, requires_grad=True)
    made, plain = windows.call(run, module, (norm(given),), {}), module(norm(given))
    torch.testing.assert_close(gradients(made, given), gradients(plain, given), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(4, 4, 4, 2),
        nn.Conv2d(4, 4, 4, 4, padding=2),
        nn.Conv2d(4, 4, 2, 2, dilation=2),
        nn.Conv2d(4, 4, 4, 4, groups=2),
        Doubled(4, 4, 4, 4),
        nn.Linear(8, 2),
    ],
    ids=["overlapping", "padded", "dilated", "grouped", "subclass", "linear"],
)
def test_what_is_no_cut_into_windows_runs_as_it_is(module: nn.Module):
    module.requires_grad_(False)
    given = torch.randn(2, 4, 8, 8, requires_grad=True)
    made = windows.call(run, module, (given,), {})
    assert not is_cut(made) and torch.equal(made, module(given))


def test_a_hook_or_a_weight_that_learns_keeps_the_convolution():
    module, given = nn.Conv2d(3, 2, 2, 2), torch.randn(1, 3, 4, 4, requires_grad=True)
    assert not is_cut(windows.call(run, module, (given,), {}))
    module.requires_grad_(False)
    assert is_cut(windows.call(run, module, (given,), {}))
    assert not is_cut(windows.call(run, module, (given.detach(),), {}))
    module.register_forward_hook(lambda *_: None)
    assert not is_cut(windows.call(run, module, (given,), {}))


def test_a_rerun_from_the_picture_goes_through_windows():
    torch.manual_seed(0)
    cut = nn.Conv2d(3, 4, 4, 4).double()
    model = nn.Sequential(cut, nn.Tanh(), nn.Flatten(), nn.Linear(16, 1)).double().eval()
    pictures = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with borrowing(model):
        suffix = Suffix(lambda given: model(given[0])[:, 0], (pictures,), 2, [Tap(input_layer(0))])
        values = pictures.clone().requires_grad_()
        score = suffix.run({0: values}, 1)
        found = torch.autograd.grad(score.sum(), values)[0]
    expected = torch.autograd.grad(model(values).sum(), values)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    nodes, names = [score.grad_fn], set()
    while nodes:
        node = nodes.pop()
        names.add(node.name())
        nodes += [one for one, _ in node.next_functions if one is not None]
    assert "_CutBackward" in names and "ConvolutionBackward0" not in names
