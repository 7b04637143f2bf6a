"""What the objects of a scene lie on: a muted, textured ground, or a plain one as in product photographs and X-rays.

A ground is a base colour and a sum of plane waves per channel; a plain ground has no waves. Whatever the ground, the
same random numbers are drawn, so a scene keeps its objects and its caption on each of them.
"""

from __future__ import annotations

import numpy as np

TEXTURED = "textured"

_LEVELS = {"white": 255.0, "black": 0.0, "grey": 128.0}

GROUNDS = (TEXTURED, "plain", *_LEVELS)
"""``"textured"``; ``"white"``, ``"black"`` and ``"grey"``; ``"plain"``: one of these three in each scene."""

# Waves: cycles per image side and amplitude (of 255), from broad light and shade to a fabric-like grain.
_WAVE_FREQUENCIES = np.array([0.4, 0.7, 1.1, 2.0, 3.2, 4.5, 9.0, 12.0], dtype=np.float32)
_WAVE_AMPLITUDES = np.array([13, 11, 9, 5, 4, 3.5, 2.5, 2], dtype=np.float32)


def sample_grounds(
    rng: np.random.Generator, n: int, ground: str = TEXTURED
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples the grounds of n scenes: greys and browns with a texture, or plain.

    Args:
        rng (numpy.random.Generator): Where the randomness comes from.
        n (int): Number of scenes.
        ground (str): One of :data:`GROUNDS`. Default: ``"textured"``.

    Returns:
        tuple: Base colours, waves and tints, as in :class:`captum_m2ib.scenes.drawing.Layouts`.

    Raises:
        ValueError: If the ground is unknown.
    """
    if ground not in GROUNDS:
        raise ValueError(f"ground: expected one of {', '.join(GROUNDS)}, got {ground!r}; choose one of these.")
    n_waves = len(_WAVE_FREQUENCIES)
    lightness = rng.random((n, 1), dtype=np.float32)
    grey = 62 + 78 * lightness
    warmth = rng.random((n, 1), dtype=np.float32)
    base = grey * (1 + warmth * np.array([0.16, 0, -0.26], dtype=np.float32))
    frequency = 2 * np.pi * _WAVE_FREQUENCIES * (0.75 + 0.5 * rng.random((n, n_waves), dtype=np.float32))
    direction, phase = 2 * np.pi * rng.random((2, n, n_waves), dtype=np.float32)
    waves = np.stack([frequency * np.cos(direction), frequency * np.sin(direction), phase], axis=-1)
    amplitude = _WAVE_AMPLITUDES * (0.3 + rng.random((n, n_waves), dtype=np.float32))
    tints = amplitude[..., None] * (0.85 + 0.3 * rng.random((n, n_waves, 3), dtype=np.float32))
    if ground == TEXTURED:
        return base, waves, tints
    levels = np.array(list(_LEVELS.values()) if ground == "plain" else [_LEVELS[ground]], dtype=np.float32)
    chosen = levels[np.minimum((lightness * len(levels)).astype(int), len(levels) - 1)]
    return np.broadcast_to(chosen, base.shape), waves, np.zeros_like(tints)


def draw_grounds(base: np.ndarray, waves: np.ndarray, tints: np.ndarray, size: int) -> np.ndarray:
    """Draws grounds.

    Args:
        base (numpy.ndarray): Colours, 0 to 255, float32 (n, 3).
        waves (numpy.ndarray): Horizontal and vertical angular frequency and phase of each wave, float32 (n, waves, 3).
        tints (numpy.ndarray): Amplitude of each wave per channel, float32 (n, waves, 3).
        size (int): Side of the pictures in pixels.

    Returns:
        numpy.ndarray: float32 (n, size, size, 3), 0 to 255 and a little beyond.
    """
    # cos(a x + b y + c) = cos(a x) cos(b y + c) - sin(a x) sin(b y + c): the sum over waves is one matrix
    # product per scene.
    n = len(base)
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    across, down, phase = np.moveaxis(waves, -1, 0)
    columns = across[..., None] * centres
    rows = down[:, None, :] * centres[:, None] + phase[:, None, :]
    left = np.concatenate([np.cos(rows), -np.sin(rows), np.ones((n, size, 1), np.float32)], axis=2)
    spread = tints[:, :, None, :]
    flat = np.broadcast_to(base[:, None, None], (n, 1, size, 3))
    right = np.concatenate([np.cos(columns)[..., None] * spread, np.sin(columns)[..., None] * spread, flat], axis=1)
    return np.matmul(left, right.reshape(n, -1, size * 3)).reshape(n, size, size, 3)
