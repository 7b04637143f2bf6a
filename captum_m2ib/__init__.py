"""Multi-modal information bottleneck attribution for CLIP-like models, as a Captum plugin.

Names are imported when they are first used: captum alone brings matplotlib's pyplot, and a program that only asks
for the version should not wait for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from captum_m2ib._lazy import lazily

__version__ = "0.1.0"

if TYPE_CHECKING:
    from captum_m2ib.attr import (
        RISE,
        AttentionRelevance,
        ContrastiveInfoBottleneck,
        GradECLIP,
        InfoBottleneck,
        LayerMultiModalInfoBottleneck,
        LayerRecord,
        LeGrad,
        MultiModalInfoBottleneck,
        NarrowingInfoBottleneck,
        OptimizationRecord,
        PairInteraction,
        SimilarityMap,
    )
    from captum_m2ib.encoders.dual_encoder import DualEncoder, Pairs
    from captum_m2ib.encoders.frames import Video
    from captum_m2ib.encoders.sounds import Sound
    from captum_m2ib.engine.layouts import PackedLayout, PatchLayout, TextLayout
    from captum_m2ib.engine.rows import Shared
    from captum_m2ib.engine.stakes import NothingToExplainWarning
    from captum_m2ib.engine.statistics import (
        ChannelStatistics,
        estimate_statistics,
        load_statistics,
        save_statistics,
    )
    from captum_m2ib.explanations.bypass_figure import plot_bypass
    from captum_m2ib.explanations.compare import compare
    from captum_m2ib.explanations.explain import explain
    from captum_m2ib.explanations.explanation import Explanation
    from captum_m2ib.explanations.media import explain_media
    from captum_m2ib.games import Interactions, PairGame, interactions
    from captum_m2ib.metrics.bypass import (
        BypassWarning,
        TowerBypass,
        measure_bypass,
        recommend_layers,
        warn_of_bypass,
    )

_HOMES = {
    "attr": (
        "AttentionRelevance",
        "ContrastiveInfoBottleneck",
        "GradECLIP",
        "InfoBottleneck",
        "LayerMultiModalInfoBottleneck",
        "LayerRecord",
        "LeGrad",
        "MultiModalInfoBottleneck",
        "NarrowingInfoBottleneck",
        "OptimizationRecord",
        "PairInteraction",
        "RISE",
        "SimilarityMap",
    ),
    "metrics.bypass": (
        "BypassWarning",
        "TowerBypass",
        "measure_bypass",
        "recommend_layers",
        "warn_of_bypass",
    ),
    "encoders.dual_encoder": ("DualEncoder", "Pairs"),
    "encoders.frames": ("Video",),
    "encoders.sounds": ("Sound",),
    "explanations.bypass_figure": ("plot_bypass",),
    "explanations.compare": ("compare",),
    "explanations.explain": ("explain",),
    "explanations.media": ("explain_media",),
    "explanations.explanation": ("Explanation",),
    "games": ("Interactions", "PairGame", "interactions"),
    "engine.rows": ("Shared",),
    "engine.stakes": ("NothingToExplainWarning",),
    "engine.layouts": ("PackedLayout", "PatchLayout", "TextLayout"),
    "engine.statistics": ("ChannelStatistics", "estimate_statistics", "load_statistics", "save_statistics"),
}

__all__ = [
    "RISE",
    "AttentionRelevance",
    "BypassWarning",
    "ChannelStatistics",
    "ContrastiveInfoBottleneck",
    "DualEncoder",
    "Explanation",
    "GradECLIP",
    "InfoBottleneck",
    "Interactions",
    "LayerMultiModalInfoBottleneck",
    "LayerRecord",
    "LeGrad",
    "MultiModalInfoBottleneck",
    "NarrowingInfoBottleneck",
    "NothingToExplainWarning",
    "OptimizationRecord",
    "PackedLayout",
    "PairGame",
    "PairInteraction",
    "Pairs",
    "PatchLayout",
    "Shared",
    "SimilarityMap",
    "Sound",
    "TextLayout",
    "TowerBypass",
    "Video",
    "compare",
    "estimate_statistics",
    "explain",
    "explain_media",
    "interactions",
    "load_statistics",
    "measure_bypass",
    "plot_bypass",
    "recommend_layers",
    "save_statistics",
    "warn_of_bypass",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
