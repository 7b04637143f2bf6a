"""What torch does not see is followed or refused: no rerun is silently something else than the model's own pass."""

from __future__ import annotations

import pytest
import torch
from test_suffix import Parts
from torch import Tensor, nn

from captum_m2ib.engine.interception import borrowing
from captum_m2ib.engine.layers import Layer
from captum_m2ib.engine.rows import Shared
from captum_m2ib.engine.suffix import Suffix, Tap

PAIRS = 2


class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


class ThroughNumbers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(x.tolist(), dtype=x.dtype) * 2


class BesideNumpy(nn.Module):
    """The detour is one of two ways through the module."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.from_numpy(x.detach().numpy() * 2)


class Own(torch.autograd.Function):
    """A kernel out of torch's sight that brings its derivative."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return 2 * gradient * ctx.saved_tensors[0]


class Kernel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Own.apply(x)


class Writer(nn.Module):
    """Leaves what it is given in a dictionary, as it is or as NumPy's."""

    def __init__(self, state: dict, as_numpy: bool = False) -> None:
        super().__init__()
        self.state, self.as_numpy = state, as_numpy

    def forward(self, x: Tensor) -> Tensor:
        self.state["x"] = x.detach().numpy() if self.as_numpy else x
        return x * 1.5


class Reader(nn.Module):
    def __init__(self, state: dict) -> None:
        super().__init__()
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.as_tensor(self.state["x"])


def model_of(forward, **modules: nn.Module) -> Parts:
    model = Parts(forward)
    for name, module in modules.items():
        setattr(model, name, module)
    return model.double().eval()


def batch() -> Tensor:
    return torch.randn(PAIRS, 5, 4, generator=torch.Generator().manual_seed(0)).double()


def suffix_of(model: Parts, tapped: nn.Module, *arguments, forward=None, dtype=torch.float64) -> Suffix:
    given = arguments or (batch().to(dtype),)
    return Suffix(forward or (lambda all_: model(*all_)), given, PAIRS, [Tap(Layer(tapped, "tapped"))])


def hooked(model: Parts, tapped: nn.Module, value: Tensor) -> Tensor:
    handle = tapped.register_forward_hook(lambda *_: value)
    try:
        return model(batch())
    finally:
        handle.remove()


def moved(suffix: Suffix) -> Tensor:
    return (suffix.hidden[0] + torch.randn_like(suffix.hidden[0])).requires_grad_()


def opaque_model(kind: nn.Module) -> Parts:
    return model_of(lambda m, x: m.third((h := m.second(m.first(x))) + m.kind(h)), kind=kind)


def test_a_kernel_with_a_derivative_is_followed():
    model = opaque_model(Kernel())
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        value = moved(suffix)
        score = suffix.run({0: value}, 1)
        expected = hooked(model, model.first, value)
        torch.testing.assert_close(score, expected)
        torch.testing.assert_close(
            torch.autograd.grad(score.sum(), value), torch.autograd.grad(expected.sum(), value), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("kind", [ThroughNumpy, ThroughNumbers, BesideNumpy])
def test_a_detour_is_followed_forwards_and_has_no_derivative(kind: type[nn.Module]):
    model = opaque_model(kind())
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        value = moved(suffix)
        with torch.no_grad():
            torch.testing.assert_close(suffix.run({0: value}, 1), hooked(model, model.first, value))
        with pytest.raises(RuntimeError, match=rf"'kind' \({kind.__name__}\) computes outside of torch"):
            suffix.run({0: value}, 1)
        with pytest.raises(RuntimeError, match=rf"'kind' \({kind.__name__}\) computes outside of torch"):
            suffix_of(model, model.first).run({0: suffix.hidden[0].requires_grad_()}, 1)


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_numbers_that_do_not_change_are_a_constant(draws: int):
    model = model_of(lambda m, x: m.third(m.kind(m.first(x))), kind=Parts(lambda m, x: m.second(x)))
    model.kind.forward = lambda x: x * torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=x.dtype)
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        value = moved(suffix)
        found = suffix.run({0: value.repeat_interleave(draws, 0)}, draws).unflatten(0, (-1, draws))
        torch.testing.assert_close(found, hooked(model, model.first, value).unsqueeze(1).expand_as(found))


def test_state_in_a_dictionary_is_followed_where_its_writer_runs():
    state: dict = {}
    model = model_of(lambda m, x: m.third(m.reader(m.writer(m.first(x)))), writer=Writer(state), reader=Reader(state))
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        value = moved(suffix)
        torch.testing.assert_close(suffix.run({0: value}, 1), hooked(model, model.first, value))


@pytest.mark.parametrize("draws", [1, 2, 3])
def test_state_in_a_dictionary_whose_writer_does_not_run_is_refused(draws: int):
    state: dict = {}
    model = model_of(lambda m, x: m.third(m.reader(m.first(m.writer(x)))), writer=Writer(state), reader=Reader(state))
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        with pytest.raises(RuntimeError, match=r"'reader' \(Reader\) reads something that another module leaves"):
            suffix.run({0: moved(suffix).repeat_interleave(draws, 0)}, draws)


def test_state_in_a_dictionary_that_left_torch_is_refused():
    state: dict = {}
    model = model_of(
        lambda m, x: m.third(m.reader(m.writer(m.first(x)))), writer=Writer(state, True), reader=Reader(state)
    )
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        with pytest.raises(RuntimeError, match=r"'reader' \(Reader\) computes outside of torch"):
            suffix.run({0: moved(suffix)}, 1)


def test_dictionary_that_is_handed_on_is_filled_again():
    class Fill(nn.Module):
        def forward(self, x: Tensor, state: dict) -> Tensor:
            state["x"] = x * 3
            return x * 1.5

    def forward(m, x):
        state: dict = {}
        filled = m.fill(x, state)
        return m.third(m.first(filled) * state["x"])

    model = model_of(forward, fill=Fill())
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        value = moved(suffix)
        torch.testing.assert_close(suffix.run({0: value}, 1), hooked(model, model.first, value))


def test_operator_without_a_derivative_is_named():
    library = torch.library.Library("captum_m2ib_tests", "DEF")
    library.define("halve(Tensor x) -> Tensor")
    library.impl("halve", lambda x: x / 2, "CPU")
    half = Parts(lambda m, x: m.second(x))
    half.forward = lambda x: torch.ops.captum_m2ib_tests.halve(x)
    model = opaque_model(half)
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        value = moved(suffix)
        with torch.no_grad():
            torch.testing.assert_close(suffix.run({0: value}, 1), hooked(model, model.first, value))
        with pytest.raises(RuntimeError, match=r"'kind' \(Parts\) computes with captum_m2ib_tests::halve, which"):
            suffix.run({0: value}, 1)


def test_scores_at_random_are_refused():
    model = model_of(lambda m, x: m.first(x) * torch.rand(()))
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        with pytest.raises(RuntimeError, match="called twice on the same arguments, it gives different scores"):
            suffix.run({0: moved(suffix)}, 1)


def test_scores_that_depend_on_the_batch_are_refused():
    model = model_of(lambda m, x: m.first(x) / x.sum())
    with borrowing(model):
        suffix = suffix_of(model, model.first)
        with pytest.raises(ValueError, match="the score of a pair changes with the other pairs in the batch"):
            suffix.run({0: moved(suffix)}, 1)


class Classify(Parts):
    """Pictures against classes that all of them share: the probability of the class at the pair's index."""

    def forward(self, x: Tensor, classes: Tensor, index: Tensor) -> Tensor:
        logits = self.third(self.first(x)).mean(1) @ classes.T
        return logits.softmax(-1)[torch.arange(len(x)), index]


@pytest.mark.parametrize("draws", [1, 2])
def test_shared_argument_with_a_row_for_each_pair_by_chance(draws: int):
    model = Classify(lambda m, x: x).double().eval()
    classes, index = torch.randn(PAIRS, 4).double(), torch.arange(PAIRS)
    with borrowing(model):
        suffix = suffix_of(model, model.first, batch(), classes, index)
        value = moved(suffix)
        values = {0: value.repeat_interleave(draws, 0)}
        with pytest.raises(ValueError, match=r"argument 1 .* of shape \(2, 4\), is used by all pairs together"):
            suffix.run(values, draws)
        told = suffix_of(model, model.first, batch(), Shared(classes), index)
        torch.testing.assert_close(told.score, model(batch(), classes, index))
        handle = model.first.register_forward_hook(lambda *_: value)
        expected = model(batch(), classes, index).repeat_interleave(draws, 0)
        handle.remove()
        torch.testing.assert_close(told.run(values, draws), expected)


def test_shared_argument_that_no_further_row_fits():
    model = Classify(lambda m, x: x).double().eval()
    model.forward = lambda x, weights: (model.first(x).mean(1) @ weights.view(PAIRS, 4).T).sum(1)
    with borrowing(model):
        with pytest.raises(ValueError, match=r"argument 1 .* of shape \(2, 4\), is used by all pairs together"):
            suffix_of(model, model.first, batch(), torch.randn(PAIRS, 4).double())
        suffix_of(model, model.first, batch(), Shared(torch.randn(PAIRS, 4).double()))
