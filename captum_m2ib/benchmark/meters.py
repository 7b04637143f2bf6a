"""Arithmetic, time and memory of a function's run."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Result = TypeVar("Result")


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


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    r"""Run a function in a process of its own, with an untouched memory.

    Args:

        function (Callable): A module's own function: it is sent by name.
        *arguments: What it is called with; sent as pickles.

    Returns:
        What the function returned.

    Raises:
        RuntimeError: if the process died, as when the system takes it for want of memory.
        Exception: what the function raised.
    """
    has_server = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if has_server else "spawn")
    if has_server:
        # Imports are paid once.
        context.set_forkserver_preload([function.__module__])
    try:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *arguments).result()
    except BrokenProcessPool:
        raise RuntimeError(
            f"the process that ran {function.__name__} was killed before it answered, maybe for want of memory."
        ) from None


def peak_of(run: Callable[[], Any], device: str = "cpu") -> float:
    r"""What a run adds to this process's memory at its peak.

    Args:

        run (Callable): What is measured; everything that it needs is there already.
        device (str, optional): Whose memory. Default: "cpu"

    Returns:
        float: MiB.
    """
    import resource

    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if _resident("VmRSS") is None:
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        # Kibibytes, but bytes on macOS.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / unit
    # A new process on Linux inherits its parent's peak: reset it.
    Path("/proc/self/clear_refs").write_text("5")
    # Only now: the system may have taken back unused pages in between.
    resident = _resident("VmRSS") or 0.0
    run()
    return (_resident("VmHWM") or resident) - resident


def _resident(entry: str) -> float | None:
    """Resident memory of this process in MiB, now (VmRSS) or at its peak (VmHWM); None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    line = next(line for line in status.read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) / 2**10
