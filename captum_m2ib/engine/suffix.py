"""Rerun only what depends on a layer, on any module tree, and leave the model as it was found.

One forward pass is recorded as the sequence of its module calls. A call whose output does not depend on a tapped
layer, because it ran before the layer or belongs to the other tower, keeps its output; a rerun reuses that output
instead of running the module, and executes only the calls that the layer's value flows through. Dependence is
followed through every tensor operation of the recorded pass, differentiable or not, so nothing is assumed about the
architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from captum_m2ib.engine.consistency import Consistency, explain_recording
from captum_m2ib.engine.derivatives import Derivatives
from captum_m2ib.engine.interception import intercept, unobserved
from captum_m2ib.engine.layers import entering
from captum_m2ib.engine.recording import Tap, record
from captum_m2ib.engine.replaying import Replayer, Reuse
from captum_m2ib.engine.rows import FAILURES, check_score, repeat_pairs


class Suffix:
    r"""A recorded forward pass that can be rerun from the values of its tapped layers.

    Args:

        forward (Callable): Maps a tuple of arguments to one score per pair, (N,).
        arguments (tuple): The arguments; every tensor whose first dimension is N is a batch of pairs.
        pairs (int): N.
        taps (sequence of Tap): The layers to take over.
        for_score (bool, optional): Whether nothing but the score of a rerun and its gradient is looked at, so that
            linear layers need not run at positions that it does not read. Default: False

    Attributes:

        score (Tensor): The scores of the recorded pass, (N,).
        hidden (list[Tensor]): The hidden state at each tap, pairs first, (N, ...), detached.
        axes (list[BatchAxis]): Where the pairs run in each tapped hidden state as the model holds it.

    Raises:
        RuntimeError: if a tapped layer is not reached, or is reached more than once and no call was chosen, or the
            score does not depend on it.
        ValueError: if ``forward`` does not return one score per pair.

    Use inside :func:`captum_m2ib.engine.interception.borrowing`, in the thread that built it.
    """

    def __init__(
        self,
        forward: Callable[[tuple[Any, ...]], Any],
        arguments: tuple[Any, ...],
        pairs: int,
        taps: Sequence[Tap],
        for_score: bool = False,
    ) -> None:
        self._forward = entering(forward, [tap.layer for tap in taps])
        self._arguments = arguments
        try:
            self._recording = record(self._forward, arguments, pairs, taps)
        except FAILURES as error:
            explain_recording(self._forward, arguments, pairs, error)
            raise
        has_needed = any(call.needed is not None for call in self._recording.calls)
        self._reuse = Reuse(self._recording.rows, for_score and has_needed)
        self._consistency = Consistency(self._forward, arguments, self._recording, self._reuse)
        self._derivatives = Derivatives(self._forward, arguments, self._recording, self._reuse)
        self._checked: set[frozenset[int]] = set()
        self._differentiated: set[frozenset[int]] = set()
        self._modes = torch._C._len_torch_function_stack()
        self.taps = list(taps)
        self.score = self._recording.score
        self.hidden = list(self._recording.hidden)
        self.axes = list(self._recording.axes)

    def run(self, values: dict[int, Tensor], draws: int, dtype: torch.dtype | None = None) -> Tensor:
        r"""Rerun the pass with given hidden states at some taps.

        Args:

            values (dict): Per tap index the hidden state, pairs first and the draws of a pair next to each other,
                (N * draws, ...). Taps that are not named keep what the pass computes there.
            draws (int): Rows per pair.
            dtype (torch.dtype, optional): A lower precision in which operations run that ``torch.autocast`` allows it.
                Default: None (none does)

        Returns:
            Tensor: Scores, (N * draws,), differentiable with respect to ``values``.

        Raises:
            RuntimeError: if they are not, the model's calls changed since the recorded pass, or a rerun is not what the
                model itself makes of the values (:mod:`captum_m2ib.engine.consistency`).
            ValueError: if an argument that the pairs share was taken for one row per pair.
        """
        try:
            return self._run(values, draws, dtype)
        except FAILURES:
            # A model may look at positions that its score does not read, as where it checks itself.
            if not self._reuse.stop_narrowing():
                raise
            return self._run(values, draws, dtype)

    def _run(self, values: dict[int, Tensor], draws: int, dtype: torch.dtype | None) -> Tensor:
        pairs, kind = self._recording.pairs, frozenset(values)
        arguments = repeat_pairs(self._arguments, pairs, draws)
        try:
            lowered = nullcontext() if dtype is None else torch.autocast(self.score.device.type, dtype)
            with intercept(Replayer(self._recording, self._reuse, values, draws)), lowered:
                score = check_score(self._forward(arguments), pairs * draws, pairs).to(self.score.dtype)
        except FAILURES as error:
            if kind not in self._checked:
                with unobserved(self._modes):
                    self._consistency.explain_failure(values, draws, error)
            raise
        is_differentiable = torch.is_grad_enabled() and any(value.requires_grad for value in values.values())
        # Rounded scores say nothing of whether a rerun is what the model makes of the values.
        self._check(kind, values, draws, None if draws == 1 or dtype else score, is_differentiable)
        if is_differentiable and not score.requires_grad:
            names = ", ".join(repr(self.taps[index].layer.name) for index in values)
            raise RuntimeError(
                f"layers: the score does not depend on layer {names} in a differentiable way; choose a layer after the "
                "last rounding, index or torch.no_grad() between the input and the score."
            )
        return score

    def bytes_per_row(self, indices: Sequence[int]) -> int:
        r"""What one row of a rerun makes on its way to the score, of which autograd keeps between half and all.

        Args:

            indices (sequence of int): The taps from which it is rerun.

        Returns:
            int: Bytes of all tensors that depend on those taps, as the recorded pass made them.
        """
        taps = frozenset(indices)
        return -(-sum(size for reach, size in self._recording.sizes.items() if reach & taps) // self._recording.rows)

    def _check(
        self, kind: frozenset[int], values: dict[int, Tensor], draws: int, score: Tensor | None, is_differentiable: bool
    ) -> None:
        """Hold the first rerun from some taps against the model's own pass."""
        if kind not in self._checked:
            with unobserved(self._modes):
                self._consistency.check(values, draws, score, frozenset().union(*self._checked))
            self._checked.add(kind)
        if is_differentiable and kind not in self._differentiated:
            with unobserved(self._modes):
                self._derivatives.check(kind)
            self._differentiated.add(kind)
