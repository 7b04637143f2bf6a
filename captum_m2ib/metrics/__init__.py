"""Metrics of maps, for pictures and captions alike: is a map faithful, does it fall on the truth, can it be trusted?

One family per file: :mod:`confidence` and :mod:`curves` ask the model again with units masked, :mod:`localisation`
compares maps with masks, boxes and word labels, :mod:`retrain` fits models without the units a map calls relevant,
:mod:`sanity` changes what a map should depend on, :mod:`perturbations` serves Captum's own infidelity and
sensitivity. Values come per example, (N,); :func:`summarise` makes one figure of them,
:class:`Accumulated` of those of many batches.
"""

from captum_m2ib.metrics.accumulation import Accumulated
from captum_m2ib.metrics.confidence import Confidence, image_confidence, published_token_confidence, token_confidence
from captum_m2ib.metrics.curves import (
    PerturbationCurve,
    deletion,
    gaussian_blur,
    insertion,
    token_deletion,
    token_insertion,
)
from captum_m2ib.metrics.localisation import (
    BestIoU,
    auroc,
    average_precision,
    best_iou,
    boxes_to_masks,
    iou,
    pointing_game,
    relevance_mass,
    relevance_rank,
    top_k,
)
from captum_m2ib.metrics.perturbations import infidelity_perturbation, sensitivity_perturbation
from captum_m2ib.metrics.retrain import roar, roar_plus
from captum_m2ib.metrics.retrain_table import RetrainCell, RetrainRow, RetrainTable
from captum_m2ib.metrics.sanity import (
    Randomisation,
    caption_permutation,
    prompt_sensitivity,
    randomisation,
    seed_stability,
)
from captum_m2ib.metrics.similarity import pearson, spearman, ssim
from captum_m2ib.metrics.summary import Summary, summarise

__all__ = [
    "Accumulated",
    "BestIoU",
    "Confidence",
    "PerturbationCurve",
    "Randomisation",
    "RetrainCell",
    "RetrainRow",
    "RetrainTable",
    "Summary",
    "auroc",
    "average_precision",
    "best_iou",
    "boxes_to_masks",
    "caption_permutation",
    "deletion",
    "gaussian_blur",
    "image_confidence",
    "infidelity_perturbation",
    "insertion",
    "iou",
    "pearson",
    "pointing_game",
    "prompt_sensitivity",
    "published_token_confidence",
    "randomisation",
    "relevance_mass",
    "relevance_rank",
    "roar",
    "roar_plus",
    "seed_stability",
    "sensitivity_perturbation",
    "spearman",
    "ssim",
    "summarise",
    "token_confidence",
    "token_deletion",
    "token_insertion",
    "top_k",
]
