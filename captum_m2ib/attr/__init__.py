"""Attribution methods, one per file."""

from captum_m2ib.attr.attention_relevance import AttentionRelevance
from captum_m2ib.attr.contrastive_info_bottleneck import ContrastiveInfoBottleneck
from captum_m2ib.attr.grad_eclip import GradECLIP
from captum_m2ib.attr.info_bottleneck import InfoBottleneck
from captum_m2ib.attr.layer_multi_modal_info_bottleneck import LayerMultiModalInfoBottleneck
from captum_m2ib.attr.le_grad import LeGrad
from captum_m2ib.attr.multi_modal_info_bottleneck import MultiModalInfoBottleneck, OptimizationRecord
from captum_m2ib.attr.narrowing_info_bottleneck import NarrowingInfoBottleneck
from captum_m2ib.attr.pair_interaction import PairInteraction
from captum_m2ib.attr.rise import RISE
from captum_m2ib.attr.similarity_map import SimilarityMap
from captum_m2ib.engine.descent import LayerRecord

__all__ = [
    "RISE",
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
    "SimilarityMap",
]
