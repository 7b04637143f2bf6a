"""Procedurally drawn scenes with exact ground truth.

A scene is a ground (muted and textured, or plain) with one to four objects, each a shape of one colour. All geometry
is in units of the image side, so ``size`` only says how finely the same picture is sampled. With ``d`` the signed
distance of a pixel's centre to an object's outline (negative inside), the object's opacity there is
``clip(1/2 - d * size, 0, 1)``: an edge one pixel wide, centred on the outline. A pixel belongs to an object's
mask where that opacity is at least one half and no later object's is.

Everything is drawn from :func:`generator`, which keeps the purposes in :data:`PURPOSES` apart: scenes for
training and scenes for evaluation never come from the same random stream, whatever the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from captum_m2ib.scenes.captions import COLOURS, SHAPES, Caption, describe
from captum_m2ib.scenes.grounds import TEXTURED, draw_grounds, sample_grounds
from captum_m2ib.scenes.shapes import DISTANCES, interior_points

PURPOSES = (
    "scenes",
    "training",
    "validation",
    "held_out",
    "image_probes",
    "token_probes",
    "naming_trials",
    "naming",
    "pair_probes",
)
"""The random streams. Their order is part of every drawing: append, never reorder."""

OBJECT_COUNTS = {1: 0.05, 2: 0.25, 3: 0.35, 4: 0.35}
"""Number of objects in a scene, with probabilities."""

RADIUS = (0.12, 0.205)
"""Smallest and largest radius of an object's bounding circle."""

VISIBLE_SHARE = 0.6
"""Of every object at least this share of its area stays visible."""

_MARGIN = 0.01
_RIM = 0.014
_MAX_OBJECTS = max(OBJECT_COUNTS)
# Coverage is estimated from interior points, with later objects' bounding circles as covers. The circles err
# on the safe side; the distance between this limit and 1 - VISIBLE_SHARE pays for the finite number of
# points.
_COVERED_LIMIT = 0.3
_CANDIDATES = 6

_RGB = {
    "red": (212, 36, 40),
    "orange": (247, 134, 20),
    "yellow": (248, 220, 48),
    "green": (40, 160, 62),
    "blue": (42, 96, 220),
    "purple": (126, 52, 176),
    "pink": (247, 142, 190),
    "white": (246, 246, 246),
}
_RGB_TABLE = np.array([_RGB[colour] for colour in COLOURS], dtype=np.float32)


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Args:
        shape (str): One of :data:`captum_m2ib.scenes.SHAPES`.
        colour (str): One of :data:`captum_m2ib.scenes.COLOURS`.
        x (float): Centre, from the left edge, in units of the image side.
        y (float): Centre, from the top edge, in units of the image side.
        radius (float): Radius of the bounding circle, in units of the image side.
        angle (float): Rotation, clockwise, in radians; at 0 the shape stands upright.
    """

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, its caption, and where everything is.

    Args:
        image (numpy.ndarray): RGB picture, uint8 (H, W, 3).
        objects (tuple[SceneObject, ...]): The k objects; later ones are drawn over earlier ones.
        masks (numpy.ndarray): What is visible of each object, bool (k, H, W); disjoint.
        caption (str): The caption, lower case.
        words (tuple[str, ...]): Its words, as ``caption.split()`` gives them.
        word_objects (tuple[int | None, ...]): Per word, the index of the object that it names, or None.
    """

    image: np.ndarray
    objects: tuple[SceneObject, ...]
    masks: np.ndarray
    caption: str
    words: tuple[str, ...]
    word_objects: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Layouts:
    """What n scenes contain, as arrays, independent of any resolution. Slots from ``count`` on have radius 0.

    Args:
        count (numpy.ndarray): Number of objects, int (n,).
        shape (numpy.ndarray): Index into ``SHAPES``, int (n, 4).
        colour (numpy.ndarray): Index into ``COLOURS``, int (n, 4).
        x, y, radius, angle (numpy.ndarray): As in :class:`SceneObject`, float32 (n, 4).
        rgb (numpy.ndarray): Each object's own shade of its colour, 0 to 255, float32 (n, 4, 3).
        base (numpy.ndarray): Background colour, 0 to 255, float32 (n, 3).
        waves (numpy.ndarray): Horizontal and vertical angular frequency and phase of each wave, float32 (n,
            waves, 3).
        tints (numpy.ndarray): Amplitude of each wave per channel, float32 (n, waves, 3).
    """

    count: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    angle: np.ndarray
    rgb: np.ndarray
    base: np.ndarray
    waves: np.ndarray
    tints: np.ndarray


class SceneBatch(NamedTuple):
    """Scenes as training uses them.

    Args:
        images (numpy.ndarray): uint8 (n, size, size, 3).
        captions (list[str]): n captions.
        kinds (numpy.ndarray): Which kinds of object each scene contains, bool (n, shapes * colours); kind k is
            shape k // colours in colour k % colours, as :func:`captum_m2ib.scenes.captions.name_kinds` names
            them.
    """

    images: np.ndarray
    captions: list[str]
    kinds: np.ndarray


@dataclass(frozen=True, eq=False)
class _Stamps:
    """Square cut-outs around the m objects of a batch: P pixels a side, each wholly inside its picture."""

    scene: np.ndarray  # (m,)
    slot: np.ndarray  # (m,)
    pixels: np.ndarray  # (m, P, P), flat index into the batch's pixels
    opacity: np.ndarray  # (m, P, P)
    shade: np.ndarray  # (m, P, P)


def draw_scene(
    seed: int,
    size: int = 64,
    *,
    counts: Mapping[int, float] = OBJECT_COUNTS,
    purpose: str = "scenes",
    index: int = 0,
    ground: str = TEXTURED,
) -> Scene:
    r"""Draws one scene.

    Args:
        seed (int): Not negative. The same seed gives the same scene, whatever ``size``.
        size (int): Side of the picture in pixels, at least 16. Default: 64.
        counts (Mapping[int, float]): Probability of each number of objects, 1 to 4. Default:
            ``captum_m2ib.scenes.drawing.OBJECT_COUNTS``.
        purpose (str): The random stream, one of ``captum_m2ib.scenes.drawing.PURPOSES``. Default: ``"scenes"``.
        index (int): Position in that stream, not negative. Default: 0.
        ground (str): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``; nothing else of a scene depends
            on it. Default: ``"textured"``.

    Returns:
        Scene: The scene.

    Raises:
        ValueError: If an argument is out of range.

    Examples::

        >>> from captum_m2ib.scenes import draw_scene
        >>> scene = draw_scene(seed=0)
        >>> scene.caption, scene.image.shape
        ('here is a white star , a pink cross and a white ring', (64, 64, 3))
    """
    return draw_scenes(generator(purpose, seed, index), 1, size, counts=counts, ground=ground)[0]


def draw_batch(
    n: int,
    seed: int,
    size: int = 64,
    *,
    counts: Mapping[int, float] = OBJECT_COUNTS,
    purpose: str = "scenes",
    index: int = 0,
    ground: str = TEXTURED,
) -> SceneBatch:
    r"""Draws pictures and captions only: the fast path for training.

    Args:
        n (int): Number of scenes, at least 1.
        seed (int): Not negative.
        size (int): Side of the pictures in pixels, at least 16. Default: 64.
        counts (Mapping[int, float]): Probability of each number of objects. Default:
            ``captum_m2ib.scenes.drawing.OBJECT_COUNTS``.
        purpose (str): The random stream, one of ``captum_m2ib.scenes.drawing.PURPOSES``. Default: ``"scenes"``.
        index (int): Position in that stream, for example the training step. Default: 0.
        ground (str): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``; nothing else of a scene depends
            on it. Default: ``"textured"``.

    Returns:
        SceneBatch: Pictures, captions and what is in each. With n = 1, those of :func:`draw_scene`.

    Raises:
        ValueError: If an argument is out of range.
    """
    rng = generator(purpose, seed, index)
    layouts = sample_layouts(rng, n, counts, ground)
    captions = [caption.text for caption in _captions(rng, layouts)]
    return SceneBatch(render(layouts, size), captions, _kinds(layouts))


def draw_scenes(
    rng: np.random.Generator,
    n: int,
    size: int = 64,
    *,
    counts: Mapping[int, float] = OBJECT_COUNTS,
    ground: str = TEXTURED,
) -> list[Scene]:
    """Draws n scenes with their ground truth.

    Args:
        rng (numpy.random.Generator): From :func:`generator`.
        n (int): Number of scenes, at least 1.
        size (int): Side of the pictures in pixels, at least 16. Default: 64.
        counts (Mapping[int, float]): Probability of each number of objects. Default: :data:`OBJECT_COUNTS`.
        ground (str): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``; nothing else of a scene depends
            on it. Default: ``"textured"``.

    Returns:
        list[Scene]: The scenes.

    Raises:
        ValueError: If an argument is out of range.
    """
    layouts = sample_layouts(rng, n, counts, ground)
    captions = _captions(rng, layouts)
    images, masks = render(layouts, size), visible_masks(layouts, size)
    return [
        Scene(images[i], _objects(layouts, i), masks[i, :k], caption.text, caption.words, caption.word_objects)
        for i, (k, caption) in enumerate(zip(layouts.count.tolist(), captions, strict=True))
    ]


def generator(purpose: str, seed: int, index: int = 0) -> np.random.Generator:
    """The random generator of one purpose, seed and index; no two of them share a stream.

    Args:
        purpose (str): One of :data:`PURPOSES`.
        seed (int): Not negative.
        index (int): Not negative. Default: 0.

    Returns:
        numpy.random.Generator: A fresh generator.

    Raises:
        ValueError: If the purpose is unknown, or ``seed`` or ``index`` is negative.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose: expected one of {', '.join(PURPOSES)}, got {purpose!r}; choose one of these.")
    for name, value in (("seed", seed), ("index", index)):
        if value < 0:
            raise ValueError(f"{name}: expected an integer of 0 or more, got {value}; give one that is not negative.")
    return np.random.default_rng(np.random.SeedSequence(int(seed), spawn_key=(PURPOSES.index(purpose), int(index))))


def sample_layouts(
    rng: np.random.Generator, n: int, counts: Mapping[int, float] = OBJECT_COUNTS, ground: str = TEXTURED
) -> Layouts:
    """Samples what n scenes contain, without drawing them.

    Args:
        rng (numpy.random.Generator): Where the randomness comes from.
        n (int): Number of scenes, at least 1.
        counts (Mapping[int, float]): Probability of each number of objects, 1 to 4. Default:
            :data:`OBJECT_COUNTS`.
        ground (str): What the objects lie on, one of ``captum_m2ib.scenes.GROUNDS``; nothing else of a scene depends
            on it. Default: ``"textured"``.

    Returns:
        Layouts: Shape-and-colour pairs are distinct within a scene, objects lie fully inside the picture, and
            of each at least
        :data:`VISIBLE_SHARE` is visible.

    Raises:
        ValueError: If n is below 1, ``counts`` is not a distribution over 1 to 4, or the ground is unknown.
    """
    if n < 1:
        raise ValueError(f"n: expected 1 scene or more, got {n}; ask for at least one.")
    if not counts or not set(counts) <= set(range(1, _MAX_OBJECTS + 1)) or abs(sum(counts.values()) - 1) > 1e-6:
        raise ValueError(
            f"counts: expected probabilities that sum to 1 for numbers of objects from 1 to {_MAX_OBJECTS}, "
            f"got {dict(counts)}; for example {OBJECT_COUNTS}."
        )
    count = rng.choice(list(counts), size=n, p=list(counts.values()))
    present = np.arange(_MAX_OBJECTS) < count[:, None]
    pairs = rng.random((n, len(SHAPES) * len(COLOURS)), dtype=np.float32).argsort(axis=1)[:, :_MAX_OBJECTS]
    shape, colour = np.divmod(pairs, len(COLOURS))
    low, high = RADIUS
    radius = np.where(present, low + (high - low) * rng.random((n, _MAX_OBJECTS), dtype=np.float32), 0)
    radius = radius.astype(np.float32)
    angle = 2 * np.pi * rng.random((n, _MAX_OBJECTS), dtype=np.float32)
    x, y = _place(rng, shape, radius, angle)
    brightness = 0.94 + 0.08 * rng.random((n, _MAX_OBJECTS, 1), dtype=np.float32)
    shift = 20 * rng.random((n, _MAX_OBJECTS, 3), dtype=np.float32) - 10
    rgb = np.clip(_RGB_TABLE[colour] * brightness + shift, 0, 255)
    return Layouts(count, shape, colour, x, y, radius, angle, rgb, *sample_grounds(rng, n, ground))


def render(layouts: Layouts, size: int) -> np.ndarray:
    """Draws pictures.

    Args:
        layouts (Layouts): What the n scenes contain.
        size (int): Side of the pictures in pixels, at least 16.

    Returns:
        numpy.ndarray: RGB pictures, uint8 (n, size, size, 3).

    Raises:
        ValueError: If ``size`` is below 16.
    """
    stamps = _stamps(layouts, size)
    images = draw_grounds(layouts.base, layouts.waves, layouts.tints, size)
    canvas = images.reshape(-1, 3)
    for slot in range(_MAX_OBJECTS):
        rows = np.flatnonzero(stamps.slot == slot)
        if rows.size:
            pixels = stamps.pixels[rows]
            paint = stamps.shade[rows][..., None] * layouts.rgb[stamps.scene[rows], slot][:, None, None]
            below = canvas[pixels]
            paint -= below
            paint *= stamps.opacity[rows][..., None]
            paint += below
            canvas[pixels] = paint
    np.clip(images, 0, 255, out=images)
    images += 0.5
    return images.astype(np.uint8)


def visible_masks(layouts: Layouts, size: int) -> np.ndarray:
    """What is visible of each object.

    Args:
        layouts (Layouts): What the n scenes contain.
        size (int): Side of the pictures in pixels, at least 16.

    Returns:
        numpy.ndarray: bool (n, 4, size, size); disjoint within a scene, all False in slots without an object.
    """
    stamps = _stamps(layouts, size)
    masks = np.zeros((_MAX_OBJECTS, len(layouts.count) * size * size), dtype=bool)
    for slot in range(_MAX_OBJECTS):
        rows = np.flatnonzero(stamps.slot == slot)
        inside = stamps.pixels[rows][stamps.opacity[rows] >= 0.5]
        masks[:slot, inside] = False
        masks[slot, inside] = True
    return masks.reshape(_MAX_OBJECTS, -1, size, size).swapaxes(0, 1)


def _place(
    rng: np.random.Generator, shape: np.ndarray, radius: np.ndarray, angle: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Centres x and y, float32 (n, 4): whole scenes are proposed, the first acceptable one is kept."""
    points = interior_points()[shape] * radius[..., None, None]
    cosine, sine = np.cos(angle)[..., None], np.sin(angle)[..., None]
    reach_x = cosine * points[..., 0] - sine * points[..., 1]
    reach_y = sine * points[..., 0] + cosine * points[..., 1]
    centres = np.empty((len(shape), 2, radius.shape[1]), dtype=np.float32)
    pending = np.arange(len(shape))
    while pending.size:
        inset = (radius[pending] + np.float32(_MARGIN))[:, None, None]
        draws = rng.random((pending.size, _CANDIDATES, 2, radius.shape[1]), dtype=np.float32)
        proposals = inset + (1 - 2 * inset) * draws
        acceptable = _acceptable(proposals, reach_x[pending], reach_y[pending], radius[pending])
        solved = acceptable.any(axis=1)
        first = acceptable.argmax(axis=1)
        centres[pending[solved]] = proposals[solved, first[solved]]
        pending = pending[~solved]
    return centres[:, 0], centres[:, 1]


def _acceptable(centres: np.ndarray, reach_x: np.ndarray, reach_y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Which proposals stay visible enough: centres (m, c, 2, 4), reaches (m, 4, points) -> (m, c)."""
    x, y = centres[:, :, 0], centres[:, :, 1]
    acceptable = np.ones(x.shape[:2], dtype=bool)
    for below in range(radius.shape[1] - 1):
        covered = np.zeros((*x.shape[:2], reach_x.shape[-1]), dtype=bool)
        for above in range(below + 1, radius.shape[1]):
            dx = (x[:, :, below] - x[:, :, above])[..., None] + reach_x[:, None, below]
            dy = (y[:, :, below] - y[:, :, above])[..., None] + reach_y[:, None, below]
            covered |= dx * dx + dy * dy < (radius[:, above] ** 2)[:, None, None]
        acceptable &= covered.mean(axis=-1) <= _COVERED_LIMIT
    return acceptable


def _stamps(layouts: Layouts, size: int) -> _Stamps:
    if size < 16:
        raise ValueError(f"size: expected 16 pixels or more, got {size}; smaller objects cannot be told apart.")
    side = int(np.ceil(2 * RADIUS[1] * size)) + 3
    scene, slot = np.nonzero(np.arange(_MAX_OBJECTS) < layouts.count[:, None])
    x, y, radius = layouts.x[scene, slot], layouts.y[scene, slot], layouts.radius[scene, slot]
    offsets = np.arange(side)
    left = np.clip(np.floor((x - radius) * size).astype(np.int64) - 1, 0, size - side)[:, None] + offsets
    top = np.clip(np.floor((y - radius) * size).astype(np.int64) - 1, 0, size - side)[:, None] + offsets
    pixels = scene[:, None, None] * (size * size) + top[:, :, None] * size + left[:, None, :]
    across = ((left + 0.5) / size - x[:, None]).astype(np.float32) / radius[:, None]
    down = ((top + 0.5) / size - y[:, None]).astype(np.float32) / radius[:, None]
    cosine, sine = np.cos(layouts.angle[scene, slot])[:, None], np.sin(layouts.angle[scene, slot])[:, None]
    distance = np.empty(pixels.shape, dtype=np.float32)
    shapes = layouts.shape[scene, slot]
    for index, name in enumerate(SHAPES):
        rows = np.flatnonzero(shapes == index)
        u = (cosine * across)[rows, None, :] + (sine * down)[rows, :, None]
        v = (cosine * down)[rows, :, None] - (sine * across)[rows, None, :]
        distance[rows] = DISTANCES[name](u, v)
    opacity = np.clip(0.5 - distance * (radius * size)[:, None, None], 0, 1)
    # A light from the upper left, and a darker rim that keeps touching objects of one colour apart.
    shade = 1 - np.float32(0.09) * (across[:, None, :] + down[:, :, None])
    shade -= np.float32(0.28) * np.clip(1 + distance * (radius / np.float32(_RIM))[:, None, None], 0, 1)
    return _Stamps(scene, slot, pixels, opacity, shade)


def _captions(rng: np.random.Generator, layouts: Layouts) -> list[Caption]:
    names = zip(layouts.count.tolist(), layouts.shape.tolist(), layouts.colour.tolist(), strict=True)
    return [
        describe(rng, [(SHAPES[shapes[i]], COLOURS[colours[i]]) for i in range(count)])
        for count, shapes, colours in names
    ]


def _kinds(layouts: Layouts) -> np.ndarray:
    kinds = np.zeros((len(layouts.count), len(SHAPES) * len(COLOURS)), dtype=bool)
    for slot in range(_MAX_OBJECTS):
        rows = np.flatnonzero(layouts.count > slot)
        kinds[rows, layouts.shape[rows, slot] * len(COLOURS) + layouts.colour[rows, slot]] = True
    return kinds


def _objects(layouts: Layouts, scene: int) -> tuple[SceneObject, ...]:
    return tuple(
        SceneObject(
            SHAPES[layouts.shape[scene, slot]],
            COLOURS[layouts.colour[scene, slot]],
            *(float(values[scene, slot]) for values in (layouts.x, layouts.y, layouts.radius, layouts.angle)),
        )
        for slot in range(int(layouts.count[scene]))
    )
