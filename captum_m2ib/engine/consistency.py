"""Whether a rerun from values of layers is what the model itself makes of them.

A recording rests on what was seen of one pass. So the first rerun from a set of layers is held against the model's own
pass on the caller's own arguments, every module running, with the same values in the layers' place: the scores must
agree. Where they do not, the module, the argument or the habit of the model that is behind it is found and named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.engine.batch_axis import nearly_equal
from captum_m2ib.engine.dependence import NOTHING, Reach
from captum_m2ib.engine.interception import Handler, intercept
from captum_m2ib.engine.layers import map_leaves, tensors_in
from captum_m2ib.engine.recording import Recording
from captum_m2ib.engine.replaying import Replayer, Reuse
from captum_m2ib.engine.rows import (
    EACH_BY_ITSELF,
    Shared,
    append_first,
    as_given,
    check_score,
    is_batch,
    repeat_pairs,
    say_shared,
)

Forward = Callable[[tuple[Any, ...]], Any]
Values = dict[int, Tensor]

# Of what a score moves by, the least that no rounding explains however it is amplified.
_SHARE = 0.05


class Consistency:
    r"""Holds reruns of a recording against the model's own pass.

    Args:

        forward (Callable): Maps a tuple of arguments to one score per pair, (N,).
        arguments (tuple): The arguments as the caller gave them.
        recording (Recording): The pass that is rerun.
        reuse (Reuse): What its reruns share.
    """

    def __init__(self, forward: Forward, arguments: tuple[Any, ...], recording: Recording, reuse: Reuse) -> None:
        self._forward = forward
        self._arguments = arguments
        self._recording = recording
        self._reuse = reuse

    @torch.no_grad()
    def check(self, values: Values, draws: int, score: Tensor | None, checked: Reach) -> None:
        r"""Compare a rerun with the model's own pass.

        Args:

            values (dict): Per tap index the hidden state of the rerun, (N * draws, ...).
            draws (int): Rows per pair.
            score (Tensor or None): Its scores; None to rerun from other values than the recorded ones.
            checked (frozenset[int]): The taps of earlier comparisons. What comes behind one of them ran then, and what
                it leaves behind would have shown; where it is done before these taps open, it need not run again.

        Raises:
            RuntimeError: if they differ by more than rounding.
        """
        if score is None:
            # Of one draw, an argument with one row too many would not show.
            draws, values = 2, {index: self._recording.elsewhere(index, 2) for index in values}
            try:
                score = self._rerun(values, draws)
            except Exception as error:
                self._explain_failure(self._first_draw(values, draws), error)
                raise
        own = self._first_draw(values, draws)
        made, plain = score.detach().unflatten(0, (-1, draws))[:, 0], self._plain(own, checked)
        if not self._agree(plain, made):
            self._explain(own, plain, made)

    @torch.no_grad()
    def explain_failure(self, values: Values, draws: int, error: Exception) -> None:
        """Raise what says why a rerun failed with an error, if the model's own pass with its values does not."""
        if isinstance(error, torch.cuda.OutOfMemoryError):
            return
        try:
            self._rerun(values, draws)
        except Exception:
            self._explain_failure(self._first_draw(values, draws), error)

    def _rerun(self, values: Values, draws: int) -> Tensor:
        return self._through(Replayer(self._recording, self._reuse, values, draws), draws)

    def _plain(self, values: Values, checked: Reach = NOTHING) -> Tensor:
        with intercept(Replayer(self._recording, self._reuse, values, 1, True, checked)):
            return self._score(as_given(self._arguments), 1)

    def _through(self, handler: Handler, draws: int) -> Tensor:
        with intercept(handler):
            return self._score(repeat_pairs(self._arguments, self._recording.pairs, draws), draws)

    def _score(self, arguments: tuple[Any, ...], draws: int) -> Tensor:
        pairs = self._recording.pairs
        return check_score(self._forward(arguments), pairs * draws, pairs)

    def _first_draw(self, values: Values, draws: int) -> Values:
        return {index: value.detach().unflatten(0, (-1, draws))[:, 0] for index, value in values.items()}

    def _agree(self, one: Tensor, other: Tensor) -> bool:
        """Whether scores differ by no more than rounding; those that are no numbers are told elsewhere."""
        scores = torch.stack([one, other, self._recording.score.to(one)])
        if not bool(scores.isfinite().all()):
            return True
        least = self._recording.precision**0.5 * float(scores.abs().max())
        return float((one - other).abs().max()) <= least

    def _explain(self, values: Values, plain: Tensor, made: Tensor) -> None:
        """Raise what says why scores differ; rounding that the model amplifies is no reason."""
        self._check_arguments()
        self._check_modules(values)
        self._check_state(values, None)
        if any(call.operators for call in self._recording.calls):
            # Dynamic quantisation rounds by what else is in the batch; its missing derivative is told elsewhere.
            return
        moved = (plain - self._recording.score).abs().max()
        if (plain - made).abs().max() > _SHARE * moved:
            raise RuntimeError(
                f"forward_func: rerun from layer {self._names(values)}, it gives the score {float(made[0]):.4g} where "
                f"the whole model gives {float(plain[0]):.4g}; make what it computes depend on its arguments alone, "
                "and on nothing that an earlier call or module left behind."
            )

    def _explain_failure(self, values: Values, error: Exception) -> None:
        try:
            self._score(as_given(self._arguments), 1)
        except Exception:
            # The recorded pass, on one pair more, went through.
            raise ValueError(f"forward_func: on these pairs it fails ({error}); {EACH_BY_ITSELF}") from error
        try:
            self._plain(values)
        except Exception:
            return
        self._check_arguments()
        self._check_modules(values)
        self._check_state(values, error)

    def _names(self, values: Values) -> str:
        return ", ".join(repr(self._recording.taps[index].layer.name) for index in values)

    def _check_arguments(self) -> None:
        """Raise if the score of a pair depends on how many rows there are, or on nothing that it is given."""
        pairs, score = self._recording.pairs, self._score(as_given(self._arguments), 1)
        if not self._agree(score, self._score(as_given(self._arguments), 1)):
            raise RuntimeError(
                "forward_func: called twice on the same arguments, it gives different scores; make it draw nothing at "
                "random, and keep nothing between calls."
            )
        if refuse_shared(self._forward, self._arguments, pairs, score, self._agree):
            raise ValueError(
                f"forward_func: the score of a pair changes with the other pairs in the batch; {EACH_BY_ITSELF}"
            )

    def _check_modules(self, values: Values) -> None:
        """Raise if a module would be given what it does not return."""
        compared = _Compared(self._recording, self._reuse, values)
        with intercept(compared):
            self._score(as_given(self._arguments), 1)
        if compared.stale is not None:
            raise RuntimeError(
                f"forward_func: what {self._recording.name_of(compared.stale)} returns depends on layer "
                f"{self._names(values)} in a way that torch does not see, such as a kernel of its own, NumPy or a list "
                "of numbers; compute it with torch's operations, or call it with the tensors that it uses."
            )

    def _check_state(self, values: Values, error: Exception | None) -> None:
        """Raise if a module that is given the same as before returns something else when others do not run."""
        whole, part = (_Traced(self._recording, self._reuse, values, 1, run_all) for run_all in (True, False))
        with intercept(whole):
            self._score(as_given(self._arguments), 1)
        try:
            # What was left behind is what the recorded pass left there.
            self._forward(append_first(self._arguments, self._recording.pairs))
            self._through(part, 1)
        except Exception as failure:
            error = failure
        for place, (received, returned) in part.seen.items():
            before, after = whole.seen.get(place, ([], None))
            if _same(received, before) and (returned is None or after is None or not _same(returned, after)):
                raise RuntimeError(
                    f"forward_func: {self._recording.name_of(place)} reads something that another module leaves behind "
                    f"outside of what it returns, so the model cannot be rerun from layer {self._names(values)}; hand "
                    "it over as an argument, or choose an earlier layer."
                ) from error


@torch.no_grad()
def explain_recording(forward: Forward, arguments: tuple[Any, ...], pairs: int, error: Exception) -> None:
    """Raise what says why a recorded pass failed with an error, if the caller's own call does not."""
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return
    try:
        score = check_score(forward(as_given(arguments)), pairs, pairs)
    except Exception:
        return
    refuse_shared(forward, arguments, pairs, score, nearly_equal)


def refuse_shared(
    forward: Forward,
    arguments: tuple[Any, ...],
    pairs: int,
    score: Tensor,
    agree: Callable[[Tensor, Tensor], bool],
) -> bool:
    r"""Raise if one row more changes the scores of the pairs for a single argument that they share.

    Args:

        forward (Callable): Maps a tuple of arguments to one score per pair, (N,).
        arguments (tuple): The arguments as the caller gave them.
        pairs (int): N.
        score (Tensor): The scores of the caller's own call.
        agree (Callable): Whether scores of the pairs differ by no more than rounding.

    Returns:
        bool: whether it changes them for another reason.

    Raises:
        ValueError: if there is such an argument.
    """

    def is_kept(given: tuple[Any, ...]) -> bool:
        try:
            found = check_score(forward(append_first(given, pairs)), pairs + 1, pairs)
        except Exception:
            return False
        return agree(score, found[:pairs])

    if is_kept(arguments):
        return False
    for index, one in enumerate(arguments):
        if is_batch(one, pairs) and is_kept((*arguments[:index], Shared(one), *arguments[index + 1 :])):
            raise ValueError(say_shared(index, one))
    return True


class _Compared(Replayer):
    """Runs every module, and finds the first that does not return what a rerun would have instead."""

    def __init__(self, recording: Recording, reuse: Reuse, values: Values) -> None:
        super().__init__(recording, reuse, values, 1, run_all=True)
        self.stale: int | None = None

    def __call__(self, proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        place = self.place
        made = super().__call__(proceed, module, args, kwargs)
        call = self._recording.calls[place]
        output = None if call.reach & self._replaced else call.output
        if self.stale is None and output is not None and self._reuse.fits_any_rows(output):
            instead = self._reuse.hand_out(output.structure, 1)
            if not _same(tensors_in(made), tensors_in(instead)):
                self.stale = place
        return made


class _Traced(Replayer):
    """Keeps what every module receives and returns, None where it fails, in the order in which they end."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.seen: dict[int, tuple[list[Tensor], list[Tensor] | None]] = {}

    def __call__(self, proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        place, received = self.place, _copies((args, kwargs))
        try:
            made = super().__call__(proceed, module, args, kwargs)
        except Exception:
            self.seen[place] = (received, None)
            raise
        self.seen[place] = (received, _copies(made))
        return made


def _copies(structure: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_leaves(structure, lambda tensor: found.append(tensor.detach().clone()))
    return found


def _same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether tensors are the same but for rounding."""
    return len(some) == len(others) and all(
        one.shape == other.shape and nearly_equal(one, other) for one, other in zip(some, others, strict=True)
    )
