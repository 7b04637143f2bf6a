"""Attribution methods, one per file."""

from captum_m2ib.attr.multi_modal_info_bottleneck import (
    LayerMultiModalInfoBottleneck,
    MultiModalInfoBottleneck,
    OptimizationRecord,
)

__all__ = ["LayerMultiModalInfoBottleneck", "MultiModalInfoBottleneck", "OptimizationRecord"]
