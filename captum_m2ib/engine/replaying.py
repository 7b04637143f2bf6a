"""Follow a recording through a rerun: reuse what does not depend on the replaced taps, run the rest."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from captum_m2ib.engine import windows
from captum_m2ib.engine.dependence import NOTHING, Reach
from captum_m2ib.engine.interception import Handler, is_stateless
from captum_m2ib.engine.layers import map_leaves, replace_at, tensors_in
from captum_m2ib.engine.needs import narrowed
from captum_m2ib.engine.recording import Call, Kept, Output, Recording


class Replayer:
    r"""What one rerun's module calls are routed through.

    Args:

        recording (Recording): The pass to follow.
        reuse (Reuse): What earlier reruns of the recording left for this one.
        values (dict): Per tap index the hidden state that replaces it, (N * draws, ...).
        draws (int): Rows per pair.
        run_all (bool, optional): Run every module, whether it depends on the replaced taps or not. Default: False
        behind (frozenset[int], optional): With ``run_all``, taps: what comes behind one of these and is done before
            the first replaced tap opens is reused all the same. Default: none

    Attributes:

        place (int): The position of the next call in the recording.
    """

    def __init__(
        self,
        recording: Recording,
        reuse: Reuse,
        values: dict[int, Tensor],
        draws: int,
        run_all: bool = False,
        behind: Reach = NOTHING,
    ) -> None:
        self._recording = recording
        self._reuse = reuse
        self._values = values
        self._replaced = frozenset(values)
        self._draws = draws
        self._run_all = run_all
        self._behind = behind
        self._first = next((place for place, call in enumerate(recording.calls) if call.tap in values), 0)
        self.place = 0

    def __call__(self, proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        call, reuse = self._next(module), self._reuse
        tap = call.tap if call.tap in self._replaced else None
        if tap is not None and self._recording.taps[tap].at_input:
            args, kwargs = self._replace(tap, (args, kwargs))
            return proceed(module, *args, **kwargs)
        if self._run_all and not (call.reach & self._behind and call.end <= self._first):
            made = proceed(module, *args, **kwargs)
            return made if tap is None else self._replace(tap, made)
        if tap is not None:
            self.place = call.end
            return self._replace(tap, reuse.hand_out(self._recording.structures[tap], self._draws))
        if call.output is None or call.reach & self._replaced:
            if call.needed is not None and reuse.is_narrowing:
                return narrowed(proceed, module, args, kwargs, call.needed)
            return windows.call(proceed, module, args, kwargs)
        if reuse.fits_any_rows(call.output):
            self.place = call.end
            return reuse.hand_out(call.output.structure, self._draws)
        made = proceed(module, *args, **kwargs)
        reuse.learn(call.output, made, self._recording.pairs * self._draws)
        return made

    def _replace(self, tap: int, structure: Any) -> Any:
        # A copy, so that a model that works in place leaves the caller's values alone.
        value = self._recording.axes[tap].merge(self._values[tap]).clone()
        return replace_at(structure, self._recording.paths[tap], value)

    def _next(self, module: nn.Module) -> Call:
        calls = self._recording.calls
        if self.place >= len(calls) or not _is_same(calls[self.place].module, module):
            expected = type(calls[self.place].module).__name__ if self.place < len(calls) else "no further call"
            raise RuntimeError(
                "forward_func: its module calls changed between two runs on the same pairs (the first ran "
                f"{expected} where the second ran {type(module).__name__}); make its control flow independent of "
                "earlier calls and of the hidden state."
            )
        self.place += 1
        return calls[self.place - 1]


class Reuse:
    r"""What the reruns of one recording share: copies repeated over draws, and which constants fit any rows.

    Args:

        recorded_rows (int): On how many rows the recorded pass ran.
        is_narrowing (bool, optional): Whether linear layers run only at the positions that are read, where these are
            known. Default: False
    """

    def __init__(self, recorded_rows: int, is_narrowing: bool = False) -> None:
        self.is_narrowing = is_narrowing
        self._recorded_rows = recorded_rows
        self._copies: dict[tuple[Kept, int], tuple[Tensor, int]] = {}
        self._fits: dict[Output, bool] = {}

    def hand_out(self, structure: Any, draws: int) -> Any:
        """The structure as a pass on so many draws per pair makes it."""
        return map_leaves(structure, lambda kept: self._copy(kept, draws), Kept)

    def stop_narrowing(self) -> bool:
        """Run layers at all positions from now on; returns whether that changes anything."""
        was_narrowing, self.is_narrowing = self.is_narrowing, False
        return was_narrowing

    def fits_any_rows(self, output: Output) -> bool:
        """Whether the output is known to be right for any number of rows; a constant is not before it was learnt."""
        return not output.is_constant or self._fits.get(output, False)

    def learn(self, output: Output, made: Any, rows: int) -> None:
        """Tell a constant of fixed shape from one made for so many rows, such as a query repeated for each."""
        if output in self._fits or rows == self._recorded_rows:
            return
        kept: list[Kept] = []
        map_leaves(output.structure, kept.append, Kept)
        both = zip(tensors_in(made), kept, strict=True)
        self._fits[output] = not any(k.axis is None and t.shape != k.value.shape for t, k in both)

    def _copy(self, kept: Kept, draws: int) -> Tensor:
        given, version = self._copies.get((kept, draws), (None, 0))
        # A model that works in place on what its modules returned would corrupt the copy for the next rerun.
        if given is None or given._version != version:
            given = kept.value.clone() if kept.axis is None else kept.axis.repeat(kept.value, draws)
            self._copies[kept, draws] = (given, given._version)
        return given


def _is_same(recorded: nn.Module, module: nn.Module) -> bool:
    """Whether a call is the recorded one; a function in a module's guise may be made anew for each pass."""
    return recorded is module or (type(recorded) is type(module) and is_stateless(module))
