"""Arithmetic and time of a function's run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry


class Flops(TorchDispatchMode):
    """Counts the floating-point operations of what runs inside, by torch's own formulae.

    torch's ``FlopCounterMode`` also tells modules apart, by hooks on gradients that refuse inputs of which a gradient
    is taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        formula = flop_registry.get(func._overloadpacket)
        if formula is None:
            # In inference mode operations come whole, a linear layer for example.
            with self:
                parts = func.decompose(*args, **given)
            if parts is not NotImplemented:
                return parts
        output = func(*args, **given)
        if formula is not None:
            self.total += formula(*args, **given, out_val=output)
        return output


def count_flops(run: Callable[[], Any]) -> int:
    """The floating-point operations of one run, an addition and a multiplication counted as two."""
    with Flops() as counter:
        run()
    return counter.total


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """The seconds that one run takes, with what it has left to do on the device."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    """Wait until a device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
