"""Attribution methods, one per file."""

from captum_m2ib.attr._gates import LayerRecord
from captum_m2ib.attr.multi_modal_info_bottleneck import (
    LayerMultiModalInfoBottleneck,
    MultiModalInfoBottleneck,
    OptimizationRecord,
)

__all__ = ["LayerMultiModalInfoBottleneck", "LayerRecord", "MultiModalInfoBottleneck", "OptimizationRecord"]
