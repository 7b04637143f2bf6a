"""The module calls that are running, and the tensors they use that no operation made within sight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.engine.dependence import NOTHING, Reach, storage_of
from captum_m2ib.engine.interception import met_modules


class Frame:
    r"""A module call that is running.

    Attributes:

        module (nn.Module): The module.
        received (frozenset[int]): The sources of what it was called with.
        unseen (dict): By storage, the floating-point tensors it used that nothing made within sight, and what was kept
            of each; the tensors themselves are held, lest another gets the storage.
        operators (dict): The names of operators that are not torch's own, as keys.
        numbers (frozenset[int]): The sources of what it made Python numbers of.
    """

    def __init__(self, module: nn.Module, received: Reach) -> None:
        self.module = module
        self.received = received
        self.unseen: dict[int, tuple[Tensor, Any]] = {}
        self.operators: dict[str, None] = {}
        self.numbers = NOTHING


class Frames:
    r"""The calls that are running, innermost last.

    Args:

        keep (Callable): What to keep of a tensor that nothing made within sight.

    Attributes:

        numbers (frozenset[int]): The sources of what became a Python number while no module ran.
    """

    def __init__(self, keep: Callable[[Tensor], Any]) -> None:
        self._keep = keep
        self.numbers = NOTHING
        self._running: list[Frame] = []
        self._held: set[int] = set()
        self._looked_at = 0

    def enter(self, module: nn.Module, received: Reach) -> None:
        """A module is called."""
        self._running.append(Frame(module, received))

    def leave(self) -> Frame:
        """The innermost call has returned."""
        return self._running.pop()

    def of_unseen(self, tensor: Tensor) -> Reach:
        """The sources of a tensor that nothing made within sight: all that the running module received."""
        if not self._running:
            return NOTHING
        frame, key = self._running[-1], storage_of(tensor)
        if not frame.received or self._is_held(frame.module, key):
            return NOTHING
        # Without gradients are the insides of functions that bring their own derivative, and what is held fixed.
        if torch.is_grad_enabled() and tensor.is_floating_point() and key not in frame.unseen:
            frame.unseen[key] = (tensor, self._keep(tensor))
        return frame.received

    def note_operator(self, name: str) -> None:
        """The running module uses an operator that is not torch's own."""
        if self._running:
            self._running[-1].operators[name] = None

    def note_number(self, sources: Reach) -> None:
        """The running module makes a Python number of what descends from the sources."""
        place = self._running[-1] if self._running else self
        place.numbers |= sources

    def _is_held(self, module: nn.Module, key: int) -> bool:
        """Whether a storage belonged to a module before it ran, or is a parameter of the running one, loaded since."""
        met = met_modules()
        self._held.update(storage_of(tensor) for one in met[self._looked_at :] for tensor in _held_by(one))
        self._looked_at = len(met)
        return key in self._held or key in {storage_of(one) for one in module.parameters(recurse=False)}


def _held_by(module: nn.Module) -> list[Tensor]:
    found = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
    return [one for one in found if isinstance(one, Tensor)]
