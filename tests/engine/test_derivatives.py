"""What the score moves by and its gradient does not say is refused, and what only looks like it is not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_consistency import model_of, moved, opaque_model, suffix_of
from test_suffix import Parts
from torch import Tensor, nn

from captum_m2ib import LayerMultiModalInfoBottleneck
from captum_m2ib.engine.interception import borrowing

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")


class Rowwise(nn.Module):
    """Weighs each row by a number of it, which a subclass says how to get."""

    def number(self, row: Tensor) -> float:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([row * self.number(row) for row in x])


class ByFloat(Rowwise):
    def number(self, row: Tensor) -> float:
        return float(row.sum())


class ByItem(Rowwise):
    def number(self, row: Tensor) -> float:
        return row.square().sum().item()


class ByList(Rowwise):
    def number(self, row: Tensor) -> float:
        return sum(row.flatten().tolist())


class StableSum(nn.Module):
    """A number is taken out and put back, so that the gradient needs nothing of it."""

    def forward(self, x: Tensor) -> Tensor:
        most = x.amax().item()
        return (x - most).exp().sum(-1, keepdim=True).log() + most + 0 * x


class Looked(nn.Module):
    """Numbers that decide or inform, and enter nothing."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = float(x.mean())
        return x * 2 if x.abs().max().item() < 1e6 else x


def models(kind: nn.Module) -> tuple[Parts, Parts]:
    """The detour as one of two ways through a model, and as the only one."""
    return opaque_model(kind), model_of(lambda m, x: m.third(m.kind(m.second(m.first(x)))), kind=kind)


@pytest.mark.parametrize("kind", [ByFloat, ByItem, ByList])
@pytest.mark.parametrize("which", [0, 1])
def test_a_number_without_a_derivative_is_refused(kind: type[nn.Module], which: int):
    model = models(kind())[which]
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        with torch.no_grad():
            suffix.run({0: moved(suffix)}, 1)
        with pytest.raises(RuntimeError, match=r"'kind' .* computes with Python numbers,.* as its gradient says"):
            suffix.run({0: moved(suffix)}, 1)


def test_a_number_made_outside_of_every_module_is_refused():
    model = opaque_model(nn.Identity())
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        assert suffix.run({0: moved(suffix)}, 1).requires_grad
    plain = Parts(lambda m, x: m.third(m.first(x))).double().eval()
    weigh = lambda all_: torch.stack([one * (one.item() + 3) for one in plain(*all_)])  # noqa: E731
    with borrowing(plain):
        suffix = suffix_of(plain, plain.first, forward=weigh)
        with pytest.raises(RuntimeError, match="forward_func: it computes with Python numbers"):
            suffix.run({0: moved(suffix)}, 1)


@pytest.mark.parametrize("kind", [StableSum, Looked])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_only_looks_like_it_is_not_refused(kind: type[nn.Module], which: int, dtype: torch.dtype):
    model = models(kind())[which].to(dtype)
    with borrowing(model):
        suffix = suffix_of(model, model.first, dtype=dtype)
        assert suffix.run({0: moved(suffix)}, 1).requires_grad


class Beside(nn.Module):
    """Returns beside its hidden state a tensor that nothing reads, as blocks return attention weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(x), x @ x.transpose(-1, -2)


class Halved(nn.Module):
    """Computes with a number from NumPy, whose making nobody saw, and on which nothing depends."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.from_numpy(np.full(1, 0.5, np.float32))


def test_what_a_layer_returns_beside_its_hidden_state_was_not_computed_outside_of_torch():
    torch.manual_seed(0)
    block, halved = Beside().eval(), Halved().eval()
    method = LayerMultiModalInfoBottleneck(lambda x: halved(block(x)[0]).tanh().sum((1, 2)), block)
    bits = method.attribute(torch.randn(3, 4, 6), n_steps=2, n_samples=2)
    assert bits.shape == (3, 4, 6) and bool((bits.flatten(1).sum(1) > 0).all())
