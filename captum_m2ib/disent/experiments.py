r"""InfoDisent measured on real backbones: accuracy, ablations, localisation, concentration, disentanglement, cost.

    python -m captum_m2ib.disent.experiments digits|scenes|cost --seeds 5 --output FILE.json [--quick]

For every seed a small convolutional net and a small ViT are trained; on each, InfoDisent with every part changed in
turn, a linear probe, and EPIC. Figures are means and standard deviations over seeds, on test pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_m2ib.disent.backbones import LAYERS, DataSet, OneTask, Pictures, digits, scenes, train_backbone
from captum_m2ib.disent.epic import EPIC
from captum_m2ib.disent.explanations import contributions, heatmaps
from captum_m2ib.disent.features import FeatureSet
from captum_m2ib.disent.head import HeadOptions, InfoDisentHead
from captum_m2ib.disent.measures import attribute_information, grad_cam, perturbation_curves
from captum_m2ib.disent.model import InfoDisent
from captum_m2ib.disent.prototypes import find_prototypes
from captum_m2ib.disent.transform import TRANSFORMS
from captum_m2ib.engine.layouts import PatchLayout
from captum_m2ib.metrics import pointing_game, relevance_mass

# Every variant changes one thing of the first.
VARIANTS: dict[str, dict[str, Any]] = {
    "infodisent": {},
    "maximum instead of Gumbel": {"estimator": "max"},
    "Gumbel noise 1": {"noise": 1.0},
    "no transform": {"transform": "none"},
    "mean pooling": {"pooling": "mean"},
    "top-3 pooling": {"pooling": "top_k"},
    "signed W": {"weight": "signed"},
    "centred features": {"standardise": "centre"},
    "linear probe": {"transform": "none", "pooling": "mean", "weight": "signed", "bias": True},
}
COST_CHANNELS = (384, 768, 2048)
_MAPS = ("infodisent", "no transform")


@dataclass(frozen=True)
class Plan:
    r"""How much is trained and measured.

    Args:

        backbone_epochs (dict[str, int]): Per kind of backbone.
        head_epochs (int): Of every head.
        head_examples (int): Training pictures that heads see.
        curve_examples (int): Test pictures for deletion and insertion.
        sizes (dict[str, int], optional): Further arguments of the data set.
    """

    backbone_epochs: Mapping[str, int]
    head_epochs: int
    head_examples: int
    curve_examples: int
    sizes: Mapping[str, int]


PLANS = {
    ("digits", False): Plan({"cnn": 15, "vit": 60}, 40, 2000, 0, {}),
    ("digits", True): Plan({"cnn": 2, "vit": 2}, 2, 200, 0, {"limit": 300}),
    ("scenes", False): Plan({"cnn": 10, "vit": 10}, 12, 1200, 100, {"train": 5000, "test": 500}),
    ("scenes", True): Plan({"cnn": 1, "vit": 1}, 2, 128, 16, {"train": 192, "test": 48}),
}


def run(name: str, seeds: int, output: str | os.PathLike[str], quick: bool = False, progress: bool = True) -> Any:
    r"""Run an experiment and write its figures after every seed.

    Args:

        name (str): ``"digits"``, ``"scenes"`` or ``"cost"``.
        seeds (int): How many, from 0.
        output (str or PathLike): JSON file; replaced.
        quick (bool, optional): A small run that only shows that everything works. Default: False
        progress (bool, optional): Default: True

    Returns:
        dict: what the file holds.

    Raises:
        ImportError: if scikit-learn is missing for the digits.
        ValueError: if ``seeds`` is below 1.
    """
    if seeds < 1:
        raise ValueError(f"seeds: expected 1 or more, got {seeds}.")
    began = time.perf_counter()
    if name == "cost":
        return _write(
            output, {"experiment": name, "cost": cost((16, 32) if quick else COST_CHANNELS, progress=progress)}
        )
    plan, runs = PLANS[name, quick], []
    report: dict[str, Any] = {}
    for seed in tqdm(range(seeds), desc=name, unit="seed", disable=not progress):
        data = digits(seed, **plan.sizes) if name == "digits" else scenes(seed, **plan.sizes)
        runs.append({kind: measure_backbone(kind, data, plan, seed) for kind in LAYERS})
        report = {
            "experiment": name,
            "quick": quick,
            "seeds": seed + 1,
            "seconds": round(time.perf_counter() - began, 1),
            "torch": torch.__version__,
            "figures": summarise(runs),
        }
        _write(output, report)
    return report


def measure_backbone(kind: str, data: DataSet, plan: Plan, seed: int) -> dict[str, Any]:
    """Train one backbone and measure everything on it, per task."""
    classifier = train_backbone(kind, data, seed, plan.backbone_epochs[kind])
    return {task: _measure_task(kind, classifier, data, task, plan, seed) for task in data.classes}


def _measure_task(kind: str, classifier: nn.Module, data: DataSet, task: str, plan: Plan, seed: int) -> dict[str, Any]:
    backbone, layer = OneTask(classifier, task), f"classifier.{LAYERS[kind]}"
    layout = PatchLayout((4, 4)) if kind == "vit" else None
    linear: nn.Linear = classifier.heads[task]  # type: ignore[index, union-attr, assignment]

    def build(options: Mapping[str, Any]) -> InfoDisent:
        return InfoDisent(backbone, layer, len(data.classes[task]), layout=layout, seed=seed, **options)

    first = build({})
    train = first.collect(_batches(data.train.subset(torch.arange(min(plan.head_examples, len(data.train)))), task))
    test = first.collect(_batches(data.test, task))
    labels = data.test.labels[task]
    with torch.no_grad():
        own = torch.cat([backbone(part) for part in data.test.images.split(256)])
    figures: dict[str, Any] = {"backbone": {"accuracy": _accuracy(own, labels)}}
    trained: dict[str, InfoDisent] = {}
    for variant, options in VARIANTS.items():
        model = build(options)
        began = time.perf_counter()
        model.fit(train, epochs=plan.head_epochs, lr=2e-2, transform_lr=1e-2, seed=seed)
        seconds = time.perf_counter() - began
        logits = model.predict(test)
        parts = contributions(model.head, test.features, labels)
        held = contributions(model.head, test.features, labels, contrast=True)
        figures[variant] = {
            "accuracy": _accuracy(logits, labels),
            "agreement with the backbone": _accuracy(logits, own.argmax(1)),
            "halves holding 90 %": float(parts.halves_holding(0.9).double().mean()),
            "halves holding 90 % of the margin": float(held.halves_holding(0.9).double().mean()),
            "orthogonality error": model.head.transform.orthogonality_error(),
            "seconds": seconds,
        }
        trained[variant] = model
    figures["infodisent"] |= _disentanglement(trained["infodisent"], test, data.test)
    figures["no transform"] |= _disentanglement(trained["no transform"], test, data.test)
    epic = EPIC(backbone, layer, linear, layout=layout)
    began = time.perf_counter()
    epic.fit(train, prototypes=(50, 5), epochs=plan.head_epochs, transform_lr=1e-2, seed=seed)
    figures["epic"] = {
        "accuracy": _accuracy(epic.predict(test), labels),
        "largest relative change of a logit": epic.check_lossless(data.test.images[:64]),
        "orthogonality error": epic.head.transform.orthogonality_error(),
        "seconds": time.perf_counter() - began,
        **_disentanglement(epic, test, data.test),
    }
    if data.test.masks is not None:
        figures["maps"] = _localisation(trained, test, data.test, labels, linear, backbone, plan)
    return figures


def _disentanglement(model: InfoDisent | EPIC, test: FeatureSet, pictures: Pictures) -> dict[str, float]:
    found = find_prototypes(model, test, per_half=5)
    # Halves as sparse pooling reads them, whatever the model itself pools by: the same question for every basis.
    maps = torch.cat([model.head.maps(part).detach() for part in test.batches()])
    evidence = torch.stack([F.relu(maps).amax((2, 3)), F.relu(-maps).amax((2, 3))], -1)
    return {
        "purity of prototypes": found.mean_purity(),
        "purity of positive prototypes": found.mean_purity(1),
        **attribute_information(evidence, pictures.labels),
    }


def _localisation(
    trained: Mapping[str, InfoDisent],
    test: FeatureSet,
    pictures: Pictures,
    labels: Tensor,
    linear: nn.Linear,
    backbone: nn.Module,
    plan: Plan,
) -> dict[str, dict[str, float]]:
    """Maps of the true class against the labelled object's mask; deletion and insertion on the backbone."""
    maps: dict[str, Tensor] = {"grad-cam": grad_cam(test.features, linear.weight.detach(), labels)}
    for name in _MAPS:
        head = trained[name].head
        plain = contributions(head, test.features, labels)
        margin = contributions(head, test.features, labels, contrast=True)
        strongest = [sorted(halves, key=lambda half: -half.contribution)[:1] for halves in margin.top(8)]
        maps |= {
            f"{name}, exact": plain.cells,
            f"{name}, spread": plain.spread,
            f"{name}, exact margin": margin.cells,
            f"{name}, spread margin": margin.spread,
            f"{name}, strongest half": torch.stack([part.sum(0) for part in heatmaps(margin.maps, strongest)]),
        }
    assert pictures.masks is not None
    masks, count = pictures.masks, plan.curve_examples
    figures = {"chance": {"pointing": float(masks.double().mean()), "relevance mass": float(masks.double().mean())}}
    for name, grid in maps.items():
        fine = F.interpolate(grid.clamp(min=0)[:, None], size=masks.shape[1:], mode="bilinear")[:, 0].double()
        deletion, insertion = perturbation_curves(backbone, pictures.images[:count], grid[:count], labels[:count])
        figures[name] = {
            "pointing": float(pointing_game(fine, masks).mean()),
            "relevance mass": float(relevance_mass(fine, masks).nan_to_num().mean()),
            "deletion": deletion,
            "insertion": insertion,
        }
    return figures


def cost(channels: Sequence[int], steps: int = 3, progress: bool = True) -> list[dict[str, Any]]:
    r"""Seconds per training step and orthogonality error afterwards, for every parametrisation and width.

    A step is forward, backward and Adam on 32 examples of 7 x 7 positions and 100 classes. Processor time is told
    beside wall time, as it does not grow when others use the machine.

    Args:

        channels (sequence of int): Widths D.
        steps (int, optional): Timed steps, after one that is not. Default: 3
        progress (bool, optional): Default: True
    """
    rows = []
    cases = [(width, kind) for width in channels for kind in TRANSFORMS]
    for width, kind in tqdm(cases, desc="cost", disable=not progress):
        generator = torch.Generator().manual_seed(0)
        head = InfoDisentHead(width, 100, HeadOptions(transform=kind)).train()
        optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
        features = torch.randn(32, width, 7, 7, generator=generator)
        labels = torch.randint(0, 100, (32,), generator=generator)
        taken = []
        for _ in range(steps + 1):
            began = time.perf_counter(), time.process_time()
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(head(features, generator), labels).backward()
            optimizer.step()
            taken.append((time.perf_counter() - began[0], time.process_time() - began[1]))
        rows.append(
            {
                "channels": width,
                "transform": kind,
                "seconds per step": statistics.median(wall for wall, _ in taken[1:]),
                "processor seconds per step": statistics.median(busy for _, busy in taken[1:]),
                "orthogonality error": head.transform.orthogonality_error(),
            }
        )
    return rows


def summarise(runs: Sequence[Any]) -> Any:
    """Nested figures of several seeds as one nest of mean, standard deviation and values."""
    if isinstance(runs[0], Mapping):
        return {name: summarise([run[name] for run in runs]) for name in runs[0]}
    spread = statistics.stdev(runs) if len(runs) > 1 else 0.0
    return {"mean": statistics.fmean(runs), "std": spread, "values": list(runs)}


def render(report: Mapping[str, Any]) -> str:
    """A report as lines of text."""
    if "cost" in report:
        return "\n".join(
            f"D = {row['channels']:5d}  {row['transform']:12}  {row['seconds per step']:8.3f} s per step "
            f"({row['processor seconds per step']:.3f} s of processor)  "
            f"orthogonality error {row['orthogonality error']:.1e}"
            for row in report["cost"]
        )
    lines = [f"{report['experiment']}: {report['seeds']} seeds, {report['seconds']} s; mean (standard deviation)"]
    for kind, tasks in report["figures"].items():
        for task, figures in tasks.items():
            lines.append(f"\n{kind}, {task}")
            lines += _table({name: values for name, values in figures.items() if name != "maps"})
            lines += _table(figures.get("maps", {}))
    return "\n".join(lines)


def _table(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    lines = []
    for name, values in rows.items():
        cells = (f"{figure} {_short(found['mean'])} ({_short(found['std'])})" for figure, found in values.items())
        lines.append(f"  {name:32} " + "  ".join(cells))
    return lines


def _short(value: float) -> str:
    return f"{value:.1e}" if 0 < abs(value) < 1e-3 else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _batches(pictures: Pictures, task: str, size: int = 256) -> list[tuple[Tensor, Tensor]]:
    return list(zip(pictures.images.split(size), pictures.labels[task].split(size), strict=True))


def _write(output: str | os.PathLike[str], report: dict[str, Any]) -> dict[str, Any]:
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, target)
    return report


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure InfoDisent on small backbones.")
    parser.add_argument("experiment", choices=("digits", "scenes", "cost"))
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSON file to write")
    parser.add_argument("--quick", action="store_true", help="a small run that only shows that everything works")
    given = parser.parse_args(arguments)
    print(render(run(given.experiment, given.seeds, given.output, given.quick)))


if __name__ == "__main__":
    main()
