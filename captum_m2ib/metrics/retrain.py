r"""Remove and retrain: is what the map calls relevant what a model needs to learn the task? ROAR and ROAR+.

A model that never saw the removed units cannot be thrown off by their replacement, so what is measured is the loss of
information. Both protocols replace the share ``t`` of the most relevant units of every example and fit a model anew,
for several seeds:

- :func:`roar` (Hooker et al., "A Benchmark for Interpretability Methods in Deep Neural Networks", NeurIPS 2019):
  replaced in training and test examples alike; the accuracy of the new model on the replaced test examples. Lower is
  better, and only what lies below the random ranking says something about a map.
- :func:`roar_plus` (M2IB, NeurIPS 2023, arXiv 2312.17174): replaced in the training pairs only; the loss
  :math:`l_c` of the new model on the intact test pairs, relative to that of a model fitted to intact pairs,
  :math:`(l_c - l_o) / l_o`. Higher is better.

``fit(train, seed)`` gets a tuple of tensors, first dimension the examples, and returns a model of any kind;
``evaluate(model, test)`` returns a number. Neither may keep anything from one call to the next.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from captum_m2ib.metrics._examples import Order, finite_maps, importance_ranks, one_of, unit_flags, unit_maps
from captum_m2ib.metrics.retrain_table import INTACT, RANDOM, RetrainCell, RetrainTable

Fit = Callable[[tuple[Tensor, ...], int], Any]
Evaluate = Callable[[Any, tuple[Tensor, ...]], float]
Fill = Literal["mean"] | float | Tensor

FRACTIONS = (0.1, 0.3, 0.5, 0.7, 0.9)


def roar(
    fit: Fit,
    evaluate: Evaluate,
    train: tuple[Tensor, ...],
    test: tuple[Tensor, ...],
    attributions: Mapping[str, tuple[Tensor, Tensor]],
    modality: int = 0,
    fill: Fill = "mean",
    maskable: tuple[Tensor, Tensor] | None = None,
    block: int = 1,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    order: Order = "morf",
    path: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> RetrainTable:
    r"""Remove and retrain: accuracy of models that never saw the most relevant units.

    Args:

        fit (Callable): ``fit(train, seed)`` returns a model fitted from scratch.
        evaluate (Callable): ``evaluate(model, test)`` returns its accuracy.
        train (tuple[Tensor, ...]): Training examples, e.g. (pixel_values, labels), first dimension M.
        test (tuple[Tensor, ...]): Test examples of the same form, first dimension N.
        attributions (mapping): Name of a method to its maps of the training and of the test examples, (M, H, W) and
                    (N, H, W), with channels, or (M, L) and (N, L) for tokens. A random ranking, drawn anew for each
                    seed, is added as ``"random"``.
        modality (int, optional): Which of the tensors the units belong to. Default: 0
        fill (str, number or Tensor, optional): What replaces them: ``"mean"``, the training examples' mean, per
                    channel for pictures; a number, such as the padding token's id; or a tensor that broadcasts with
                    one example.
                    Default: "mean"
        maskable (tuple[Tensor, Tensor], optional): Boolean, for training and test examples, in the maps' shape without
                    channels: units that may be replaced; fractions count these. Needed for tokens, so that start, end
                    and pooled tokens stay. Default: None (all)
        block (int, optional): Side, in pixels, of the squares of a picture that are ranked, by the sum of their map,
                    and replaced as a whole; a square is left alone where ``maskable`` is False within. Take the side
                    of the model's patches where maps are made of these: a random ranking of single pixels leaves parts
                    of every object visible, and a map of patches would win by its grain alone. Default: 1
        fractions (sequence of float, optional): Shares of the units, above 0 and at most 1.
                    Default: (0.1, 0.3, 0.5, 0.7, 0.9)
        seeds (sequence of int, optional): Of ``fit``, of ties and of the random ranking. Default: (0, 1, 2, 3, 4)
        order (str, optional): ``"morf"`` replaces the most relevant units, ``"lerf"`` the least relevant, which keeps
                    the most relevant (KAR). Default: "morf"
        path (str or PathLike, optional): JSON file that keeps every finished cell, so that a call that was cut short
                    goes on where it stopped. It also keeps digests of the data, maps and settings, and refuses others;
                    ``fit`` and ``evaluate`` it cannot know: choose another file when they change. Default: None
        show_progress (bool, optional): Show a progress bar. Default: False

    Returns:
        RetrainTable: one cell per method, fraction and seed, and ``summary()`` with means and intervals.

    Raises:
        ValueError: if shapes or fractions do not fit, a map is not finite, or ``path`` holds results of other data.

    Examples::

        >>> pixels, labels = torch.randn(8, 1, 4, 4), torch.arange(8) % 2
        >>> def fit(train, seed):
        ...     return train[1].float().mean()
        >>> def accuracy(model, test):
        ...     return float((test[1] == model.round()).float().mean())
        >>> table = roar(fit, accuracy, (pixels, labels), (pixels, labels),
        ...     {"M2IB": (torch.rand(8, 4, 4), torch.rand(8, 4, 4))}, fractions=(0.5,), seeds=(0,))
        >>> sorted({cell.method for cell in table.cells})
        ['M2IB', 'intact', 'random']
    """
    plan = _Plan("roar", train, test, modality, fill, maskable, order, block)
    return _run(plan, fit, evaluate, dict(attributions), fractions, seeds, path, show_progress)


def roar_plus(
    fit: Fit,
    evaluate: Evaluate,
    train: tuple[Tensor, ...],
    test: tuple[Tensor, ...],
    attributions: Mapping[str, Tensor],
    modality: int = 0,
    fill: Fill = "mean",
    maskable: Tensor | None = None,
    block: int = 1,
    fractions: Sequence[float] = FRACTIONS,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    order: Order = "morf",
    path: str | os.PathLike[str] | None = None,
    show_progress: bool = False,
) -> RetrainTable:
    r"""ROAR+: relative increase of the loss on intact pairs after training without the most relevant units.

    Args:

        fit (Callable): ``fit(train, seed)`` returns a model fine-tuned from the one that was explained.
        evaluate (Callable): ``evaluate(model, test)`` returns its loss.
        attributions (mapping): Name of a method to its maps of the training pairs.
        maskable (Tensor, optional): Boolean, for the training pairs. Default: None (all)
        train, test, modality, fill, block, fractions, seeds, order, path, show_progress: As for :func:`roar`.

    Returns:
        RetrainTable: the increase :math:`(l_c - l_o) / l_o` per method, fraction and seed, :math:`l_o` being the loss
        for the same seed; NaN where :math:`l_o` is not positive. Cells of ``"intact"`` are 0.

    Raises:
        ValueError: as for :func:`roar`.
    """
    flags = None if maskable is None else (maskable, maskable)
    plan = _Plan("roar_plus", train, test, modality, fill, flags, order, block)
    maps = {name: (given, given) for name, given in attributions.items()}
    table = _run(plan, fit, evaluate, maps, fractions, seeds, path, show_progress)
    losses = {cell.seed: cell.value for cell in table.cells if cell.method == INTACT}

    def increase(cell: RetrainCell) -> RetrainCell:
        intact = losses[cell.seed]
        value = (cell.value - intact) / intact if intact > 0 else math.nan
        return RetrainCell(cell.method, cell.fraction, cell.seed, value)

    return RetrainTable("roar_plus", tuple(map(increase, table.cells)))


@dataclass(frozen=True)
class _Plan:
    """A protocol on given data: which examples are replaced, where, and by what."""

    protocol: Literal["roar", "roar_plus"]
    train: tuple[Tensor, ...]
    test: tuple[Tensor, ...]
    modality: int
    fill: Fill
    maskable: tuple[Tensor, Tensor] | None
    order: Order
    block: int

    @property
    def sides(self) -> list[tuple[Tensor, ...]]:
        return [self.train, self.test] if self.protocol == "roar" else [self.train]

    def map_shape(self, side: int) -> tuple[int, ...]:
        values = self.sides[side][self.modality]
        return (values.shape[0], *values.shape[2:]) if values.ndim == 4 else tuple(values.shape)

    def pooled(self, values: Tensor) -> Tensor:
        """Sums over blocks: (N, H, W) or (N, L) -> (N, units)."""
        if self.block > 1:
            values = values.unflatten(2, (-1, self.block)).unflatten(1, (-1, self.block)).sum((2, 4))
        return values.flatten(1)

    def spread(self, units: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Each unit's value at all its pixels: (N, units) -> (N, H, W) or (N, L)."""
        if self.block == 1:
            return units.view(shape)
        grid = units.view(shape[0], shape[1] // self.block, -1)
        return grid.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)

    def counted(self, side: int) -> Tensor:
        """Which units may be replaced, (N, units)."""
        shape, device = self.map_shape(side), self.sides[side][self.modality].device
        flags = unit_flags("maskable", self.maskable and self.maskable[side], shape, device)
        return self.pooled(flags.view(shape).long()) == self.block**2

    def value(self) -> Tensor:
        values = self.train[self.modality]
        if not isinstance(self.fill, str):
            return torch.as_tensor(self.fill).to(values)
        if self.fill != "mean" or not values.is_floating_point():
            raise ValueError(
                f"fill: expected a number or tensor, or 'mean' for floating-point units, got {self.fill!r} for "
                f"{values.dtype}."
            )
        return values.mean((0, 2, 3))[:, None, None] if values.ndim == 4 else values.mean(0)

    def replace(self, side: int, maps: Tensor, fraction: float, seed: int, order: Order) -> tuple[Tensor, ...]:
        """One side's examples with a share of their units replaced."""
        examples, counted = self.sides[side], self.counted(side)
        values = examples[self.modality]
        ranks = importance_ranks(maps.to(values.device), order, seed, counted)
        counts = (counted.sum(1, keepdim=True) * fraction).round()
        where = self.spread(ranks < counts, self.map_shape(side))
        where = where.unsqueeze(1) if values.ndim > where.ndim else where
        replaced = torch.where(where, self.value(), values)
        return (*examples[: self.modality], replaced, *examples[self.modality + 1 :])


def _run(
    plan: _Plan,
    fit: Fit,
    evaluate: Evaluate,
    attributions: dict[str, tuple[Tensor, Tensor]],
    fractions: Sequence[float],
    seeds: Sequence[int],
    path: str | os.PathLike[str] | None,
    show_progress: bool,
) -> RetrainTable:
    from tqdm.auto import tqdm

    _check(plan, attributions, fractions, seeds)
    maps = {name: _flat_maps(plan, name, given) for name, given in attributions.items()}
    record = _Record.open(path, plan, maps)
    wanted = [(INTACT, 0.0, seed) for seed in seeds]
    wanted += [(name, float(share), seed) for name in (*maps, RANDOM) for share in fractions for seed in seeds]
    for method, fraction, seed in tqdm(wanted, desc=plan.protocol, disable=not show_progress):
        if (method, fraction, seed) in record.values:
            continue
        sides = plan.sides
        if method != INTACT:
            order: Order = "random" if method == RANDOM else plan.order
            ranked = maps.get(method) or [torch.zeros(plan.counted(i).shape) for i in range(len(sides))]
            # A seed of its own for each side, so that examples at the same place have other random ranks.
            sides = [plan.replace(i, ranked[i], fraction, 2 * seed + i, order) for i in range(len(sides))]
        train, test = sides if len(sides) == 2 else (sides[0], plan.test)
        record.add((method, fraction, seed), float(evaluate(fit(train, seed), test)))
    return RetrainTable(plan.protocol, tuple(RetrainCell(*key, record.values[key]) for key in wanted))


def _check(plan: _Plan, attributions: Mapping[str, Any], fractions: Sequence[float], seeds: Sequence[int]) -> None:
    one_of("order", plan.order, Order)
    for name, side in (("train", plan.train), ("test", plan.test)):
        if len({len(tensor) for tensor in side}) != 1 or not len(side[0]) or not 0 <= plan.modality < len(side):
            raise ValueError(
                f"{name}: expected a tuple of tensors of equal length that reaches position {plan.modality}, got "
                f"lengths {[len(tensor) for tensor in side]}."
            )
    for side in plan.sides:
        if side[plan.modality].ndim < 2:
            raise ValueError(
                f"modality: expected pictures, (N, C, H, W), or units, (N, L), at position {plan.modality}, got shape "
                f"{tuple(side[plan.modality].shape)}."
            )
        shape = side[plan.modality].shape
        fits = plan.block >= 1 and len(shape) == 4 and not any(size % plan.block for size in shape[2:])
        if plan.block != 1 and not fits:
            raise ValueError(
                f"block: expected 1, or for pictures a divisor of height and width, got {plan.block} for "
                f"{tuple(shape)}."
            )
    plan.value()
    for reserved in (INTACT, RANDOM):
        if reserved in attributions:
            raise ValueError(f"attributions: the name {reserved!r} is taken; choose another for this method.")
    for name, given in (("fractions", fractions), ("seeds", seeds)):
        if not given or len(set(given)) != len(given):
            raise ValueError(f"{name}: expected different values, at least one, got {list(given)}.")
    if not all(0 < share <= 1 for share in fractions):
        raise ValueError(f"fractions: expected shares above 0 and at most 1, got {list(fractions)}.")


def _flat_maps(plan: _Plan, name: str, given: tuple[Tensor, Tensor]) -> list[Tensor]:
    flats = []
    for side, maps in zip(range(len(plan.sides)), given, strict=False):
        shape = plan.map_shape(side)
        counted = unit_flags("maskable", plan.maskable and plan.maskable[side], shape, maps.device)
        flat, broken = finite_maps(unit_maps(maps, shape, ("train", "test")[side]), counted)
        if bool(broken.any()):
            raise ValueError(
                f"attributions[{name!r}]: expected finite maps, got NaN or infinity in {int(broken.sum())} of "
                f"{len(broken)} examples; leave these examples out of the data."
            )
        flats.append(plan.pooled(flat.view(shape)))
    return flats


class _Record:
    """Finished cells, kept in a file where there is a path."""

    def __init__(self, path: Path | None, header: dict[str, Any], values: dict[tuple[str, float, int], float]) -> None:
        self.path, self.header, self.values = path, header, values

    @classmethod
    def open(cls, path: str | os.PathLike[str] | None, plan: _Plan, maps: dict[str, list[Tensor]]) -> _Record:
        if path is None:
            return cls(None, {}, {})
        file = Path(path)
        tensors = [*plan.train, *plan.test, plan.value(), *(plan.maskable or ())]
        header: dict[str, Any] = {
            "protocol": plan.protocol,
            "data": _digest(tensors, f"{plan.modality} {plan.order} {plan.block}"),
            "methods": {name: _digest(flats, name) for name, flats in maps.items()},
        }
        if not file.exists():
            return cls(file, header, {})
        kept = json.loads(file.read_text(encoding="utf-8"))
        if (kept["protocol"], kept["data"]) != (header["protocol"], header["data"]):
            raise ValueError(f"path: {file} holds results of other data or settings; choose another file.")
        for name, digest in header["methods"].items():
            if kept["methods"].get(name, digest) != digest:
                raise ValueError(f"path: {file} holds results of other maps of {name!r}; choose another file or name.")
        header["methods"] = {**kept["methods"], **header["methods"]}
        cells = ((cell["method"], cell["fraction"], cell["seed"], cell["value"]) for cell in kept["cells"])
        return cls(file, header, {cell[:3]: math.nan if cell[3] is None else cell[3] for cell in cells})

    def add(self, key: tuple[str, float, int], value: float) -> None:
        self.values[key] = value
        if self.path is None:
            return
        cells = [
            {"method": name, "fraction": share, "seed": seed, "value": None if math.isnan(found) else found}
            for (name, share, seed), found in self.values.items()
        ]
        # Written beside and moved into place, so that an interruption never leaves half a file.
        unfinished = self.path.with_name(self.path.name + ".part")
        unfinished.write_text(json.dumps({**self.header, "cells": cells}, indent=1), encoding="utf-8")
        os.replace(unfinished, self.path)


def _digest(tensors: Sequence[Tensor], settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
