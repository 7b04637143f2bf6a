"""The scene that is explained where no picture is given: several objects, one of them named."""

from __future__ import annotations

from captum_m2ib.scenes.probes import ImageProbe, image_probes

EXAMPLE_SCENE = 35
_SIDE = 384


def example_scene(number: int = EXAMPLE_SCENE) -> ImageProbe:
    """A drawn scene, large enough to be looked at, with a caption of something in it."""
    return image_probes(number + 1, 0, _SIDE)[number]
