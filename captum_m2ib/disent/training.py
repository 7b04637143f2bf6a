"""The training loop of every head: epochs, early stopping, and a checkpoint per epoch that a later call resumes.

All randomness of a fit (order, noise) comes from one generator whose state is part of the checkpoint, so that an
interrupted fit that resumes ends where an uninterrupted one ends, bit for bit on the same machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_m2ib.disent._checks import check_count, check_number
from captum_m2ib.disent.storage import (
    below_prefix,
    load_optimizer,
    optimizer_tensors,
    read_tensors,
    with_prefix,
    write_tensors,
)


@dataclass(frozen=True)
class FitSettings:
    r"""How a head is trained.

    Args:

        epochs (int, optional): Default: 60
        batch_size (int, optional): Examples per step on cached features. Default: 64
        lr (float, optional): Adam's learning rate for the classifier. Default: 1e-2
        transform_lr (float, optional): Adam's learning rate for the transform. Default: 5e-3
        label_smoothing (float, optional): Default: 0.0
        sparsity (float, optional): Weight of the mean absolute entry of W in the loss. Default: 0.0
        patience (int, optional): Epochs without a better validation loss before the rates are cut or the fit stops.
            Default: 10
        cuts (int, optional): How often both rates are divided by ten when patience runs out, before it stops the fit.
            Default: 0
        validation_share (float, optional): Share of cached examples held out where no validation set is given; 0
            trains on all, for all epochs. Default: 0.1
        seed (int, optional): Seed of order, noise and the held-out share. Default: 0

    Raises:
        ValueError: if a number is out of range.
    """

    epochs: int = 60
    batch_size: int = 64
    lr: float = 1e-2
    transform_lr: float = 5e-3
    label_smoothing: float = 0.0
    sparsity: float = 0.0
    patience: int = 10
    cuts: int = 0
    validation_share: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("epochs", self.epochs)
        check_count("batch_size", self.batch_size)
        check_count("patience", self.patience)
        check_count("cuts", self.cuts, 0)
        check_count("seed", self.seed, 0)
        check_number("lr", self.lr)
        check_number("transform_lr", self.transform_lr)
        check_number("label_smoothing", self.label_smoothing, high=1.0)
        check_number("sparsity", self.sparsity)
        check_number("validation_share", self.validation_share, high=1.0)


@dataclass
class FitRecord:
    r"""What a fit did.

    Attributes:

        loss (list[float]): Mean training loss per epoch.
        validation_loss (list[float]): Per epoch, in prediction mode; empty where nothing was held out.
        best_epoch (int): The epoch, from 0, whose parameters were kept.
        cut_at (list[int]): Epochs after which the rates were cut.
        stopped_early (bool): Whether patience ran out before the epochs did.
        resumed_from (int): Epochs that a checkpoint had already done.
    """

    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    best_epoch: int = -1
    cut_at: list[int] = field(default_factory=list)
    stopped_early: bool = False
    resumed_from: int = 0


class Task(Protocol):
    """What a head is trained for."""

    def batches(self, epoch: int, generator: torch.Generator) -> Iterable[tuple[Tensor, Tensor]]:
        """Features and targets of an epoch."""

    def loss(self, features: Tensor, targets: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of a batch, a scalar."""

    def validate(self) -> float | None:
        """The validation loss in prediction mode; None where there is nothing held out."""

    def state(self) -> dict[str, Tensor]:
        """What the task must remember between epochs."""

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take back what :meth:`state` gave."""


def shuffled(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Row indices of an epoch's batches in random order."""
    yield from torch.randperm(count, generator=generator).split(size)


def fit_head(
    head: nn.Module,
    task: Task,
    settings: FitSettings,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    show_progress: bool = False,
) -> FitRecord:
    r"""Train a head, keep its best epoch, and leave it in prediction mode.

    Args:

        head (nn.Module): Its parameters are trained; those of a module called ``transform`` at ``transform_lr``.
        task (Task): Batches, loss and validation.
        settings (FitSettings): Numbers.
        checkpoint (str or PathLike, optional): File that holds the state after every epoch. Default: None
        resume (bool, optional): Go on from the checkpoint if there is one. Default: True
        show_progress (bool, optional): Default: False

    Returns:
        FitRecord: losses and where the best epoch was.

    Raises:
        ValueError: if the checkpoint was made with other settings or another head, or an epoch yields no batch.
        FloatingPointError: if the loss is NaN or infinite.
        OSError: if the checkpoint is damaged.
    """
    # Noise is drawn where the features are; a generator of another device could not be used there.
    device = next(head.parameters()).device
    generator = torch.Generator(device).manual_seed(settings.seed)
    order = torch.Generator().manual_seed(settings.seed)
    turning = [parameter for name, parameter in head.named_parameters() if name.startswith("transform.")]
    known = {id(parameter) for parameter in turning}
    others = [parameter for parameter in head.parameters() if id(parameter) not in known]
    groups = [{"params": turning, "lr": settings.transform_lr}, {"params": others, "lr": settings.lr}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], lr=settings.lr)
    run = _Run(head, task, optimizer, (generator, order), asdict(settings), FitRecord())
    if checkpoint is not None and resume and Path(checkpoint).exists():
        run.load(checkpoint)
    record = run.record
    bar = tqdm(
        total=settings.epochs, initial=len(record.loss), desc="InfoDisent", unit="epoch", disable=not show_progress
    )
    try:
        with bar:
            while len(record.loss) < settings.epochs and not record.stopped_early:
                run.epoch()
                run.judge()
                if checkpoint is not None:
                    run.save(checkpoint)
                bar.set_postfix(loss=f"{record.loss[-1]:.3f}", refresh=False)
                bar.update()
    finally:
        # Also after an interrupt: the best that was reached, ready to predict.
        if run.best:
            head.load_state_dict(run.best)
        head.eval()
    return record


@dataclass
class _Run:
    head: nn.Module
    task: Task
    optimizer: torch.optim.Optimizer
    generators: Sequence[torch.Generator]
    settings: dict[str, Any]
    record: FitRecord
    best: dict[str, Tensor] = field(default_factory=dict)

    def epoch(self) -> None:
        noise, order = self.generators
        number, total, examples = len(self.record.loss), 0.0, 0
        self.head.train()
        for features, targets in self.task.batches(number, order):
            loss = self.task.loss(features, targets, noise)
            if not bool(loss.isfinite()):
                raise FloatingPointError(
                    f"lr: expected a finite loss, got {float(loss.detach())} in epoch {number}; pass a lower lr and "
                    "a lower transform_lr."
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total, examples = total + float(loss.detach()) * len(features), examples + len(features)
        if not examples:
            raise ValueError(
                "loader: expected at least one batch in every epoch, got none; pass a loader, not an iterator."
            )
        self.head.eval()
        validation = self.task.validate()
        if validation is not None:
            self.record.validation_loss.append(validation)
        self.record.loss.append(total / examples)
        if validation is None or validation <= min(self.record.validation_loss):
            self.record.best_epoch = number
            self.best = {name: tensor.detach().clone() for name, tensor in self.head.state_dict().items()}

    def judge(self) -> None:
        """Cut the rates, or stop, where patience has run out."""
        record, last = self.record, len(self.record.loss) - 1
        waited = last - max([record.best_epoch, *record.cut_at])
        if waited < self.settings["patience"] or last + 1 >= self.settings["epochs"]:
            return
        record.stopped_early = len(record.cut_at) >= self.settings["cuts"]
        if not record.stopped_early:
            record.cut_at.append(last)
            self._cut(1)

    def _cut(self, times: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] /= 10**times

    def save(self, path: str | os.PathLike[str]) -> None:
        noise, order = self.generators
        tensors = {
            **with_prefix("head", self.head.state_dict()),
            **with_prefix("best", self.best),
            **with_prefix("optimizer", optimizer_tensors(self.optimizer)),
            **with_prefix("task", self.task.state()),
            "generator.noise": noise.get_state(),
            "generator.order": order.get_state(),
        }
        write_tensors(path, tensors, {"settings": self.settings, "record": asdict(self.record)})

    def load(self, path: str | os.PathLike[str]) -> None:
        tensors, metadata = read_tensors(path)
        saved = metadata.get("settings", {})
        changed = sorted(name for name in self.settings if saved.get(name) != self.settings[name])
        if changed:
            was = ", ".join(f"{name}={saved.get(name)!r}" for name in changed)
            raise ValueError(
                f"checkpoint: expected the settings that {os.fspath(path)} was made with, {was}; pass these to go on, "
                "or resume=False to start again."
            )
        try:
            self.head.load_state_dict(below_prefix("head", tensors))
        except RuntimeError as error:
            raise ValueError(
                f"checkpoint: {os.fspath(path)} belongs to another head ({str(error).splitlines()[-1].strip()}); pass "
                "another path, or resume=False to start again."
            ) from error
        load_optimizer(self.optimizer, below_prefix("optimizer", tensors))
        self.best = below_prefix("best", tensors)
        self.task.load_state(below_prefix("task", tensors))
        for generator, name in zip(self.generators, ("noise", "order"), strict=True):
            generator.set_state(tensors[f"generator.{name}"])
        for name, value in metadata["record"].items():
            setattr(self.record, name, value)
        self._cut(len(self.record.cut_at))
        self.record.resumed_from = len(self.record.loss)
