"""Load a checkpoint with plain words for whatever it lacks; safetensors only, no code from it is run.

A checkpoint is a directory or a hub id of transformers; an adapter of one (``adapter_config.json``, as peft writes it);
or a SentenceTransformer (``modules.json``) that holds one and does nothing to its embeddings.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_m2ib.encoders.families import FAMILIES, TEXT
from captum_m2ib.encoders.processors import TransformAndTokenizer
from captum_m2ib.encoders.wrappers import generating, writes_text
from captum_m2ib.engine.statistics import ChannelStatistics, load_statistics

STATISTICS_FILE = "bottleneck_statistics.safetensors"


_WEIGHTS, _ADAPTER = "adapter_model.safetensors", "adapter_config.json"
# They leave cosine similarities as they are.
_HARMLESS = {"Normalize", "Dropout"}


@dataclass(frozen=True)
class Source:
    r"""Where the parts of a checkpoint are.

    Attributes:

        model (str or PathLike): Hub id or directory of the configuration and the weights.
        revision (str or None): Branch, tag or commit of that on the hub.
        adapter (Path or None): Directory of an adapter of those weights.
        processor (str or PathLike): Hub id or directory of the processor.
    """

    model: str | os.PathLike[str]
    revision: str | None
    adapter: Path | None
    processor: str | os.PathLike[str]


def find_source(model: str | os.PathLike[str], revision: str | None) -> Source:
    r"""Find the parts of a checkpoint, or say what is missing.

    Args:

        model (str or PathLike): Hub id or directory.
        revision (str or None): Branch, tag or commit on the hub.

    Returns:
        Source: its parts.

    Raises:
        OSError: if a directory is none of the kinds that are known, or lacks a part.
    """
    _check_name(model)
    if _is_adapter(model, revision):
        return _adapter_source(model, revision)
    modules = _read_json(model, "modules.json", revision)
    if modules is not None:
        model = _module_folder(model, revision, modules)
    _check_directory(model)
    return Source(model, revision, None, model)


def _check_name(model: str | os.PathLike[str]) -> None:
    """Say what is wrong with a name, where the loader would ask the hub for a repository of that name."""
    name, path = os.fspath(model), Path(model)
    if "://" in name:
        raise OSError(f"model: {name[:200]} is an address; give a hub id, such as openai/clip-vit-base-patch32.")
    if name.startswith(("hf-hub:", "local-dir:", "open_clip:")):
        raise OSError(
            f"model: {name} is a name of open_clip; load it with DualEncoder.from_open_clip, or with load_named of "
            "captum_m2ib.encoders.naming."
        )
    if not path.is_dir() and (path.exists() or path.is_absolute() or name.startswith(".")):
        raise OSError(f"model: {model} is not a directory; expected a checkpoint directory or a hub id.")


def _check_directory(model: str | os.PathLike[str]) -> None:
    path = Path(model)
    if not path.is_dir():
        return
    if not (path / "config.json").is_file():
        raise OSError(f"model: {model} holds no config.json; expected a transformers checkpoint directory.")
    if not any(path.glob("*.safetensors")):
        raise OSError(
            f"model: {model} holds no safetensors weights; save the model with save_pretrained (pickled weights are "
            "not loaded)."
        )


def _is_adapter(model: str | os.PathLike[str], revision: str | None) -> bool:
    path = Path(model)
    if path.is_dir():
        # Some write the configuration of the base model beside the adapter.
        return (path / _ADAPTER).is_file() and not any(path.glob("model*.safetensors"))
    has_model = _find_file(model, "config.json", revision) is not None
    return not has_model and _find_file(model, _ADAPTER, revision) is not None


def _adapter_source(model: str | os.PathLike[str], revision: str | None) -> Source:
    settings = _read_json(model, _ADAPTER, revision)
    base = settings.get("base_model_name_or_path") if isinstance(settings, dict) else None
    if not isinstance(base, str) or not base:
        raise OSError(
            f"model: {_ADAPTER} of {model} names no base_model_name_or_path; write the hub id or the directory of the "
            "model that was adapted into it."
        )
    weights = _find_file(model, _WEIGHTS, revision)
    if weights is None:
        raise OSError(f"model: {model} holds no {_WEIGHTS}; save the adapter anew (pickled weights are not loaded).")
    try:
        _check_name(base)
        _check_directory(base)
    except OSError as error:
        raise OSError(f"model: the base model of the adapter {model} cannot be loaded: {error}") from error
    own = any(_find_file(model, name, revision) for name in ("preprocessor_config.json", "processor_config.json"))
    return Source(base, settings.get("revision"), Path(weights).parent, model if own else base)


def _module_folder(model: str | os.PathLike[str], revision: str | None, modules: Any) -> str | os.PathLike[str]:
    """Where the dual encoder of a SentenceTransformer lies."""
    entries = [entry for entry in modules if isinstance(entry, dict)] if isinstance(modules, list) else []
    kinds = [str(entry.get("type", "?")).rpartition(".")[2] for entry in entries]
    if not kinds or kinds[0] not in ("CLIPModel", "Transformer") or not set(kinds[1:]) <= _HARMLESS:
        raise OSError(
            f"model: {model} is a SentenceTransformer of {', '.join(kinds) or 'nothing'}; expected one dual encoder, "
            f"such as CLIP, and behind it at most {' and '.join(sorted(_HARMLESS))}. If it embeds pictures and texts, "
            "load it with DualEncoder.from_sentence_transformers."
        )
    folder = str(entries[0].get("path") or "")
    if not folder or folder == ".":
        return model
    if Path(folder).is_absolute() or ".." in Path(folder).parts:
        raise OSError(f"model: modules.json of {model} leads out of it, to {folder}; expected a folder inside.")
    if Path(model).is_dir():
        return Path(model) / folder
    from huggingface_hub import snapshot_download

    files = [f"{folder}/*{ending}" for ending in (".json", ".txt", ".safetensors", ".model")]
    return Path(snapshot_download(os.fspath(model), revision=revision, allow_patterns=files)) / folder


def load_model(source: Source, dtype: torch.dtype) -> nn.Module:
    from safetensors import SafetensorError

    model = source.model
    try:
        loaded, report = _class_of(model, source.revision).from_pretrained(
            model,
            revision=source.revision,
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
    return loaded if source.adapter is None else _adapted(loaded, source.adapter)


def _adapted(model: nn.Module, adapter: Path) -> nn.Module:
    """A model with what an adapter changes added to its weights."""
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"model: {adapter} is an adapter, which peft reads, and that cannot be imported ({error}); install it "
            "with: pip install 'captum_m2ib[peft]'."
        ) from error
    try:
        with warnings.catch_warnings():
            # Of one library about another: nothing that whoever loads an adapter could mend.
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("error", message="(?s).*missing adapter keys")
            found = peft.PeftModel.from_pretrained(model, os.fspath(adapter), torch_device="cpu")
            merged: nn.Module = found.merge_and_unload(safe_merge=True)
    except Exception as error:  # Kinds of adapters raise whatever they met.
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise OSError(
            f"model: the adapter {adapter} cannot be added to the weights of its base model ({reason}); check that it "
            "was made for that one, or merge it yourself and save the whole model."
        ) from error
    return merged


def _class_of(model: str | os.PathLike[str], revision: str | None) -> Any:
    """The class that a checkpoint was saved from, where a family asks for that one; else its base model."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(model, revision=revision)
    names: list[str] = list(getattr(config, "architectures", None) or ())
    wanted = next((name for name in names if name in FAMILIES and hasattr(transformers, name)), None)
    if wanted is not None:
        return getattr(transformers, wanted)
    base = transformers.MODEL_MAPPING.get(type(config), None)
    if base is not None and not hasattr(base, str(TEXT.encode)) and writes_text(None, config):
        # Said before gigabytes of weights are read.
        raise TypeError(f"model: {generating(names[0])}")
    return transformers.AutoModel


def load_processor(source: Source, revision: str | None) -> Any:
    from transformers import AutoProcessor

    model = source.processor
    revision = source.revision if model == source.model else revision
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


def load_embedder(model: str | os.PathLike[str], revision: str | None) -> nn.Module:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            f"sentence_transformers: cannot be imported ({error}); install it with: pip install "
            "'captum_m2ib[sentence-transformers]'."
        ) from error
    _check_name(model)
    try:
        found: nn.Module = SentenceTransformer(os.fspath(model), revision=revision, device="cpu")
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise OSError(f"model: sentence-transformers cannot load {model}: {error}") from error
    return found


def load_open_clip(
    model: str, pretrained: str | None, options: dict[str, Any]
) -> tuple[nn.Module, TransformAndTokenizer]:
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(
            f"open_clip: cannot be imported ({error}); install it with: pip install 'captum_m2ib[open-clip]'."
        ) from error
    _check_open_clip_names(open_clip, model, pretrained)
    try:
        loaded, _, transform = open_clip.create_model_and_transforms(model, pretrained=pretrained, **options)
        tokenizer = open_clip.get_tokenizer(model)
    except (OSError, RuntimeError, ValueError) as error:
        raise OSError(f"model: open_clip cannot load {model} with weights {pretrained}: {error}") from error
    return loaded, TransformAndTokenizer(transform, tokenizer)


def _check_open_clip_names(open_clip: Any, model: str, pretrained: str | None) -> None:
    """Say what open_clip does not know; it would print a log, or all that it knows."""
    if ":" in model:
        return
    known = {name.replace("/", "-"): name for name in open_clip.list_models()}
    if model.replace("/", "-") not in known:
        raise OSError(f"model: open_clip knows no architecture {model}; {_close(model, known)}.")
    if pretrained is None or os.path.exists(pretrained):
        return
    tags = {tag.lower().replace("-", "_"): tag for tag in open_clip.list_pretrained_tags_by_model(known[model])}
    if pretrained.lower().replace("-", "_") not in tags:
        raise OSError(
            f"model: open_clip has no weights {pretrained} of {model}, and there is no such file; "
            f"{_close(pretrained, tags)}."
        )


def _close(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), 4, 0.3)
    return f"near matches: {', '.join(found)}" if found else "it has none of a similar name"


def find_statistics(model: str | os.PathLike[str], revision: str | None) -> dict[str, ChannelStatistics]:
    found = _find_file(model, STATISTICS_FILE, revision)
    return load_statistics(found) if found else {}


def _read_json(model: str | os.PathLike[str], name: str, revision: str | None) -> Any:
    """What a file of a checkpoint holds, or None where there is no such file."""
    found = _find_file(model, name, revision)
    if found is None:
        return None
    try:
        return json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"model: {name} of {model} is no JSON ({error}); fetch or save it again.") from error


def _find_file(model: str | os.PathLike[str], name: str, revision: str | None) -> str | None:
    if Path(model).is_dir():
        path = Path(model) / name
        return os.fspath(path) if path.is_file() else None
    from transformers.utils import cached_file

    found: str | None = cached_file(
        model,
        name,
        revision=revision,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return found
