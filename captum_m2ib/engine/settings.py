"""How gates are optimised: what was asked for, checked, and what that is for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

PerModality: TypeAlias = float | Sequence[float]
ScoreRange: TypeAlias = "float | Sequence[float] | Tensor"


MEMORY_BUDGET = 3 * 2**29
"""Bytes of tensors that the rows of one pass may make, unless something else is asked for."""


PRECISIONS = {"bf16": torch.bfloat16}
"""What draws of noise may run in, by its name."""


def check_count(name: str, number: Any, least: int = 1) -> int:
    """A whole number of at least ``least``, or an error that names the argument."""
    if isinstance(number, bool) or not isinstance(number, Integral) or number < least:
        raise ValueError(f"{name}: expected a whole number of at least {least}, got {number!r}.")
    return int(number)


@dataclass(frozen=True)
class Defaults:
    """What holds at a layer where nothing is asked for.

    Where a learning rate is None, gates can go as far in any number of steps, ``reach``, though at most a quarter of it
    in one.
    """

    beta: float
    variance: float
    lr: float | None
    initial_gate: float
    antithetic: bool
    n_steps: int = 10
    n_samples: int = 10
    noiseless: float = 0.0
    reach: float = 0.0

    def rate(self, n_steps: int) -> float:
        """The learning rate of so many steps."""
        return self.lr or self.reach / max(n_steps, 4)


@dataclass(frozen=True)
class Course:
    """What layers whose gates descend together have in common."""

    n_steps: int
    n_samples: int
    noiseless: float

    @property
    def has_middle(self) -> bool:
        """Whether the first draw is without noise; a single draw is noise, or nothing would be compressed."""
        return self.noiseless > 0 and self.n_samples > 1

    @property
    def most(self) -> int:
        """The most draws that a step takes."""
        return max(map(self.draws, range(self.n_steps)))

    def draws(self, step: int) -> int:
        r"""How many draws a step takes, ``n_samples`` in the mean.

        Where one of them is without noise, the first and the last of four steps or more take it alone, and their
        neighbours take their noise as well: at the ends noise hardly changes a map, but between them it does.

        Args:

            step (int): From 0.

        Returns:
            int: with the draw without noise.
        """
        last, noisy = self.n_steps - 1, self.n_samples - 1
        if not self.has_middle or last < 3:
            return self.n_samples
        return {0: 1, last: 1, 1: 1 + 2 * noisy, last - 1: 1 + 2 * noisy}.get(step, self.n_samples)

    def shares(self, step: int) -> tuple[float, ...]:
        """What the score of each draw of a step counts for, 1 in all."""
        draws = self.draws(step)
        if not self.has_middle or draws == 1:
            return (1 / draws,) * draws
        return (self.noiseless, *((1 - self.noiseless) / (draws - 1) for _ in range(draws - 1)))


@dataclass(frozen=True)
class Settings:
    """The optimisation's arguments as an attribution takes them; where one is None, each layer has its default.

    What is out of range is an error that names the argument, before any work is done.
    """

    beta: PerModality | None = None
    variance: PerModality | None = None
    lr: PerModality | None = None
    initial_gate: PerModality | None = None
    antithetic: bool | Sequence[bool] | None = None
    n_steps: int | None = None
    n_samples: int | None = None
    noiseless: PerModality | None = None
    seed: int = 0
    joint: bool = False
    smoothing: float = 0.0
    smoothing_colour: float | None = None
    score_range: ScoreRange | None = None
    internal_batch_size: int | None = None
    memory_budget: int = MEMORY_BUDGET
    precision: str | None = None
    show_progress: bool = False

    def __post_init__(self) -> None:
        rows = self.internal_batch_size
        checked = {
            "n_steps": None if self.n_steps is None else check_count("n_steps", self.n_steps),
            "n_samples": None if self.n_samples is None else check_count("n_samples", self.n_samples),
            "noiseless": _check_noiseless(self.noiseless),
            "internal_batch_size": None if rows is None else check_count("internal_batch_size", rows),
            "memory_budget": check_count("memory_budget", self.memory_budget),
            "precision": _check_precision(self.precision),
            "seed": check_count("seed", self.seed, 0),
            "smoothing": _check_share("smoothing", self.smoothing),
            "smoothing_colour": _check_colour(self.smoothing_colour),
            "score_range": _check_range(self.score_range),
            "beta": _check_numbers("beta", self.beta, from_zero=True),
            "variance": _check_numbers("variance", self.variance),
            "lr": _check_numbers("lr", self.lr),
            "initial_gate": _check_gates("initial_gate", self.initial_gate),
            "antithetic": _to_flags(self.antithetic),
            "joint": bool(self.joint),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def per_layer(self, defaults: Sequence[Defaults]) -> LayerSettings:
        r"""What was asked for, layer by layer.

        Args:

            defaults (sequence of Defaults): Per layer what holds there where nothing is asked for.

        Returns:
            LayerSettings: with tuples of one value per layer.

        Raises:
            ValueError: if a sequence has not one value per layer.
        """
        spread = {
            name: _spread(name, getattr(self, name), [getattr(one, name) for one in defaults]) for name in _PER_LAYER
        }
        if self.joint:
            # Gates that descend together take the same steps, and rates follow from how many there are.
            common = {"n_steps": max, "n_samples": max, "noiseless": min}
            spread |= {name: (of_all(spread[name]),) * len(defaults) for name, of_all in common.items()}
        rates = [one.rate(steps) for one, steps in zip(defaults, spread["n_steps"], strict=True)]
        return LayerSettings(**{**vars(self), **spread, "lr": _spread("lr", self.lr, rates)})


@dataclass(frozen=True)
class LayerSettings(Settings):
    """The optimisation's arguments as they are applied; tuples hold one value per layer."""

    beta: tuple[float, ...] = ()
    variance: tuple[float, ...] = ()
    lr: tuple[float, ...] = ()
    initial_gate: tuple[float, ...] = ()
    antithetic: tuple[bool, ...] = ()
    n_steps: tuple[int, ...] = ()  # type: ignore[assignment]
    n_samples: tuple[int, ...] = ()  # type: ignore[assignment]
    noiseless: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """What was asked for is checked already."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The type in which draws of noise run where torch allows it; None for the model's own."""
        return None if self.precision is None else PRECISIONS[self.precision]

    def with_guides(self, guided: Sequence[int], defaults: Defaults) -> LayerSettings:
        r"""These settings with those of further layers, whose gates guide the maps of others.

        Args:

            guided (sequence of int): For each further layer the one that it guides: it takes half as many steps of one
                draw less.
            defaults (Defaults): What else holds at a further layer.

        Returns:
            LayerSettings: with tuples that have one more value per further layer.
        """
        spread: dict[str, Any] = {
            name: (*getattr(self, name), *[getattr(defaults, name)] * len(guided)) for name in _PER_LAYER
        }
        steps = [-(-self.n_steps[layer] // 2) for layer in guided]
        spread["n_steps"] = (*self.n_steps, *steps)
        spread["n_samples"] = (*self.n_samples, *(max(1, self.n_samples[layer] - 1) for layer in guided))
        return replace(self, **spread, lr=(*self.lr, *(defaults.rate(count) for count in steps)))

    @property
    def most_draws(self) -> int:
        """The most draws that a step takes at any layer."""
        return max(self.course(layer).most for layer in range(len(self.n_steps)))

    def course(self, layer: int) -> Course:
        """What holds for a layer, and for all that descend together with it."""
        return Course(self.n_steps[layer], self.n_samples[layer], self.noiseless[layer])


_PER_LAYER = [field.name for field in fields(Defaults) if field.name not in ("lr", "reach")]


def _spread(name: str, value: Any, defaults: list[Any]) -> tuple[Any, ...]:
    """One value per layer."""
    if value is None:
        return tuple(defaults)
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(defaults)
    if len(values) != len(defaults):
        raise ValueError(f"{name}: expected a number or one per modality ({len(defaults)}), got {len(values)}.")
    return values


def _check_numbers(name: str, value: PerModality | None, from_zero: bool = False) -> float | tuple[float, ...] | None:
    if value is None:
        return None
    for number in value if isinstance(value, Sequence) else (value,):
        fits = isinstance(number, Real) and (number >= 0 if from_zero else number > 0)
        if not fits or number == float("inf"):
            bound = "of at least" if from_zero else "above"
            raise ValueError(f"{name}: expected a finite number {bound} 0, got {number!r}.")
    return tuple(map(float, value)) if isinstance(value, Sequence) else float(value)


def _check_gates(name: str, value: PerModality | None) -> float | tuple[float, ...] | None:
    gates = _check_numbers(name, value)
    if gates is not None and max(gates if isinstance(gates, tuple) else (gates,), default=0.0) >= 1:
        raise ValueError(f"{name}: expected a number between 0 and 1, got {value!r}.")
    return gates


def _check_precision(value: str | None) -> str | None:
    if value is not None and value not in PRECISIONS:
        raise ValueError(f"precision: expected {' or '.join(map(repr, PRECISIONS))} or None, got {value!r}.")
    return value


def _check_share(name: str, value: float) -> float:
    if not isinstance(value, Real) or not 0 <= value < 1:
        raise ValueError(f"{name}: expected a share of the picture's shorter side, from 0 to 1, got {value!r}.")
    return float(value)


def _check_colour(value: float | None) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < float("inf")):
        raise ValueError(
            f"smoothing_colour: expected a finite number above 0, in standard deviations of the picture, or None for "
            f"gates that are smoothed whatever the colours, got {value!r}."
        )
    return None if value is None else float(value)


def _check_noiseless(value: PerModality | None) -> float | tuple[float, ...] | None:
    shares = _check_numbers("noiseless", value, from_zero=True)
    if shares is not None and max(shares if isinstance(shares, tuple) else (shares,), default=0.0) > 1:
        raise ValueError(f"noiseless: expected a share of the score, from 0 to 1, got {value!r}.")
    return shares


def _to_flags(value: bool | Sequence[bool] | None) -> bool | tuple[bool, ...] | None:
    if value is None:
        return None
    return tuple(map(bool, value)) if isinstance(value, Sequence) else bool(value)


def _check_range(value: ScoreRange | None) -> float | tuple[float, ...] | None:
    """One number, or one per pair."""
    if value is None:
        return None
    found = torch.as_tensor(value, dtype=torch.float64)
    if found.ndim > 1 or not found.numel() or not bool((found.isfinite() & (found > 0)).all()):
        raise ValueError(f"score_range: expected a finite number above 0, or one per pair, (N,), got {value!r}.")
    return float(found) if found.ndim == 0 else tuple(found.tolist())
