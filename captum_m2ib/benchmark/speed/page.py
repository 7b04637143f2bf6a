"""What a page of a full-size ColPali costs: ``python -m captum_m2ib.benchmark.speed.page [--seconds] [--map]``.

The model is built from its published sizes with random weights. Operations are counted on the meta device, where
nothing is computed; ``--seconds`` makes the weights (6 GB in bfloat16) and times single passes, ``--map`` times the
map of the page for a query, and counts its operations, too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from captum_m2ib.attr import MultiModalInfoBottleneck
from captum_m2ib.benchmark.meters import Flops
from captum_m2ib.encoders.dual_encoder import DualEncoder

_SIDE, _PATCH, _PROMPT, _QUERY = 448, 14, 6, 20
_IMAGE_TOKEN = 257_152


VISION: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "vision_use_head": False,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": _PATCH,
    "image_size": _SIDE,
}
TEXT: dict[str, Any] = {
    "model_type": "gemma",
    "hidden_size": 2048,
    "intermediate_size": 16_384,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "num_hidden_layers": 18,
    "vocab_size": 257_216,
}


def colpali() -> nn.Module:
    """A ColPali of SigLIP So400m and Gemma 2B, on the device where torch makes tensors, in eval mode."""
    from transformers import ColPaliConfig, ColPaliForRetrieval, PaliGemmaConfig

    width = TEXT["hidden_size"]
    both: dict[str, Any] = {"vision_config": VISION, "text_config": TEXT, "image_token_id": _IMAGE_TOKEN}
    reader = PaliGemmaConfig(**both, projection_dim=width, hidden_size=width)
    model: Any = ColPaliForRetrieval(ColPaliConfig(vlm_config=reader))
    model.set_attn_implementation("eager")
    return cast(nn.Module, model.eval().requires_grad_(False))


def _pair(device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A page and a query of random pixels and like tokens, and what the model takes beside them."""
    pixels = torch.rand(1, 3, _SIDE, _SIDE, dtype=dtype, device=device)
    patches = torch.full((1, (_SIDE // _PATCH) ** 2), _IMAGE_TOKEN, device=device)
    prompt = torch.cat([patches, torch.full((1, _PROMPT), 5, device=device)], 1)
    query = torch.full((1, _QUERY), 7, device=device)
    return pixels, query, torch.ones_like(query), prompt, torch.ones_like(prompt)


def passes(encoder: DualEncoder, device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    r"""One pass of each side, forwards, and one of the page forwards and back to its pixels.

    Args:

        encoder (DualEncoder): A ColPali.
        device (str): Where it computes.
        dtype (torch.dtype): Type of the pixels.

    Returns:
        dict: functions of nothing, by what they run.
    """
    pixels, query, mask, *ids = _pair(device, dtype)

    def page(given: Tensor) -> Tensor:
        return encoder.embed(0, given, mask, *ids)

    def back() -> None:
        given = pixels.clone().requires_grad_()
        page(given).float().sum().backward()

    return {
        "page, forwards": torch.no_grad()(lambda: page(pixels)),
        "of these the image tower": torch.no_grad()(lambda: encoder.tower_of(0)(pixels)),
        "query of 20 tokens, forwards": torch.no_grad()(lambda: encoder.embed(1, query, mask, *ids)),
        "page, forwards and back to its pixels": back,
    }


def gflop_of_passes() -> dict[str, float]:
    """Operations of each pass, counted on the meta device."""
    with torch.device("meta"):
        encoder = DualEncoder(colpali())
    gflop = {}
    for name, run in passes(encoder, "meta", torch.float32).items():
        # What is not computed cannot be checked: models ask whether a page has as many places as patches.
        with patch.object(torch, "_check_tensor_all_with", lambda *_: None), Flops() as counter:
            run()
        gflop[name] = counter.total / 1e9
    return gflop


def seconds_of_passes(repeats: int) -> dict[str, list[float]]:
    r"""Seconds of each pass on this process's cores, in bfloat16.

    Args:

        repeats (int): How often each pass runs, in turn.

    Returns:
        dict: seconds from the shortest to the longest, by what runs.
    """
    encoder = _made()
    found = passes(encoder, "cpu", torch.bfloat16)
    taken: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, run in found.items():
            start = time.process_time()
            run()
            taken[name].append(time.process_time() - start)
    return {name: sorted(values) for name, values in taken.items()}


def cost_of_map() -> tuple[float, float]:
    """Operations of a page's map for a query at the defaults, in 10^9, and its seconds on this process's cores."""
    encoder = _made()
    pixels, query, *additional = _pair("cpu", torch.bfloat16)
    start = time.process_time()
    with Flops() as counter:
        MultiModalInfoBottleneck(encoder).attribute(pixels, additional_forward_args=(query, *additional))
    return counter.total / 1e9, time.process_time() - start


def _made() -> DualEncoder:
    """The model with small random weights, in bfloat16 on the CPU."""
    with torch.device("meta"):
        encoder = DualEncoder(colpali())
    encoder = encoder.bfloat16().to_empty(device="cpu")
    for one in (*encoder.parameters(), *encoder.buffers()):
        # Whole numbers are positions, of which any will do.
        if one.is_floating_point():
            one.data.uniform_(-0.02, 0.02)
        else:
            one.zero_()
    return encoder


def table(gflop: dict[str, float], seconds: dict[str, list[float]]) -> str:
    """Results as Markdown."""
    lines = ["| | GFLOP | seconds of a core (min, max) |", "|---|---|---|"]
    for name, count in gflop.items():
        times = seconds.get(name)
        told = f"{statistics.median(times):.1f} ({times[0]:.1f}, {times[-1]:.1f})" if times else ""
        lines.append(f"| {name} | {count:,.0f} | {told} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Count, and time where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", action="store_true", help="also run the passes, in bfloat16 on the CPU")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each pass (default: %(default)s)")
    parser.add_argument("--map", action="store_true", help="also the page's map for the query, once")
    given = parser.parse_args(arguments)
    gflop = gflop_of_passes()
    seconds = seconds_of_passes(given.repeats) if given.seconds else {}
    if given.map:
        name = "map of the page for a query"
        gflop[name], taken = cost_of_map()
        seconds[name] = [taken]
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(table(gflop, seconds))


if __name__ == "__main__":
    main()
