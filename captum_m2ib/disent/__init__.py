"""InfoDisent and EPIC: a pretrained classifier's decision, broken into atomic concepts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from captum_m2ib._lazy import lazily

if TYPE_CHECKING:
    from captum_m2ib.disent.attribution import InfoDisentAttribution
    from captum_m2ib.disent.epic import EPIC, EPICHead
    from captum_m2ib.disent.explanations import Contributions, Half, contributions, heatmaps, purity
    from captum_m2ib.disent.features import FeatureReader, FeatureSet
    from captum_m2ib.disent.figures import class_figure, local_figure
    from captum_m2ib.disent.head import HeadOptions, InfoDisentHead
    from captum_m2ib.disent.model import ConceptModel, InfoDisent
    from captum_m2ib.disent.prototypes import (
        ClassExplanation,
        ClassHalf,
        Prototype,
        Prototypes,
        explain_class,
        find_prototypes,
    )
    from captum_m2ib.disent.training import FitRecord, FitSettings
    from captum_m2ib.disent.transform import ChannelTransform
    from captum_m2ib.disent.zero_shot import ConceptNames, ZeroShotInfoDisent, name_concepts, similarities

_HOMES = {
    "attribution": ("InfoDisentAttribution",),
    "epic": ("EPIC", "EPICHead"),
    "explanations": ("Contributions", "Half", "contributions", "heatmaps", "purity"),
    "features": ("FeatureReader", "FeatureSet"),
    "figures": ("class_figure", "local_figure"),
    "head": ("HeadOptions", "InfoDisentHead"),
    "model": ("ConceptModel", "InfoDisent"),
    "prototypes": ("ClassExplanation", "ClassHalf", "Prototype", "Prototypes", "explain_class", "find_prototypes"),
    "training": ("FitRecord", "FitSettings"),
    "transform": ("ChannelTransform",),
    "zero_shot": ("ConceptNames", "ZeroShotInfoDisent", "name_concepts", "similarities"),
}

__all__ = [
    "EPIC",
    "ChannelTransform",
    "ClassExplanation",
    "ClassHalf",
    "ConceptModel",
    "ConceptNames",
    "Contributions",
    "EPICHead",
    "FeatureReader",
    "FeatureSet",
    "FitRecord",
    "FitSettings",
    "Half",
    "HeadOptions",
    "InfoDisent",
    "InfoDisentAttribution",
    "InfoDisentHead",
    "Prototype",
    "Prototypes",
    "ZeroShotInfoDisent",
    "class_figure",
    "contributions",
    "explain_class",
    "find_prototypes",
    "heatmaps",
    "local_figure",
    "name_concepts",
    "purity",
    "similarities",
]

__getattr__, __dir__ = lazily(__name__, _HOMES)
