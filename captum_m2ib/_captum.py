"""Every import from captum that is not part of its documented interface, in one place."""

from captum._utils.common import (
    _format_additional_forward_args as format_additional_forward_args,
)
from captum._utils.common import _format_output as format_output
from captum._utils.common import _format_tensor_into_tuples as format_tensor_into_tuples
from captum._utils.common import _is_tuple as is_tuple
from captum._utils.common import _run_forward as run_forward
from captum.attr._utils.attribution import Attribution, GradientAttribution, LayerAttribution
from captum.log import log_usage

__all__ = [
    "Attribution",
    "GradientAttribution",
    "LayerAttribution",
    "format_additional_forward_args",
    "format_output",
    "format_tensor_into_tuples",
    "is_gradient_method",
    "is_tuple",
    "log_usage",
    "run_forward",
]


def is_gradient_method(method: object) -> bool:
    """Whether a method takes gradients of its inputs themselves."""
    return isinstance(method, GradientAttribution) and not isinstance(method, LayerAttribution)
