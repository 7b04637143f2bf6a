"""Tiny backbones whose features can be computed by hand, and data with planted local patterns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIDE, CLASSES, WIDTH = 8, 3, 6


class TinyCNN(nn.Module):
    """A convolution to a 4 x 4 grid, the mean over it, one linear layer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Conv2d(1, WIDTH, 2, 2), nn.BatchNorm2d(WIDTH), nn.Dropout(0.5))
            self.fc = nn.Linear(WIDTH, CLASSES)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.body(images).mean((2, 3)))


class TinyViT(nn.Module):
    """Patches of 2 x 2 pixels after prefix tokens; the layer ``block`` returns a tuple, as transformers' do."""

    patch_size = 2

    def __init__(self, prefix: int = 1, pool: str = "mean", seed: int = 0) -> None:
        super().__init__()
        self.prefix, self.pool = prefix, pool
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embed = nn.Conv2d(1, WIDTH, 2, 2)
            self.tokens = nn.Parameter(torch.randn(1, prefix, WIDTH))
            self.block = _Tuple(nn.Linear(WIDTH, WIDTH))
            self.norm = nn.LayerNorm(WIDTH)
            self.fc = nn.Linear(WIDTH, CLASSES)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        patches = self.embed(images).flatten(2).transpose(1, 2)
        tokens = self.block(torch.cat([self.tokens.expand(len(images), -1, -1), patches], 1))[0]
        if self.pool == "norm":
            return self.fc(self.norm(tokens[:, self.prefix :].mean(1)))
        return self.fc(tokens[:, self.prefix :].mean(1))


class _Tuple(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> tuple[Tensor, None]:
        return self.inner(tokens), None


def planted(count: int = 96, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise with one bright 2 x 2 patch whose pattern is the class, anywhere on the grid."""
    generator = torch.Generator().manual_seed(seed)
    patterns = torch.tensor([[[3.0, 3.0], [0.0, 0.0]], [[3.0, 0.0], [3.0, 0.0]], [[3.0, 0.0], [0.0, 3.0]]])
    images = 0.1 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    cells = torch.randint(0, SIDE // 2, (count, 2), generator=generator) * 2
    for image, label, (row, column) in zip(images, labels, cells.tolist(), strict=True):
        image[0, row : row + 2, column : column + 2] += patterns[label]
    return images, labels


def batches(images: Tensor, labels: Tensor | None = None, size: int = 16) -> list:
    """A loader over the examples in order."""
    parts = images.split(size)
    return list(parts) if labels is None else [list(pair) for pair in zip(parts, labels.split(size), strict=True)]
