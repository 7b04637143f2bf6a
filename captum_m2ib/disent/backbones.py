"""Small classifiers and the data they are trained on, for the experiments: a convolutional net and a ViT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_m2ib.scenes.captions import COLOURS, SHAPES
from captum_m2ib.scenes.drawing import draw_scenes, generator

SCENE_SIDE, DIGIT_SIDE = 32, 16
# With two objects, the larger must be this much larger in visible area than the other.
_OBJECTS = {1: 0.5, 2: 0.5}
_DOMINANCE = 1.3
_WIDTH = 48


@dataclass(frozen=True, eq=False)
class Pictures:
    r"""Pictures with labels, and where what the label names is.

    Attributes:

        images (Tensor): (n, C, side, side), in [-1, 1].
        labels (dict[str, Tensor]): Per task, int64 (n,).
        masks (Tensor, optional): Where the labelled object is visible, boolean (n, side, side).
    """

    images: Tensor
    labels: dict[str, Tensor]
    masks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: Tensor) -> Pictures:
        """The rows at these indices."""
        labels = {task: values[rows] for task, values in self.labels.items()}
        return Pictures(self.images[rows], labels, None if self.masks is None else self.masks[rows])


@dataclass(frozen=True)
class DataSet:
    """Training and test pictures, and the names of each task's classes."""

    train: Pictures
    test: Pictures
    classes: dict[str, tuple[str, ...]]


def digits(seed: int, limit: int | None = None) -> DataSet:
    r"""scikit-learn's 1,797 scans of digits, doubled to 16 x 16 pixels; three in ten are for testing.

    Args:

        seed (int): Of the split.
        limit (int, optional): Use so many of them. Default: None (all)

    Raises:
        ImportError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            "scikit-learn: expected it to be installed for the digits; run pip install scikit-learn, or use the scenes."
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:limit]
    large = F.interpolate(images[order], size=DIGIT_SIDE, mode="nearest")
    pictures = Pictures(large, {"digit": torch.from_numpy(labels)[order].long()})
    cut = round(0.7 * len(order))
    rows = torch.arange(len(order))
    return DataSet(pictures.subset(rows[:cut]), pictures.subset(rows[cut:]), {"digit": tuple("0123456789")})


def scenes(seed: int, train: int = 6000, test: int = 600) -> DataSet:
    r"""Scenes of one or two objects, labelled by shape and by colour of the one with the largest visible area.

    Args:

        seed (int): Of the scenes; training and test scenes come from streams of their own.
        train (int, optional): Scenes for training. Default: 6000
        test (int, optional): Scenes for testing. Default: 600
    """
    return DataSet(
        _draw("training", seed, train),
        _draw("held_out", seed, test),
        {"shape": tuple(SHAPES), "colour": tuple(COLOURS)},
    )


def _draw(purpose: str, seed: int, count: int) -> Pictures:
    rng = generator(purpose, seed)
    images: list[np.ndarray] = []
    masks, shapes, colours = [], [], []
    while len(images) < count:
        for scene in draw_scenes(rng, 256, SCENE_SIDE, counts=_OBJECTS):
            areas = scene.masks.sum((1, 2))
            ranked = np.sort(areas)[::-1]
            if len(ranked) > 1 and ranked[0] < _DOMINANCE * ranked[1]:
                continue
            which = int(areas.argmax())
            images.append(scene.image)
            masks.append(scene.masks[which])
            shapes.append(SHAPES.index(scene.objects[which].shape))
            colours.append(COLOURS.index(scene.objects[which].colour))
    pixels = torch.from_numpy(np.stack(images[:count])).permute(0, 3, 1, 2).float() / 127.5 - 1
    labels = {"shape": torch.tensor(shapes[:count]), "colour": torch.tensor(colours[:count])}
    return Pictures(pixels, labels, torch.from_numpy(np.stack(masks[:count])))


class Heads(nn.ModuleDict):
    """One linear layer per task on the mean over positions."""

    def forward(self, pooled: Tensor) -> dict[str, Tensor]:
        return {task: layer(pooled) for task, layer in self.items()}


class SmallCNN(nn.Module):
    r"""Convolutions with batch norm to a grid of channels, its mean, one linear layer per task.

    Args:

        channels (int): Of the pictures.
        side (int): Of the pictures in pixels; the grid is 8 x 8 for 32 and 4 x 4 for 16.
        tasks (dict[str, int]): Number of classes per task.
    """

    def __init__(self, channels: int, side: int, tasks: dict[str, int]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((channels, 24, 2), (24, _WIDTH, 2), (_WIDTH, _WIDTH, 1), (_WIDTH, _WIDTH, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = Heads({task: nn.Linear(_WIDTH, count) for task, count in tasks.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.heads(self.trunk(images).mean((2, 3)))


class SmallViT(nn.Module):
    r"""Patches of 4 x 4 pixels, a few blocks, the mean over patch tokens, one linear layer per task.

    Args:

        channels, side, tasks: As for :class:`SmallCNN`.
    """

    patch_size = 4

    def __init__(self, channels: int, side: int, tasks: dict[str, int], depth: int = 3) -> None:
        super().__init__()
        self.embed = nn.Conv2d(channels, _WIDTH, self.patch_size, self.patch_size)
        self.position = nn.Parameter(0.02 * torch.randn(1, (side // self.patch_size) ** 2, _WIDTH))
        self.blocks = nn.Sequential(*[_Block(_WIDTH) for _ in range(depth)])
        self.norm = nn.LayerNorm(_WIDTH)
        self.heads = Heads({task: nn.Linear(_WIDTH, count) for task, count in tasks.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.heads(self.norm(self.blocks(tokens)).mean(1))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.project(self.before(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts.unbind(0)).transpose(1, 2).flatten(2)
        tokens = tokens + self.merge(mixed)
        return tokens + self.mlp(self.after(tokens))


class OneTask(nn.Module):
    """A classifier of several tasks as a classifier of one, for methods that read one tensor of logits."""

    def __init__(self, classifier: nn.Module, task: str) -> None:
        super().__init__()
        self.classifier, self.task = classifier, task
        self.train(classifier.training)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(images)[self.task]


LAYERS = {"cnn": "trunk", "vit": "norm"}
_KINDS: dict[str, type[SmallCNN] | type[SmallViT]] = {"cnn": SmallCNN, "vit": SmallViT}


def train_backbone(
    kind: str, data: DataSet, seed: int, epochs: int, lr: float = 3e-3, batch_size: int = 64
) -> nn.Module:
    r"""Train a small classifier on all tasks of a data set together.

    Args:

        kind (str): ``"cnn"`` or ``"vit"``.
        data (DataSet): The data set.
        seed (int): Of weights, order and shifts.
        epochs (int): Passes over the training pictures.
        lr (float, optional): Highest rate of AdamW, reached and left linearly. Default: 3e-3
        batch_size (int, optional): Default: 64

    Returns:
        nn.Module: in eval mode.
    """
    channels, side = data.train.images.shape[1], data.train.images.shape[-1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tasks = {task: len(names) for task, names in data.classes.items()}
        classifier = _KINDS[kind](channels, side, tasks)

    def loss_of(logits: dict[str, Tensor], rows: Tensor) -> Tensor:
        return torch.stack(
            [F.cross_entropy(logits[task], labels[rows]) for task, labels in data.train.labels.items()]
        ).sum()

    return train_classifier(classifier, data.train.images, loss_of, seed, epochs, lr, batch_size)


def train_classifier(
    classifier: nn.Module,
    images: Tensor,
    loss_of: Callable[[Any, Tensor], Tensor],
    seed: int,
    epochs: int,
    lr: float = 3e-3,
    batch_size: int = 64,
    varied: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    show_progress: bool = False,
) -> nn.Module:
    r"""Train a classifier whose weights are random, in place.

    Args:

        classifier (nn.Module): From pictures to whatever the loss reads.
        images (Tensor): Training pictures, (n, C, H, W).
        loss_of (Callable): From what the classifier returned and the rows of its pictures to a scalar.
        seed (int): Of order and variation.
        epochs (int): Passes over the pictures.
        lr (float, optional): Highest rate of AdamW, reached and left linearly. Default: 3e-3
        batch_size (int, optional): Default: 64
        varied (Callable, optional): From a batch of pictures and a generator to what the classifier reads. Default:
            None (moved by up to two pixels)
        show_progress (bool, optional): Default: False

    Returns:
        nn.Module: the same, in eval mode.
    """
    random = torch.Generator().manual_seed(seed)
    classifier.train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr, weight_decay=0.05)
    steps = epochs * -(-len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    with torch.random.fork_rng(devices=[]), tqdm(total=epochs, desc="Backbone", disable=not show_progress) as bar:
        # Dropout draws from the global generator.
        torch.manual_seed(seed)
        for _ in range(epochs):
            for rows in torch.randperm(len(images), generator=random).split(batch_size):
                loss = loss_of(classifier((varied or _shifted)(images[rows], random)), rows)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            bar.update()
    return classifier.eval()


def _shifted(images: Tensor, random: torch.Generator) -> Tensor:
    """The batch moved by up to two pixels each way, edges repeated."""
    down, right = torch.randint(0, 5, (2,), generator=random).tolist()
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    return padded[..., down : down + images.shape[-2], right : right + images.shape[-1]]
