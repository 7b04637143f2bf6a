"""What people wrap models in, of torch's own and of the structure of other packages'."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PeftModel(nn.Module):
    """Adapters of the PEFT package: they sit in the layers of the model inside, to which attributes go on."""

    def __init__(self, model: nn.Module, is_prompt_learning: bool = False) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.active_peft_config = SimpleNamespace(is_prompt_learning=is_prompt_learning)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)


class Normalize(nn.Module):
    pass


class Embedder(nn.Module):
    """The first part of a SentenceTransformer."""

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__()
        self.model, self.processor = model, processor


class PromptedReader(Embedder):
    """The same of newer versions, that reads pictures and texts as messages."""

    def __init__(self, model: nn.Module, processor: Any = None) -> None:
        super().__init__(model, processor)
        self.modality_config = {kind: {"method": "forward"} for kind in ("text", "image", "message")}

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        assert features["modality"] == "message"
        given = {name: value for name, value in features.items() if name not in ("modality", "task")}
        return {**features, "token_embeddings": self.model(**given).last_hidden_state}


class LastToken(nn.Module):
    """The embedding of the last real token."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        tokens, mask = features["token_embeddings"], features.get("attention_mask")
        last = torch.full((len(tokens),), -1) if mask is None else mask.shape[1] - 1 - mask.flip(1).argmax(1)
        return {**features, "sentence_embedding": tokens[torch.arange(len(tokens)), last]}


class SentenceTransformer(nn.Sequential):
    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        for module in self:
            features = module(features)
        return features


class AdaptedTable(nn.Module):
    """LoRA on a table: what the wrapper adds depends on the token."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.base_layer = table
        generator = torch.Generator().manual_seed(8)
        self.down = nn.Parameter(torch.randn(table.num_embeddings, 2, generator=generator, dtype=table.weight.dtype))
        self.up = nn.Parameter(torch.randn(2, table.embedding_dim, generator=generator, dtype=table.weight.dtype))

    def merged(self) -> Tensor:
        return self.base_layer.weight + self.down @ self.up

    def forward(self, ids: Tensor) -> Tensor:
        return self.base_layer(ids) + F.embedding(ids, self.down) @ self.up


class CopiedTable(AdaptedTable):
    """A table of which a trained copy is read, and the original kept."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__(table)
        self.trained = nn.ModuleDict({"default": copy.deepcopy(table)})
        self.trained["default"].weight.data = self.merged().detach()

    def forward(self, ids: Tensor) -> Tensor:
        return self.trained["default"](ids)


class MergedTable(AdaptedTable):
    """Single tokens trained: rows are looked up in weights that are made anew, and no module is called."""

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.merged())


def data_parallel_of_a_process(model: nn.Module) -> nn.Module:
    """DistributedDataParallel, its group of processes being this one."""
    import torch.distributed as distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    return nn.parallel.DistributedDataParallel(model)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "data_parallel": nn.DataParallel,
    "distributed": data_parallel_of_a_process,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "peft": PeftModel,
    "sentence_transformer": lambda model: SentenceTransformer(Embedder(model), Normalize()),
    "several": lambda model: torch.compile(nn.DataParallel(PeftModel(model)), backend="eager"),
}
TABLES = {"adapted": AdaptedTable, "copied": CopiedTable, "merged": MergedTable}
