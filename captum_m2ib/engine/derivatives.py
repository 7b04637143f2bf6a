"""Whether the score moves as autograd says when the values of layers move.

What goes through a Python number, NumPy or an operator without a derivative reaches the score and not its gradient, so
a map would leave it out without a word. The recorded pass notes where a value that depends on a layer goes out of
sight; only then is the gradient held against what the score does. What a model detaches itself is its own choice, as
with straight-through estimators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.engine.batch_axis import nearly_equal
from captum_m2ib.engine.dependence import NOTHING, Dependence
from captum_m2ib.engine.frames import Frames
from captum_m2ib.engine.interception import Handler, intercept
from captum_m2ib.engine.layers import map_leaves, tensors_in
from captum_m2ib.engine.recording import Kept, Recording
from captum_m2ib.engine.replaying import Replayer, Reuse
from captum_m2ib.engine.rows import check_score, repeat_pairs

# Steps from the recorded values, in spreads of those; the first is where autograd is asked.
_STEPS = (0.0, 1e-2, -1e-2, 5e-3, -5e-3)
# By how much of the slope the gradient may be off, and by how many times what the slope itself is uncertain by.
_SHARE, _CERTAIN = 0.02, 5


class Derivatives:
    r"""Holds gradients of reruns of a recording against what the scores do.

    Args:

        forward (Callable): Maps a tuple of arguments to one score per pair, (N,).
        arguments (tuple): The arguments as the caller gave them.
        recording (Recording): The pass that is rerun.
        reuse (Reuse): What its reruns share.
    """

    def __init__(
        self,
        forward: Callable[[tuple[Any, ...]], Any],
        arguments: tuple[Any, ...],
        recording: Recording,
        reuse: Reuse,
    ) -> None:
        self._forward = forward
        self._arguments = arguments
        self._recording = recording
        self._reuse = reuse

    def check(self, indices: frozenset[int]) -> None:
        r"""Look for a value on the way from layers to the score through which no derivative goes.

        Args:

            indices (frozenset[int]): The taps whose values are differentiated.

        Raises:
            RuntimeError: if there is one.
        """
        concerned = [call for call in self._recording.calls if call.reach & indices]
        if any(call.unseen or call.operators for call in concerned):
            values = {index: self._recording.elsewhere(index, 2).requires_grad_() for index in indices}
            watch = _Watch(self._recording, Replayer(self._recording, self._reuse, values, 2), indices)
            with watch.dependence:
                self._check_operators(self._score(watch, 2), indices)
        numbered = [place for place, call in enumerate(self._recording.calls) if call.numbers & indices]
        if numbered or self._recording.numbers & indices:
            self._check_slopes(indices, self._recording.name_of(numbered[0]) if numbered else "it")

    def _check_operators(self, score: Tensor, indices: frozenset[int]) -> None:
        if not any("NotImplemented" in node.name() for node in _graph(score)):
            return
        calls = self._recording.calls
        for place in (place for place, call in enumerate(calls) if call.operators and call.reach & indices):
            raise RuntimeError(
                f"forward_func: {self._recording.name_of(place)} computes with {', '.join(calls[place].operators)}, "
                "which torch cannot differentiate, so a map would leave out what goes through it; pass the model "
                "before it was quantised or converted, or use RISE, which needs no gradients."
            )

    def _check_slopes(self, indices: frozenset[int], name: str) -> None:
        """Raise if the scores move along some direction by something else than autograd says."""
        draws = len(_STEPS)
        directions = {index: self._recording.direction(index, 1) for index in indices}
        values = {}
        for index, direction in directions.items():
            steps = torch.tensor(_STEPS).to(direction).reshape(1, draws, *[1] * (direction.dim() - 1))
            moved = self._recording.hidden[index].unsqueeze(1) + steps * direction.unsqueeze(1)
            values[index] = moved.flatten(0, 1).requires_grad_()
        score = self._score(Replayer(self._recording, self._reuse, values, draws), draws).unflatten(0, (-1, draws))
        if not score.requires_grad:
            # The suffix itself says what to do where there is no gradient at all.
            return
        gradients = torch.autograd.grad(score[:, 0].sum(), list(values.values()), allow_unused=True)
        told, scale = torch.zeros_like(score[:, 0]), torch.zeros_like(score[:, 0])
        for direction, gradient in zip(directions.values(), gradients, strict=True):
            if gradient is not None:
                each = (gradient.unflatten(0, (-1, draws))[:, 0] * direction).flatten(1).to(score)
                told, scale = told + each.sum(1), scale + each.square().sum(1)
        lost = _find_lost(score.detach(), told, scale.sqrt(), self._recording.precision)
        if lost is not None:
            raise RuntimeError(
                f"forward_func: {name} computes with Python numbers, as of float(tensor), .item() or .tolist(), which "
                f"have no derivative: along one direction the score moves by {lost[0]:.3g}, and by {lost[1]:.3g} as "
                "its gradient says, so a map would leave out what goes through there; compute it with torch's "
                "operations, or use RISE, which needs no gradients."
            )

    def _score(self, handler: Handler, draws: int) -> Tensor:
        pairs = self._recording.pairs
        with intercept(handler):
            return check_score(self._forward(repeat_pairs(self._arguments, pairs, draws)), pairs * draws, pairs)


def _find_lost(score: Tensor, told: Tensor, scale: Tensor, precision: float) -> tuple[float, float] | None:
    r"""The slope of the scores and that of the gradient for the first pair where they differ.

    Args:

        score (Tensor): Scores at each of the steps, (N, 5).
        told (Tensor): The slope that the gradient says, (N,).
        scale (Tensor): The size that it has in other directions as well, (N,).
        precision (float): The share of a score that is rounding.

    Returns:
        tuple[float, float] or None: both; None where all agree, or the scores have no slope that could be told.
    """
    long, short = ((score[:, at] - score[:, at + 1]) / (2 * _STEPS[at]) for at in (1, 3))
    rounding = precision * score.abs().amax(1) / _STEPS[3]
    doubt = _CERTAIN * ((long - short).abs() + rounding)
    is_lost = (short - told).abs() > torch.maximum(doubt, _SHARE * torch.maximum(short.abs(), scale))
    first = next(iter(is_lost.nonzero().flatten().tolist()), None)
    return None if first is None else (float(short[first]), float(told[first]))


class _Watch:
    """Follows a rerun, and raises where a value that moved, made by no operation within sight, has no derivative."""

    def __init__(self, recording: Recording, replayer: Replayer, indices: frozenset[int]) -> None:
        self._recording = recording
        self._indices = indices
        self._unseen = [kept for call in recording.calls for kept in call.unseen]
        self._replayer = replayer
        self._frames = Frames(lambda tensor: tensor)
        self.dependence = Dependence(self._frames.of_unseen)
        # Copies of what is reused may be made within sight.
        reused: list[Kept] = []
        outputs = (call.output.structure for call in recording.calls if call.output is not None)
        map_leaves([*recording.structures, *outputs], reused.append, Kept)
        self.dependence.mark((kept.value for kept in reused), NOTHING)

    def __call__(self, proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        place = self._replayer.place
        # What a call depends on is known from the recording; here only what it uses counts.
        self._frames.enter(module, frozenset([0]))
        made = self._replayer(proceed, module, args, kwargs)
        for tensor in tensors_in(made):
            if not self.dependence.has_seen(tensor):
                self.dependence.of([tensor])
        frame = self._frames.leave()
        self.dependence.mark(tensors_in(made), NOTHING)
        call = self._recording.calls[place]
        # A layer whose output is given does not run: what it returns beside that was kept of another pass.
        is_given = call.tap in self._indices and not self._recording.taps[call.tap].at_input
        for tensor, _ in frame.unseen.values() if call.reach & self._indices and not is_given else ():
            with self.dependence.resting():
                if not tensor.requires_grad and not any(_is_kept(kept, tensor) for kept in self._unseen):
                    raise RuntimeError(
                        f"forward_func: {self._recording.name_of(place)} computes outside of torch, such as in NumPy "
                        "or in a list of numbers, where nothing has a derivative, so a map would leave out what goes "
                        "through it; compute it with torch's operations, or use RISE, which needs no gradients."
                    )
        return made


def _is_kept(kept: Kept, tensor: Tensor) -> bool:
    """Whether a tensor of a rerun of two draws per pair is what the recorded pass had."""
    before = kept.value if kept.axis is None else kept.axis.repeat(kept.value, 2)
    return before.shape == tensor.shape and nearly_equal(before, tensor.detach())


def _graph(score: Tensor) -> Iterator[Any]:
    """The nodes of what a score was made by."""
    seen, waiting = set(), [score.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            yield node
