"""Load a transformers checkpoint with plain words for whatever it lacks; safetensors only, no code from it is run."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_m2ib.encoders.families import FAMILIES
from captum_m2ib.encoders.processors import TransformAndTokenizer
from captum_m2ib.engine.statistics import ChannelStatistics, load_statistics

STATISTICS_FILE = "bottleneck_statistics.safetensors"


def check_checkpoint(model: str | os.PathLike[str]) -> None:
    """Say what a local path lacks, where the loader would ask the hub for a repository of that name."""
    path = Path(model)
    if not path.is_dir():
        if path.exists() or path.is_absolute() or str(model).startswith("."):
            raise OSError(f"model: {model} is not a directory; expected a checkpoint directory or a hub id.")
        return
    if not (path / "config.json").is_file():
        raise OSError(f"model: {model} holds no config.json; expected a transformers checkpoint directory.")
    if not any(path.glob("*.safetensors")):
        raise OSError(
            f"model: {model} holds no safetensors weights; save the model with save_pretrained (pickled weights are "
            "not loaded)."
        )


def load_model(model: str | os.PathLike[str], revision: str | None, dtype: torch.dtype) -> nn.Module:
    from safetensors import SafetensorError

    try:
        loaded, report = _class_of(model, revision).from_pretrained(
            model,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise OSError(f"model: the weights of {model} are damaged ({error}); fetch or save them again.") from error
    except (OSError, ValueError) as error:
        raise OSError(f"model: cannot load {model}: {error}") from error
    # What the file lacks would be random: a map of it would look like any other.
    lacking = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["missing_keys"])
    lacking += sorted(str(key[0] if isinstance(key, tuple) else key) for key in report["mismatched_keys"])
    if lacking:
        raise OSError(
            f"model: {model} lacks weights that fit its configuration for {len(lacking)} parameters, {lacking[0]} "
            "among them; fetch or save it again."
        )
    return loaded


def _class_of(model: str | os.PathLike[str], revision: str | None) -> Any:
    """The class that a checkpoint was saved from, where a family asks for that one; else its base model."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, revision=revision)
    names = getattr(config, "architectures", None) or ()
    wanted = next((name for name in names if name in FAMILIES and hasattr(transformers, name)), "AutoModel")
    return getattr(transformers, wanted)


def load_processor(model: str | os.PathLike[str], revision: str | None) -> Any:
    from transformers import AutoProcessor

    try:
        # One backend everywhere, so that a map does not depend on whether torchvision is installed.
        return AutoProcessor.from_pretrained(model, revision=revision, backend="pil")
    except Exception as error:  # A malformed file raises whatever its parser met.
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        warnings.warn(
            f"model: {model} has no usable processor ({reason}); prepare() will not work, pass tensors instead.",
            UserWarning,
            stacklevel=3,
        )
        return None


def load_open_clip(
    model: str, pretrained: str | None, options: dict[str, Any]
) -> tuple[nn.Module, TransformAndTokenizer]:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"open_clip: cannot be imported ({error}); install it with: pip install 'captum_m2ib[open-clip]'."
        ) from error
    try:
        loaded, _, transform = open_clip.create_model_and_transforms(model, pretrained=pretrained, **options)
        tokenizer = open_clip.get_tokenizer(model)
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"model: open_clip cannot load {model} with weights {pretrained}: {error}") from error
    return loaded, TransformAndTokenizer(transform, tokenizer)


def find_statistics(model: str | os.PathLike[str], revision: str | None) -> dict[str, ChannelStatistics]:
    from transformers.utils import cached_file

    found = cached_file(
        model,
        STATISTICS_FILE,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return load_statistics(found) if found else {}
