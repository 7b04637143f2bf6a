"""Multi-modal information bottleneck attribution for CLIP-like models, as a Captum plugin."""

__version__ = "0.1.0"

from captum_m2ib.attr import LayerMultiModalInfoBottleneck, MultiModalInfoBottleneck, OptimizationRecord
from captum_m2ib.dual_encoder import DualEncoder, Pairs
from captum_m2ib.layouts import PatchLayout, TextLayout
from captum_m2ib.statistics import ChannelStatistics, load_statistics, save_statistics

__all__ = [
    "ChannelStatistics",
    "DualEncoder",
    "LayerMultiModalInfoBottleneck",
    "MultiModalInfoBottleneck",
    "OptimizationRecord",
    "Pairs",
    "PatchLayout",
    "TextLayout",
    "load_statistics",
    "save_statistics",
]
