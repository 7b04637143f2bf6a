r"""The small pieces that Captum's own tools need to work on pairs of pictures and captions.

Captum's tools expect floating-point inputs, layers that return maps, and one number per feature; a pair has token
ids, a sequence of patches with a class token before it, and padding.
:mod:`~captum_m2ib.composition.feature_masks` groups pixels by patch and keeps special tokens,
:mod:`~captum_m2ib.composition.forwards` lets gradients reach tokens and maps,
:mod:`~captum_m2ib.composition.text_records` shows tokens,
:mod:`~captum_m2ib.composition.classifier` turns captions into classes. Captum itself does the rest.
"""

from captum_m2ib.composition.classifier import CaptionClassifier, explain_classes
from captum_m2ib.composition.feature_masks import feature_masks, token_baselines
from captum_m2ib.composition.forwards import EmbeddingForward, GridForward, TokenGradCam
from captum_m2ib.composition.text_records import text_records

__all__ = [
    "CaptionClassifier",
    "EmbeddingForward",
    "GridForward",
    "TokenGradCam",
    "explain_classes",
    "feature_masks",
    "text_records",
    "token_baselines",
]
