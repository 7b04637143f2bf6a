"""The figures of how-it-works.md, drawn from the method itself: ``python docs/figures.py [FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck
from captum_m2ib.engine.information import NATS_PER_BIT, information
from captum_m2ib.explanations.visualization import overlay
from captum_m2ib.scenes import CHECKPOINT, image_probes

HIDDEN = 1.5
"""The element whose distribution the first figure shows, in standard deviations from the mean."""

SCENE = 8
"""The scene of the second figure, the one that ``captum-m2ib explain`` shows."""


def channel() -> Figure:
    """One element behind a gate: how its output is distributed, and how many bits that says about it."""
    figure = Figure(figsize=(8, 3.4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    z = torch.linspace(-3.2, 3.2, 641)
    shades = (0.0, 0.3, 0.55, 0.8)
    for gate, shade in zip((0.0, 0.4, 0.7, 0.85), shades, strict=True):
        mean, std = gate * HIDDEN, 1 - gate
        density = torch.exp(-((z - mean) / std).square() / 2) / (std * (2 * torch.pi) ** 0.5)
        bits = float(information(torch.logit(torch.tensor(gate)), torch.tensor(HIDDEN))) / NATS_PER_BIT
        name = "g = 0: the prior, 0 bits" if gate == 0 else f"g = {gate:g}: {bits:.2f} bits"
        left.plot(z.numpy(), density.numpy(), color=_blue(shade), label=name)
    left.axvline(HIDDEN, color="0.4", linestyle=":", label=f"h = {HIDDEN:g}")
    left.set(xlabel="z", ylabel="density of z given h", xlim=(-3.2, 3.2), ylim=(0, None))
    left.legend(frameon=False, fontsize=9)

    gates = torch.linspace(0.0, 0.995, 400)
    for size, shade in zip((0.0, 1.0, 2.0, 3.0), shades, strict=True):
        bits = information(torch.logit(gates), torch.full_like(gates, size)) / NATS_PER_BIT
        right.plot(gates.numpy(), bits.numpy(), color=_blue(shade), label=f"|h| = {size:g}")
    right.set(xlabel="gate g", ylabel="information, bits", xlim=(0, 1), ylim=(0, 10))
    right.legend(frameon=False, fontsize=9)
    return _plain(figure)


def descent() -> Figure:
    """One picture: its gates, its bits, and how both came about."""
    encoder = DualEncoder.from_pretrained(CHECKPOINT)
    probe = image_probes(SCENE + 1, 0, 384)[SCENE]
    pairs = encoder.prepare(probe.image, probe.caption)
    arguments = {"additional_forward_args": pairs.additional_forward_args}
    _, record = MultiModalInfoBottleneck(encoder).attribute_with_record(pairs.inputs, **arguments)
    course = record.modalities[0]
    assert course.units is not None

    figure = Figure(figsize=(8, 6.6), layout="constrained", dpi=150)
    (first, second), (fourth, third) = figure.subplots(2, 2)
    first.imshow(overlay(pairs.pictures[0], course.units[0].numpy()))
    first.set_title(f'heat, "{probe.caption}"')
    for axes, values, title in (
        (second, _gates(pairs.inputs[0][0], course.units[0], record.settings.variance[0]), "gate of each pixel"),
        (third, course.units[0], "bits of each pixel"),
    ):
        figure.colorbar(axes.imshow(values.numpy(), cmap="cividis", vmin=0), ax=axes)
        axes.set_title(title)
    for axes in (first, second, third):
        axes.set(xticks=[], yticks=[])

    steps = range(len(course.score) + 1)
    bits = [*course.information[:, 0].tolist(), float(course.bits[0])]
    scores = [*course.score[:, 0].tolist(), float(course.score_after[0])]
    fourth.plot(steps, bits, color=_blue(0.8))
    fourth.set(xlabel="steps", ylim=(0, None))
    fourth.set_ylabel("bits in all", color=_blue(0.8))
    beside = fourth.twinx()
    beside.plot(steps, scores, color="tab:orange")
    beside.axhline(float(course.score_before[0]), color="tab:orange", linestyle=":")
    beside.set_ylim(0, None)
    beside.set_ylabel("score", color="tab:orange")
    fourth.set_title("descent; dotted: score of the pair")
    return figure


def _gates(pixels: Tensor, bits: Tensor, variance: float) -> Tensor:
    """The gate of each pixel of a picture, (h, w), found from its bits: information rises with the gate."""
    mean = pixels.mean((1, 2), keepdim=True)
    std = variance**0.5 * pixels.std((1, 2), keepdim=True, correction=0)
    low, high = torch.full_like(bits, -30.0), torch.full_like(bits, 30.0)
    for _ in range(60):
        middle = (low + high) / 2
        too_low = information(middle, pixels, mean, std).sum(0) < bits * NATS_PER_BIT
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return torch.sigmoid(low)


def _blue(shade: float) -> tuple[float, float, float]:
    return (0.55 - 0.5 * shade, 0.68 - 0.5 * shade, 0.88 - 0.35 * shade)


def _plain(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main(folder: Path) -> None:
    for name, draw in (("channel", channel), ("descent", descent)):
        draw().savefig(folder / f"{name}.png", metadata={"Software": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
