"""The outlines of the objects in scenes, as signed distances, and points inside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from captum_m2ib.scenes.captions import SHAPES

_POINTS = 64


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.sqrt(u * u + v * v) - np.float32(0.9)


def _square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(u), np.abs(v)) - np.float32(0.7)


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v, np.float32(np.sqrt(3) / 2) * np.abs(u) - np.float32(0.5) * v) - np.float32(0.5)


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # Folded into the half sector between a tip (1, 0) and the notch at 36 degrees, the outline is one
    # straight edge.
    sector = np.float32(2 * np.pi / 5)
    theta = np.arctan2(u, -v)
    theta = np.abs(theta - sector * np.rint(theta / sector))
    notch = 0.46 * np.exp(1j * np.pi / 5)
    normal = np.array([notch.imag, 1 - notch.real]) / abs(1 - notch)
    distance = np.sqrt(u * u + v * v)
    along, across = distance * np.cos(theta), distance * np.sin(theta)
    return (along - 1) * np.float32(normal[0]) + across * np.float32(normal[1])


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    u, v = np.abs(u), np.abs(v)
    return np.maximum(np.maximum(u, v) - np.float32(0.95), np.minimum(u, v) - np.float32(0.29))


def _heart(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # A square standing on its corner, with half discs on its two upper edges; h is half its diagonal.
    h = np.float32(0.785)
    u, v = np.abs(u), np.float32(0.25) * h - v
    corner = (u + np.abs(v) - h) * np.float32(np.sqrt(0.5))
    lobe = np.sqrt((u - h / 2) ** 2 + (v - h / 2) ** 2) - h * np.float32(np.sqrt(0.5))
    return np.minimum(corner, lobe)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(u * u + v * v) - np.float32(0.71)) - np.float32(0.23)


def _moon(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    bite = np.float32(0.74) - np.sqrt((u - np.float32(0.5)) ** 2 + v * v)
    return np.maximum(np.sqrt(u * u + v * v) - np.float32(0.96), bite)


DISTANCES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
    "ring": _ring,
    "moon": _moon,
}
"""Signed distance to each outline, in the shape's own frame: it fits the unit circle, v points down."""


@lru_cache(maxsize=1)
def interior_points() -> np.ndarray:
    """Points spread evenly over each shape's area, in its own frame: float32 (shapes, points, 2)."""
    # The additive recurrence with the plastic number covers the square evenly, and so every part of it.
    plastic = 1.32471795724474602596
    steps = np.arange(1, 16 * _POINTS + 1)[:, None] * np.array([1 / plastic, 1 / plastic**2])
    grid = (2 * (steps % 1) - 1).astype(np.float32)
    inside = [grid[DISTANCES[shape](grid[:, 0], grid[:, 1]) < 0][:_POINTS] for shape in SHAPES]
    return np.stack(inside)
