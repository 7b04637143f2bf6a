"""Modules that wrap another: taken off where the wrapped one computes the same, else named, with what to pass instead.

Wrappers are known by the names of their classes, so that no library is imported to look for its own.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from captum_m2ib.encoders.embedders import PromptedProcessor, compares_whole_by_cosine, is_embedder
from captum_m2ib.encoders.families import family_of

# Where wrappers that return what the module inside returns keep it.
_TRANSPARENT = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
}


def unwrap(model: Any) -> Any:
    r"""The module inside wrappers that change nothing of what it returns.

    Args:

        model (Any): ``torch.compile``'s modules, ``DataParallel``, ``DistributedDataParallel``, averaged models
            (``AveragedModel``, timm's ``ModelEmaV2`` and ``ModelEmaV3``), a ``PeftModel`` whose adapters sit in the
            model's layers, a ``SentenceTransformer`` that holds one dual encoder; or anything else.

    Returns:
        Any: what is inside, through several wrappers; what wraps nothing stays.

    Raises:
        ValueError: if adapters act in the wrapper's own forward pass, which the towers' methods never run.
    """
    inside = _inside(model)
    while inside is not None:
        model, inside = inside, _inside(inside)
    return model


def processor_in(model: Any) -> Any:
    """The processor that a wrapper keeps beside its model, or None."""
    while model is not None:
        if is_embedder(model):
            return PromptedProcessor(model) if hasattr(model, "preprocess") else getattr(model[0], "processor", None)
        model = _inside(model)
    return None


def no_towers(model: Any) -> str:
    """What to pass instead of a model that offers no towers under a known name."""
    if writes_text(model, getattr(model, "config", None)):
        return generating(type(model).__name__)
    if is_embedder(model) and _held_encoder(model) is None:
        return (
            "expected a SentenceTransformer of version 5.4 or newer that embeds both pictures and texts in towers that "
            f"are known, got one of {', '.join(map(str, getattr(model, 'modalities', ['texts'])))}; load another one."
        )
    held = _held_encoder(model)
    advice = f"pass its attribute {held}" if held else "pass DualEncoder(image_tower, text_tower)"
    return (
        "expected get_image_features and get_text_features, or encode_image and encode_text, got "
        f"{type(model).__name__}, which offers neither; {advice} instead."
    )


def writes_text(model: Any, config: Any) -> bool:
    """Whether a model, or the checkpoint that a configuration was saved with, generates text."""
    if callable(getattr(model, "can_generate", None)) and model.can_generate():
        return True
    saved_from = getattr(config, "architectures", None) or ()
    return any(name.endswith(("ForConditionalGeneration", "ForCausalLM", "LMHeadModel")) for name in saved_from)


def generating(name: str) -> str:
    """What to do with a model that generates text."""
    return (
        f"{name} generates text, and offers no score of a picture and a caption; what is explained here is such a "
        "score. Give MultiModalInfoBottleneck a function that returns one for each pair, e.g. the log-odds of yes over "
        "no as the answer to a question: see 'A model that answers' in docs/guides/own-model.md."
    )


def _inside(model: Any) -> Any:
    names = _class_names(model)
    for name in names & set(_TRANSPARENT):
        return getattr(model, _TRANSPARENT[name])
    if names & {"PeftModel", "PeftMixedModel"}:
        return _adapted(model)
    return _embedded(model) if is_embedder(model) else None


def _class_names(model: Any) -> set[str]:
    return {kind.__name__ for kind in type(model).__mro__}


def _adapted(model: Any) -> Any:
    """The model that adapters sit in."""
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            f"model: {type(model).__name__} adds its prompts in a forward pass of its own, which the towers' methods "
            "do not run; pass DualEncoder(image_tower, text_tower) with towers that add them."
        )
    return model.base_model.model


def _embedded(model: Any) -> Any:
    """The dual encoder of a SentenceTransformer, if what follows it leaves cosine similarities as they are."""
    first, *others = model
    found = getattr(first, "model", None)
    family = family_of(found)
    is_as_it_is = all(type(one).__name__ == "Normalize" for one in others) and compares_whole_by_cosine(model)
    return found if is_as_it_is and family is not None and family.score is None else None


def _held_encoder(model: Any) -> str | None:
    """Where a dual encoder is held inside, as one would write it."""
    held = model.named_children() if isinstance(model, nn.Module) else vars(model).items()
    for name, child in held if hasattr(model, "__dict__") else ():
        for path, module in child.named_modules() if isinstance(child, nn.Module) else ():
            if family_of(module) is not None:
                return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", f".{name}.{path}".rstrip("."))
    return None
