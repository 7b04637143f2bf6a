"""Scenes with exact ground truth, and the compact dual encoder that learns to match them with their captions.

Drawing and probes need NumPy only; transformers is imported when a model is built, loaded or trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from captum_m2ib._lazy import lazily

if TYPE_CHECKING:
    from captum_m2ib.scenes.captions import COLOURS, SHAPES
    from captum_m2ib.scenes.drawing import Scene, SceneObject, draw_batch, draw_scene
    from captum_m2ib.scenes.evaluation import evaluate_naming, evaluate_retrieval
    from captum_m2ib.scenes.grounds import GROUNDS
    from captum_m2ib.scenes.model import build_model, build_tokenizer, load_checkpoint, save_checkpoint
    from captum_m2ib.scenes.probes import (
        ImageProbe,
        NamingTrial,
        TokenProbe,
        image_probes,
        naming_trials,
        pair_probes,
        token_probes,
    )
    from captum_m2ib.scenes.training import train

_HOMES = {
    "captions": ("COLOURS", "SHAPES"),
    "drawing": ("Scene", "SceneObject", "draw_batch", "draw_scene"),
    "evaluation": ("evaluate_naming", "evaluate_retrieval"),
    "grounds": ("GROUNDS",),
    "model": ("build_model", "build_tokenizer", "load_checkpoint", "save_checkpoint"),
    "probes": (
        "ImageProbe",
        "NamingTrial",
        "TokenProbe",
        "image_probes",
        "naming_trials",
        "pair_probes",
        "token_probes",
    ),
    "training": ("train",),
}

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Directory of the trained compact dual encoder that comes with the package."""

__all__ = [
    "CHECKPOINT",
    "COLOURS",
    "GROUNDS",
    "SHAPES",
    "ImageProbe",
    "NamingTrial",
    "Scene",
    "SceneObject",
    "TokenProbe",
    "build_model",
    "build_tokenizer",
    "draw_batch",
    "draw_scene",
    "evaluate_naming",
    "evaluate_retrieval",
    "image_probes",
    "load_checkpoint",
    "naming_trials",
    "pair_probes",
    "save_checkpoint",
    "token_probes",
    "train",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
