"""What transformers and open_clip offer is recognised, or is in a list with the reason.

Of transformers every class that embeds a text and something else, of open_clip every architecture, all without weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import open_clip
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


# Text towers whose configurations lie on the hub, by how its ids begin, and configurations of their kinds.
HUB_CONFIGURATIONS = {
    "xlm-roberta": transformers.XLMRobertaConfig,
    "roberta": transformers.RobertaConfig,
    "google/mt5": transformers.MT5Config,
    "facebook/nllb": transformers.M2M100Config,
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_architecture_of_open_clip_is_recognised(monkeypatch: pytest.MonkeyPatch):
    def configuration(name: str, **_: object) -> transformers.PretrainedConfig:
        name = name.removeprefix("FacebookAI/")
        return next(kind() for start, kind in HUB_CONFIGURATIONS.items() if name.startswith(start))

    monkeypatch.setattr("open_clip.hf_model.AutoConfig.from_pretrained", configuration)
    unknown = []
    for name in open_clip.list_models():
        with torch.device("meta"):
            model = open_clip.create_model(name, device="meta", pretrained_hf=False)
        encoder = DualEncoder(model) if family_of(model) is not None else None
        if encoder is None or None in encoder.layouts or encoder.token_table_of(1) is None:
            unknown.append(name)
    assert not unknown and len(open_clip.list_models()) > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"])
def test_a_model_that_embeds_no_text_is_told_what_to_do(name: str):
    kind = getattr(transformers, name)
    with torch.device("meta"):
        model = kind(kind.config_class())
    with pytest.raises(TypeError, match=r"^model: .*log-odds"):
        DualEncoder(model)
