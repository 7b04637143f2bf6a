"""What one pair costs a method: time, arithmetic, and memory above the model's.

Both maps of one pair are made. A tuned method whose settings differ between pictures and captions runs twice, once for
each, and what it costs counts both.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch

from captum_m2ib.benchmark.meters import count_flops, in_new_process, peak_of, seconds_of
from captum_m2ib.benchmark.methods import FAMILIES, Method
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.scenes import image_probes

FIGURES = ("seconds per pair", "GFLOP per pair", "peak MiB")


def cost(method: Method, encoder: DualEncoder, model: str, repeats: int = 5) -> dict[str, list[float]]:
    r"""Cost of both maps of one pair.

    Args:

        method (Method): The method.
        encoder (DualEncoder): The model, for time and arithmetic.
        model (str): Its checkpoint directory: memory is measured in a process of its own.
        repeats (int, optional): Timed runs, after one that is not. Default: 5

    Returns:
        dict: per figure of :data:`FIGURES` a list of one value: the median time, the number of floating-point
        operations that torch counts, and the highest resident memory above that before the run.
    """
    run = _run(method, encoder)
    gflop = count_flops(run) / 1e9
    seconds = statistics.median(seconds_of(run, str(encoder.device)) for _ in range(repeats))
    peak = _peak_elsewhere(method, model)
    return dict(zip(FIGURES, ([seconds], [gflop], [peak]), strict=True))


def _peak_elsewhere(method: Method, model: str) -> float:
    """Peak memory in a process of its own: what one has allocated and freed is not seen to grow again."""
    try:
        return in_new_process(_peak_here, method.family.name, method.settings, model)
    except Exception as error:
        raise RuntimeError(
            f"{method.name}: its memory could not be measured in another process ({error or type(error).__name__}); "
            "leave out the cost with --without-cost."
        ) from error


def _run(method: Method, encoder: DualEncoder) -> Any:
    probe = image_probes(1, 0)[0]
    pairs = encoder.prepare([probe.image], [probe.caption])
    explainer = method(encoder)
    return lambda: explainer.attribute(pairs.inputs, pairs.additional_forward_args)


def _peak_here(family: str, settings: Any, model: str) -> float:
    from transformers.utils import logging

    logging.disable_progress_bar()
    # A pool of threads is memory of its own.
    torch.set_num_threads(1)
    return peak_of(_run(Method(family, FAMILIES[family], settings), DualEncoder.from_pretrained(model)))
