"""What one pair costs on full-size models: ``python -m captum_m2ib.benchmark.speed.models [NAME ...]``.

Models are built from their configurations with random weights, which changes no cost. Each runs in a process of its
own, so that its peak memory is its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_m2ib.attr import MultiModalInfoBottleneck
from captum_m2ib.benchmark.meters import Flops
from captum_m2ib.encoders.dual_encoder import DualEncoder

Arguments = tuple[Tensor, ...]


def _clip(patch: int, large: bool = False) -> nn.Module:
    from transformers import CLIPConfig, CLIPModel

    vision: dict[str, Any] = {"patch_size": patch}
    text: dict[str, Any] = {}
    if large:
        vision |= {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
        text |= {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    return CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=768 if large else 512))


def _siglip() -> nn.Module:
    from transformers import SiglipConfig, SiglipModel

    return SiglipModel(SiglipConfig())


def _resnet50() -> nn.Module:
    import open_clip

    model: nn.Module = open_clip.create_model("RN50")
    return model


# How the model is built, its caption's length, the id that ends a caption, and whether it reads an attention mask.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int, bool]] = {
    "clip-vit-base-patch32": (lambda: _clip(32), 12, 49407, True),
    "clip-vit-base-patch16": (lambda: _clip(16), 12, 49407, True),
    "clip-vit-large-patch14": (lambda: _clip(14, large=True), 12, 49407, True),
    "siglip-base-patch16-224": (_siglip, 64, 1, False),
    "open_clip RN50": (_resnet50, 77, 49407, False),
}


def random_pair(length: int, end: int, masked: bool) -> Arguments:
    """Random pixels and a caption of twelve tokens, padded to ``length``."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 30_000, (1, length), generator=generator)
    ids[:, 11:] = end
    pair = torch.randn(1, 3, 224, 224, generator=generator), ids
    return (*pair, torch.ones_like(ids)) if masked else pair


def measure(name: str, repeats: int = 3) -> dict[str, Any]:
    r"""Cost of one pair on one model, in this process.

    Args:

        name (str): One of ``MODELS``.
        repeats (int, optional): Timed runs of each method. Default: 3

    Returns:
        dict: parameters in millions, and per method GFLOP, seconds from the shortest to the longest, and the process's peak
        memory up to its end above the loaded model, in MiB.
    """
    build, length, end, masked = MODELS[name]
    torch.manual_seed(0)
    encoder = DualEncoder(build().eval())
    first, second, *additional = random_pair(length, end, masked)
    with torch.no_grad():
        encoder(first, second, *additional)
    before = _peak()
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in encoder.parameters()) / 1e6}
    for kind, method in (
        ("default", MultiModalInfoBottleneck(encoder)),
        ("published", MultiModalInfoBottleneck.published(encoder)),
    ):

        def run(method: MultiModalInfoBottleneck = method) -> None:
            method.attribute((first, second), additional_forward_args=tuple(additional) or None)

        seconds = []
        counter = Flops()
        for index in range(repeats):
            # The first run is counted as well, which costs it next to nothing on models of this size.
            with counter if index == 0 else contextlib.nullcontext():
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
        # A peak only grows, so the second method's is that of both.
        found[kind] = {"gflop": counter.total / 1e9, "seconds": sorted(seconds), "peak": _peak() - before}
    return found


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def table(results: dict[str, dict[str, Any]]) -> str:
    """Results as Markdown."""
    lines = [
        "| model | parameters | method | GFLOP | seconds (min, max) | peak memory so far above the model |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results.items():
        for kind in ("default", "published"):
            times = found[kind]["seconds"]
            seconds = f"{statistics.median(times):.1f} ({times[0]:.1f}, {times[-1]:.1f})"
            memory = f"{found[kind]['peak']:.0f} MiB"
            gflop = f"{found[kind]['gflop']:,.0f}"
            lines.append(f"| {name} | {found['parameters']:.0f} M | {kind} | {gflop} | {seconds} | {memory} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(MODELS)}; all if none is given")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each (default: 3)")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    names = options.names or list(MODELS)
    if unknown := sorted(set(names) - set(MODELS)):
        parser.error(f"unknown models: {', '.join(unknown)}; known: {', '.join(MODELS)}")
    if options.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {options.repeats}")
    if options.in_this_process:
        print(json.dumps(measure(names[0], options.repeats)))
        return
    results = {}
    for name in names:
        command = [sys.executable, "-m", __spec__.name, name, "--in-this-process", "--repeats", str(options.repeats)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"measured {name}", file=sys.stderr)
    print(table(results))


if __name__ == "__main__":
    main()
