"""The attribution methods of pairs by name, and the unit of what any method says."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from captum_m2ib.attr.attention_relevance import AttentionRelevance
from captum_m2ib.attr.grad_eclip import GradECLIP
from captum_m2ib.attr.info_bottleneck import InfoBottleneck
from captum_m2ib.attr.layer_multi_modal_info_bottleneck import LayerMultiModalInfoBottleneck
from captum_m2ib.attr.le_grad import LeGrad
from captum_m2ib.attr.multi_modal_info_bottleneck import MultiModalInfoBottleneck
from captum_m2ib.attr.narrowing_info_bottleneck import NarrowingInfoBottleneck
from captum_m2ib.attr.rise import RISE
from captum_m2ib.attr.similarity_map import SimilarityMap

UNITS = ("bits", "score", "relative")
"""What a map may be in: bits; units of the score, which sum to about what it gains over a baseline; or numbers that
only compare within one map."""


@dataclass(frozen=True)
class NamedMethod:
    r"""A method of attribution that is asked for by name.

    Attributes:

        name (str): The name.
        make (Callable): ``make(forward_func)``, and ``layers=`` unless they are fixed.
        about (str): What it is, in a few words.
        needs (tuple[str, ...]): What it asks of a model beside its score: ``"gradients"``, ``"attention"``.
        is_signed (bool): Whether its maps have values below zero.
        seeded (bool): Whether ``attribute`` takes a seed.
        has_layers (bool): Whether ``make`` takes ``layers``.
        late_only (bool): Whether it is for models of late interaction alone.
    """

    name: str
    make: Callable[..., Any]
    about: str
    needs: tuple[str, ...] = ("gradients",)
    is_signed: bool = False
    seeded: bool = False
    has_layers: bool = True
    late_only: bool = False

    @property
    def kind(self) -> type:
        """The class of what is made."""
        made: Any = self.make
        found: type = getattr(made, "__self__", made)
        return found

    @property
    def unit(self) -> str:
        """What its maps are in, one of :data:`UNITS`."""
        return _unit_of_kind(self.kind)


_ATTENTION = ("gradients", "attention")

METHODS: Mapping[str, NamedMethod] = MappingProxyType(
    {
        method.name: method
        for method in (
            NamedMethod("m2ib", MultiModalInfoBottleneck, "least information that keeps the score", seeded=True),
            NamedMethod(
                "m2ib-published",
                MultiModalInfoBottleneck.published,
                "the same with the paper's layers and prior",
                seeded=True,
                has_layers=False,
            ),
            NamedMethod("nib", NarrowingInfoBottleneck, "gradients while the hidden state narrows", is_signed=True),
            NamedMethod("grad-eclip", GradECLIP, "values of attention, weighted by gradients", _ATTENTION),
            NamedMethod("relevance", AttentionRelevance, "attention times its gradients, block by block", _ATTENTION),
            NamedMethod("legrad", LeGrad, "gradients of attention", _ATTENTION),
            NamedMethod(
                "m2ib-guided",
                MultiModalInfoBottleneck.guided,
                "M2IB, a picture's bits moved to where a late layer reads",
                seeded=True,
            ),
            NamedMethod(
                "similarity-map",
                SimilarityMap,
                "matches of late interaction, as ColPali's tools draw them",
                needs=(),
                is_signed=True,
                has_layers=False,
                late_only=True,
            ),
            NamedMethod("rise", RISE, "mean score under 4000 random masks", needs=(), is_signed=True, seeded=True),
        )
    }
)
"""Every method of this package that explains both inputs of a pair, in the order of the tables."""

_IN_BITS = (MultiModalInfoBottleneck, LayerMultiModalInfoBottleneck, InfoBottleneck)
# Of Captum's methods those whose attributions sum to what the score gains over a baseline, at least to first order.
_IN_SCORE = {
    "DeepLift",
    "DeepLiftShap",
    "GradientShap",
    "InputXGradient",
    "IntegratedGradients",
    "NarrowingInfoBottleneck",
}


def method_named(name: str, forward_func: Callable[..., Any], layers: Any = None) -> Any:
    r"""A method by its name.

    Args:

        name (str): One of :data:`METHODS`.
        forward_func (DualEncoder or nn.Module): What it explains.
        layers (sequence, optional): As the method takes them. Default: None (the method's own)

    Returns:
        Attribution: the method.

    Raises:
        ValueError: if there is none of that name, or its layers are fixed.

    Examples::

        >>> type(method_named("legrad", encoder)).__name__
        'LeGrad'
    """
    named = entry_named(name, layers)
    return named.make(forward_func) if layers is None else named.make(forward_func, layers=layers)


def entry_named(name: str, layers: Any = None) -> NamedMethod:
    r"""What is known of a method, before there is a model.

    Args:

        name (str): One of :data:`METHODS`.
        layers (optional): What is asked for as its layers. Default: None

    Returns:
        NamedMethod: the method's entry.

    Raises:
        ValueError: if there is none of that name, or its layers are fixed.

    Examples::

        >>> entry_named("nib").unit
        'score'
    """
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}.")
    if layers is not None and not METHODS[name].has_layers:
        raise ValueError(f"layers: those of {name} are fixed; leave out layers, or take another method.")
    return METHODS[name]


def settings_of(name: str, asked: Mapping[str, Any], called: Mapping[str, str] | None = None) -> dict[str, Any]:
    r"""Those settings that were asked for, once the method is known to take them.

    Args:

        name (str): One of :data:`METHODS`.
        asked (mapping): Per setting its value, None where it was not asked for; a ``seed`` is left out for a method
            that draws nothing.
        called (mapping, optional): What errors call the settings, such as ``--steps``. Default: None (as they are)

    Returns:
        dict: further arguments of the method's ``attribute``.

    Raises:
        ValueError: if there is no such method, or it takes no such setting.

    Examples::

        >>> settings_of("nib", {"n_steps": 4, "beta": None, "seed": 0})
        {'n_steps': 4}
    """
    takes = inspect.signature(entry_named(name).kind.attribute).parameters  # type: ignore[attr-defined]
    found = {key: value for key, value in asked.items() if value is not None and (key != "seed" or key in takes)}
    if unknown := [(called or {}).get(key, key) for key in found if key not in takes]:
        raise ValueError(f"{', '.join(unknown)}: {name} takes no such setting; leave it out.")
    return found


def unit_of(method: Any) -> str:
    r"""What a method's maps are in.

    Args:

        method: Any object with ``attribute``.

    Returns:
        str: one of :data:`UNITS`; ``"relative"`` for a method that is not known.

    Examples::

        >>> unit_of(method_named("nib", encoder)), unit_of(method_named("legrad", encoder))
        ('score', 'relative')
    """
    return _unit_of_kind(type(method))


def _unit_of_kind(kind: type) -> str:
    if issubclass(kind, _IN_BITS):
        return "bits"
    return "score" if kind.__name__ in _IN_SCORE else "relative"
