"""A recording says what one pass left behind, and stays as it is whatever its reruns do."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from captum_m2ib.engine.batch_axis import BatchAxis
from captum_m2ib.engine.interception import borrowing, intercept
from captum_m2ib.engine.layers import Layer, map_leaves
from captum_m2ib.engine.recording import Kept, Recording, Tap, record
from captum_m2ib.engine.replaying import Replayer, Reuse
from captum_m2ib.engine.rows import repeat_pairs

PAIRS = 3


class Query(nn.Module):
    """A constant that is made for so many rows."""

    def forward(self, rows: int) -> Tensor:
        return torch.linspace(0, 1, 4).expand(rows, 1, 4).clone()


class Bias(nn.Module):
    """A constant that is the same for any number of rows."""

    def forward(self) -> Tensor:
        return torch.linspace(0, 1, 4).view(1, 1, 4).clone()


class Model(nn.Module):
    """A tapped block between modules that do not depend on it, whose outputs are worked on in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.block, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.query, self.bias = Query(), Bias()
        self.eval()

    def forward(self, arguments: tuple[Tensor]) -> Tensor:
        (x,) = arguments
        h = self.block(self.stem(x))
        other = self.other(x)
        other += self.query(len(x))
        other *= self.bias()
        return self.head(h + other).tanh().sum((1, 2))


def arguments_of() -> tuple[Tensor]:
    return (torch.randn(PAIRS, 5, 4, generator=torch.Generator().manual_seed(0)),)


def record_model(model: Model, at_input: bool = False) -> Recording:
    return record(model, arguments_of(), PAIRS, [Tap(Layer(model.block, "block"), at_input)])


def rerun(model: Model, recording: Recording, reuse: Reuse, value: Tensor, draws: int) -> Tensor:
    with intercept(Replayer(recording, reuse, {0: value}, draws)):
        return model(repeat_pairs(arguments_of(), PAIRS, draws))


def tensors_of(recording: Recording) -> list[Tensor]:
    kept: list[Kept] = []
    for structure in (*recording.structures, *(call.output.structure for call in recording.calls if call.output)):
        map_leaves(structure, kept.append, Kept)
    return [recording.score, *recording.hidden, *(one.value for one in kept)]


def test_what_a_pass_leaves_behind():
    model = Model()
    with borrowing(model):
        recording = record_model(model)
        score = model(arguments_of())
    torch.testing.assert_close(recording.score, score)
    torch.testing.assert_close(recording.hidden[0], model.block(model.stem(*arguments_of())))
    assert (recording.pairs, recording.rows) == (PAIRS, PAIRS + 1)
    assert (recording.axes, recording.paths) == ((BatchAxis(0),), ((),))
    assert recording.structures[0].value.shape == (PAIRS, 5, 4)
    assert not any(tensor.requires_grad for tensor in tensors_of(recording))


def test_calls_are_in_the_order_in_which_they_began():
    model = Model()
    with borrowing(model):
        calls = record_model(model).calls
    parts = [model, model.stem, *model.stem, model.block, model.other, model.query, model.bias, model.head]
    assert [call.module for call in calls] == parts
    assert [call.end for call in calls] == [9, 4, 3, 4, 5, 6, 7, 8, 9]
    assert [call.tap for call in calls] == [None] * 4 + [0] + [None] * 4
    assert [call.reach for call in calls] == [frozenset([0]) if part in (0, 4, 8) else frozenset() for part in range(9)]


def test_no_output_is_kept_twice():
    model = Model()
    with borrowing(model):
        calls = record_model(model).calls
    _, stem, linear, tanh, *_ = calls
    assert stem.output is not None and linear.output is None and tanh.output is None
    assert {call.module for call in calls if call.output and call.output.is_constant} == {model.query, model.bias}


def test_a_tap_at_the_input_keeps_no_output():
    model = Model()
    with borrowing(model):
        recording = record_model(model, at_input=True)
    assert recording.structures == (None,) and recording.paths == ((0, 0),)
    torch.testing.assert_close(recording.hidden[0], model.stem(*arguments_of()))


def test_a_recording_cannot_be_changed():
    model = Model()
    with borrowing(model):
        recording = record_model(model)
    call = recording.calls[1]
    for record_of in (recording, call, call.output, call.output.structure, recording.taps[0]):
        for field in dataclasses.fields(record_of):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(record_of, field.name, None)
    for name in ("taps", "calls", "structures", "paths", "axes", "hidden"):
        assert isinstance(getattr(recording, name), tuple)


def test_reruns_leave_the_recording_as_it_was():
    model = Model()
    with borrowing(model):
        recording = record_model(model)
        before = [(tensor, tensor._version, tensor.clone()) for tensor in tensors_of(recording)]
        reuse = Reuse(recording.rows)
        for draws in (1, 2, 2):
            rerun(model, recording, reuse, torch.randn(PAIRS * draws, 5, 4), draws)
    for now, (tensor, version, value) in zip(tensors_of(recording), before, strict=True):
        assert now is tensor and now._version == version and torch.equal(now, value)


def test_two_reruns_share_one_recording():
    model, ran = Model(), []
    for module in (model.stem, model.other, model.query, model.bias):
        module.register_forward_hook(lambda module, *_: ran.append(module))
    value = torch.randn(PAIRS * 2, 5, 4, generator=torch.Generator().manual_seed(1))
    with borrowing(model):
        recording = record_model(model)
        first, second = Reuse(recording.rows), Reuse(recording.rows)
        ran.clear()
        scores = [rerun(model, recording, reuse, value, 2) for reuse in (first, second, first)]
    for score in scores[1:]:
        assert torch.equal(score, scores[0])
    # Either learns for itself that the bias fits any rows, and remembers it.
    assert ran == [model.query, model.bias, model.query, model.bias, model.query]


def test_nothing_is_learnt_of_constants_from_as_many_rows_as_were_recorded():
    model = Model()
    with borrowing(model):
        recording = record_model(model)
    outputs = {call.module: call.output for call in recording.calls}
    query, bias, other = (outputs[module] for module in (model.query, model.bias, model.other))
    reuse = Reuse(recording.rows)
    reuse.learn(bias, model.bias(), recording.rows)
    assert reuse.fits_any_rows(other) and not reuse.fits_any_rows(bias)
    for rows in (2 * PAIRS, recording.rows):
        reuse.learn(bias, model.bias(), rows)
        reuse.learn(query, model.query(rows), rows)
        assert reuse.fits_any_rows(bias) and not reuse.fits_any_rows(query)


def test_a_copy_is_handed_out_again_until_it_is_worked_on():
    pristine = torch.arange(2.0).view(2, 1)
    kept, reuse = {"state": Kept(pristine, BatchAxis(0))}, Reuse(3)
    given = reuse.hand_out(kept, 2)["state"]
    assert given.flatten().tolist() == [0, 0, 1, 1]
    assert reuse.hand_out(kept, 2)["state"] is given
    given += 1
    again = reuse.hand_out(kept, 2)["state"]
    assert again.flatten().tolist() == [0, 0, 1, 1] and torch.equal(pristine, torch.arange(2.0).view(2, 1))
    assert len(reuse.hand_out(kept, 3)["state"]) == 6
