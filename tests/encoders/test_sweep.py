"""Every class of transformers that offers features of two modalities is recognised, or is in a list with the reason."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import torch
import transformers

from captum_m2ib import DualEncoder
from captum_m2ib.encoders.families import family_of

MODALITIES = ("text", "image", "audio", "video", "speech")
RETRIEVES = ("ForRetrieval", "TextRetrieval", "ForContrastiveLearning")

LEFT_OUT = {
    "BridgeTowerForContrastiveLearning": "recognised, but its configuration lacks a default size",
    "BridgeTowerForImageAndTextRetrieval": "one network reads both inputs; explained through a function",
    "NeoMMEForRetrieval": "its patches stand among the tokens of a prompt, in no tower of their own",
    "ViltForImageAndTextRetrieval": "one network reads both inputs; explained through a function",
}


def modalities_of(kind: type) -> list[str]:
    return [modality for modality in MODALITIES if hasattr(kind, f"get_{modality}_features")]


def classes() -> Iterator[type]:
    """Those that embed a text and something else, or say by their names that they compare the two."""
    for name in dir(transformers):
        if not name.endswith(("Model", "Generation", *RETRIEVES)) or name.startswith("TF"):
            continue
        kind = getattr(transformers, name)
        if inspect.isclass(kind) and issubclass(kind, transformers.PreTrainedModel):
            found = modalities_of(kind)
            if ("text" in found and len(found) > 1) or name.endswith(RETRIEVES):
                yield kind


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_class_of_two_modalities_is_recognised_or_left_out_with_a_reason():
    found, unknown = [], []
    for kind in classes():
        if kind.__name__ in LEFT_OUT:
            continue
        with torch.device("meta"):
            model = kind(kind.config_class())
        (found if family_of(model) is not None else unknown).append(kind.__name__)
    assert not unknown
    assert {"CLIPModel", "SiglipModel", "ClapModel", "FlavaModel"} <= set(found)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"])
def test_a_model_that_embeds_no_text_is_told_what_to_do(name: str):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    with pytest.raises(TypeError, match=r"^model: .*log-odds"):
        DualEncoder(model)
