"""Figures of the pages: ``python docs/figures.py [FOLDER]``, those of photographs with ``--photographs`` before it.

Those of how-it-works.md, guides/sounds-and-videos.md and interactions.md are drawn from the methods themselves, that of
the rivals from the table in benchmark.md, that of quality and cost from what two benchmarks wrote. Those of photographs
need the extra ``two-parts``; they are what ``captum-m2ib explain`` writes, as JPEG.
"""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, explain, interactions
from captum_m2ib.benchmark.methods import methods as known_methods
from captum_m2ib.benchmark.photos.two_parts import classifier, two_parts
from captum_m2ib.disent import InfoDisent, class_figure, explain_class, find_prototypes
from captum_m2ib.disent.named import Preparation
from captum_m2ib.engine.ground import ground_of
from captum_m2ib.engine.information import NATS_PER_BIT, information
from captum_m2ib.explanations.visualization import overlay
from captum_m2ib.metrics import relevance_mass
from captum_m2ib.scenes import CHECKPOINT, pair_probes
from captum_m2ib.scenes.events import draw_sound, draw_video, listener, watcher
from captum_m2ib.scenes.example import example_scene

PHOTOS = Path(__file__).parent / "images" / "photos"

PHOTOGRAPHS = {
    "cat": ("coffee_and_cat.jpg", "a photo of a cat"),
    "cup": ("coffee_and_cat.jpg", "a photo of a cup of coffee"),
    "rocket_explained": ("rocket.jpg", "a photo of a rocket"),
}
"""The figures of photographs: the picture and the caption of each."""

BESIDE = ("m2ib", "m2ib-published", "nib", "integrated-gradients", "grad-cam", "occlusion")
"""The methods that are shown side by side on a photograph."""

PARTS = {
    "coffee": ("coffee_and_cat.jpg", (0, 0, 384, 192)),
    "cat": ("coffee_and_cat.jpg", (0, 192, 384, 384)),
    "rocket": ("rocket.jpg", (0, 0, 384, 384)),
}
"""The classes of the class page: the picture of each, and the box that parts are cut from."""

PARTS_OF_EACH, LEAST_PART = 30, 96
"""How many parts of each, and the least side of a part in pixels."""

HIDDEN = 1.5
"""The element whose distribution the first figure shows, in standard deviations from the mean."""

FIGURES = Path(__file__).parent / "images" / "rivals.csv"
"""The figures of benchmark.md's table of methods: method, figure, mean, and the ends of the 95 % interval."""

COSTS = Path(__file__).parent / "images" / "speed.csv"
"""What ``captum-m2ib benchmark speed --csv`` wrote."""

QUALITIES = Path(__file__).parent / "images" / "quality.csv"
"""Of what ``captum-m2ib benchmark scenes --quick`` wrote, the figures of the methods that are timed."""

OURS = "#0b5cad"

TIMED = {
    "default": ("M2IB, default", (0, 11)),
    "fine": ("M2IB, 8 x 9", (0, 11)),
    "published": ("M2IB, published loop", (-16, -16)),
    "integrated": ("Integrated Gradients*", (0, -16)),
    "grad-eclip": ("Grad-ECLIP", (0, 11)),
    "legrad": ("LeGrad", (0, -16)),
}
"""The ways of the fourth figure: what each is called, and where that stands, in points from its dot."""

PANELS = {
    "image pointing": ("picture:\npointing", 0.0, 0.05),
    "image mass": ("picture:\nmass", 0.0, 0.05),
    "image auroc": ("picture:\nAUROC", 0.5, 0.5),
    "text auroc": ("words:\nAUROC", 0.5, 0.5),
    "text top-1": ("words:\ntop-1", 0.5, 0.5),
}
"""What the panels of the third figure show: the title, where the axis begins, and what is reached by chance."""

ROWS = {
    "M2IB": ("m2ib-published", "m2ib"),
    "Integrated Gradients": ("integrated-gradients", "integrated-gradients-tuned"),
    "attention relevance": ("relevance", "relevance-tuned"),
    "Grad-ECLIP": ("grad-eclip", "grad-eclip-tuned"),
    "LeGrad": ("legrad", "legrad-tuned"),
    "NIB": ("nib", "nib-tuned"),
    "occlusion": ("occlusion",),
    "feature ablation": ("feature-ablation",),
    "Grad-CAM": ("grad-cam",),
    "centre prior": ("centre",),
}
"""The rows of the third figure, in the order of pointing: each method as published, and at the setting chosen on
validation scenes."""


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
    probe = example_scene()
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


def sound() -> Figure:
    """Two tones, of which the caption names one."""
    drawn = draw_sound({"low": (0.5, 1.0), "high": (2.5, 3.0)})
    return explain(listener(), drawn, "a high tone")[0].plot()


def video() -> Figure:
    """Two squares in two frames, of which the caption names one."""
    drawn = draw_video({"red": (2, 1, 4), "blue": (4, 5, 0)})
    return explain(watcher(), drawn, "a red square")[0].plot()


def together() -> Figure:
    """Which patches act together with which words of a caption that names two objects."""
    (scene,) = pair_probes(1, seed=0, size=384)
    found = interactions(DualEncoder.from_pretrained(CHECKPOINT), scene.image, scene.caption)
    return found.plot()


def rivals() -> Figure:
    """M2IB beside its rivals on scenes: a row per method, a panel per figure, mean and 95 % interval."""
    with FIGURES.open(encoding="utf-8", newline="") as lines:
        found = {(row["method"], row["figure"]): row for row in csv.DictReader(lines)}
    figure = Figure(figsize=(9.6, 4.6), layout="constrained", dpi=150)
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (measured, (title, begin, chance)) in zip(panels, PANELS.items(), strict=True):
        axes.axvline(chance, color="0.3", linestyle=":", linewidth=1.3, zorder=1)
        for row, (name, methods) in enumerate(ROWS.items()):
            colour = OURS if name == "M2IB" else "0.4"
            for method, lift, face in zip(methods, (0.17, -0.17), ("white", colour), strict=False):
                mean, low, high = (float(found[method, measured][column]) for column in ("mean", "low", "high"))
                place = row + (lift if len(methods) > 1 else 0)
                axes.plot([low, high], [place, place], color=colour, linewidth=1.6)
                axes.plot(mean, place, "o", color=colour, markerfacecolor=face, label=f"{method}, {measured}")
        # Intervals of what is at chance reach below it, and a dot at the end of the axis is drawn whole.
        margin, ticks = 0.08 * (1 - begin), (begin, (begin + 1) / 2, 1)
        axes.set(title=title, xlim=(begin - margin, 1 + margin), ylim=(len(ROWS) - 0.5, -0.5))
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(ROWS)), list(ROWS), fontsize=11)
    panels[0].get_yticklabels()[0].set(color=OURS, fontweight="bold")
    keys = "filled: chosen on validation scenes    hollow: as published    bars: 95 % intervals    dotted: chance"
    figure.supxlabel(keys, fontsize=10)
    return _plain(figure)


def cost() -> Figure:
    """How right maps of pictures are, and what both maps of a pair cost."""
    with COSTS.open(encoding="utf-8", newline="") as lines:
        ways = {row["way"]: row for row in csv.DictReader(lines)}
    with QUALITIES.open(encoding="utf-8", newline="") as lines:
        found = {(row["method"], row["figure"]): row for row in csv.DictReader(lines)}
    figure = Figure(figsize=(9.6, 3.6), layout="constrained", dpi=150)
    for axes, (measured, title) in zip(
        figure.subplots(1, 2), (("image pointing", "pointing"), ("image mass", "mass")), strict=True
    ):
        for name, (label, place) in TIMED.items():
            gflop, row = float(ways[name]["gflop"]), found[ways[name]["method"], measured]
            mean, low, high = (float(row[column]) for column in ("mean", "low", "high"))
            colour = OURS if label.startswith("M2IB") else "0.4"
            axes.plot([gflop, gflop], [low, high], color=colour, linewidth=1.6)
            axes.plot(gflop, mean, "o", color=colour, label=f"{name}, {measured}")
            end = high if place[1] > 0 else low
            axes.annotate(
                label, (gflop, end), place, textcoords="offset points", ha="center", va="center", fontsize=8.5
            )
        axes.set(xscale="log", xlabel="GFLOP for both maps of a pair, ViT-B/32", title=title)
        axes.set(xlim=(7, 20_000), ylim=(0, 1.12), yticks=(0, 0.5, 1))
        axes.set_xticks((10, 100, 1_000, 10_000), ("10", "100", "1,000", "10,000"))
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
    return _plain(figure)


def photographs(folder: Path) -> None:
    """Write what the encoder of two parts sees in photographs, and where six methods see it."""
    encoder = two_parts()
    for name, (picture, caption) in PHOTOGRAPHS.items():
        _save(explain(encoder, PHOTOS / picture, caption, seed=0)[0].plot(), folder / f"{name}.jpg")
    _save(beside(encoder), folder / "methods.jpg")
    _save(concepts(), folder / "concepts.jpg")


def beside(encoder: DualEncoder) -> Figure:
    """Maps of methods for two captions, one for each half of the picture, with the share of each on the right half."""
    captions = [PHOTOGRAPHS[name][1] for name in ("cup", "cat")]
    pairs = encoder.prepare(PHOTOS / PHOTOGRAPHS["cat"][0], captions)
    pixels, *rest = (*pairs.inputs, *pairs.additional_forward_args)
    truth = torch.zeros(pixels[:, 0].shape, dtype=torch.bool)
    truth[0, : truth.shape[1] // 2] = truth[1, truth.shape[1] // 2 :] = True
    figure = Figure(figsize=(10, 3.9), layout="constrained", dpi=120)
    panels = figure.subplots(2, len(BESIDE))
    known = known_methods()
    for column, name in zip(panels.T, BESIDE, strict=True):
        maps = known[name](encoder).attribute(pixels, additional_forward_args=tuple(rest)).detach().sum(1)
        shares = relevance_mass(maps, truth).tolist()
        for axes, picture, bits, share, caption in zip(column, pairs.pictures, maps, shares, captions, strict=True):
            axes.imshow(overlay(picture, bits.clamp(min=0).numpy()))
            axes.set(xticks=[], yticks=[])
            axes.set_title(f"{name}: {100 * share:.0f} %", fontsize=8)
            if name == BESIDE[0]:
                axes.set_ylabel(caption, fontsize=8)
    return figure


def concepts() -> Figure:
    """What InfoDisent on a classifier of photographs rests on for the class of the cat."""
    preparation, rng = Preparation(), np.random.default_rng(0)
    crops, labels = [], []
    for label, (picture, box) in enumerate(PARTS.values()):
        with Image.open(PHOTOS / picture) as photo:
            whole = photo.convert("RGB").crop(box)
        for _ in range(PARTS_OF_EACH):
            side = int(rng.integers(LEAST_PART, min(whole.size) + 1))
            left, top = (int(rng.integers(length - side + 1)) for length in whole.size)
            crops.append(preparation.crop(whole.crop((left, top, left + side, top + side))))
            labels.append(label)
    images, targets = torch.stack([preparation.tensor(crop) for crop in crops]), torch.tensor(labels)
    model = InfoDisent(classifier(), "_blocks.15", len(PARTS), class_names=tuple(PARTS), estimator="max")
    features = model.collect(list(zip(images.split(15), targets.split(15), strict=True)))
    model.fit(features, epochs=100, cuts=1)
    found = find_prototypes(model, features)
    page = explain_class(model, features, list(PARTS).index("cat"), found, n_halves=4)
    return class_figure(model, page, found, [np.asarray(crop) for crop in crops])


def _save(figure: Figure, path: Path) -> None:
    """As JPEG: a photograph in a PNG is five times as large."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png")
    with Image.open(drawn) as picture:
        picture.convert("RGB").save(path, quality=88, optimize=True)


def _gates(pixels: Tensor, bits: Tensor, variance: float) -> Tensor:
    """The gate of each pixel of a picture, (h, w), found from its bits: information rises with the gate."""
    mean = ground_of(pixels[None], None, 1)[0]
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
    drawn = {
        "channel": channel,
        "descent": descent,
        "interactions": together,
        "rivals": rivals,
        "cost": cost,
        "sound": sound,
        "video": video,
    }
    for name, draw in drawn.items():
        # Noise makes large files.
        dpi = 90 if draw in (sound, video) else "figure"
        draw().savefig(folder / f"{name}.png", metadata={"Software": None}, dpi=dpi)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--photographs"]:
        photographs(Path(sys.argv[2]) if len(sys.argv) > 2 else PHOTOS)
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images")
