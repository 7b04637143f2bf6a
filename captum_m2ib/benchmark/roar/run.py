"""Remove and retrain on scenes: does the compact dual encoder forget how to match pictures with captions, when what a
map calls relevant is replaced in the pairs that it is fine-tuned on?

For every method, share and seed the model that was explained is fine-tuned with CLIP's loss on training pairs whose
most relevant patches, or words, are replaced. :func:`captum_m2ib.metrics.roar_plus` then measures the loss on intact
held-out pairs, :func:`captum_m2ib.metrics.roar` the retrieval on held-out pairs replaced in the same way. Both read
the same fits. A picture is ranked by the patches of the model, whose side is that of the squares that are replaced, so
that the random ranking hides as much of an object at a time as any map does.

ROAR as published trains from nothing. Here it starts from the trained model, which takes seconds instead of three
quarters of an hour, and so measures what fine-tuning cannot win back.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_m2ib.benchmark.methods import FAMILIES, Method
from captum_m2ib.benchmark.methods import METHODS as COMPARED
from captum_m2ib.benchmark.roar.report import Results, draw, write_table
from captum_m2ib.benchmark.store import write_atomically
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.metrics import RetrainTable, roar, roar_plus
from captum_m2ib.metrics.retrain_table import RANDOM
from captum_m2ib.scenes import Scene
from captum_m2ib.scenes.drawing import draw_scenes, generator
from captum_m2ib.scenes.model import embed_images, embed_texts
from captum_m2ib.scenes.training import contrastive_loss

TRUTH = "truth"
"""The map that is 1 on the objects, or words, that the caption and the picture share: no method, but what one is
compared with."""

METHODS = {
    **COMPARED,
    "relevance-all-blocks": Method("relevance-all-blocks", FAMILIES["relevance"], ({"layer": 0}, {"layer": 0})),
}
"""What can be asked for, beside the methods of every benchmark: attention relevance rolled out over all blocks."""

MODALITIES = ("image", "text")

_DRAWN_AT_ONCE = 64
_EXPLAINED_AT_ONCE = 64
_RETRIEVED_AMONG = 64


@dataclass(frozen=True)
class Settings:
    r"""What is measured.

    Attributes:

        methods (tuple[str, ...]): Of :data:`METHODS`; ``"truth"`` and ``"random"`` are
            always there.
        fractions (tuple[float, ...]): Shares of the patches, and of the words, that are replaced.
        seeds (int): Fits of each; they are numbered from 1.
        training (int): Pairs that the model is fine-tuned on.
        held_out (int): Pairs that it is measured on.
        scenes (int): Which pairs these are.
        epochs (int): How often a fit sees each training pair.
        batch_size (int): Training pairs of an update.
        lr (float): Rate of AdamW, constant.
    """

    methods: tuple[str, ...] = ("m2ib", "m2ib-published", "relevance-all-blocks", "grad-eclip")
    fractions: tuple[float, ...] = (0.1, 0.2, 0.3)
    seeds: int = 5
    training: int = 1024
    held_out: int = 256
    scenes: int = 0
    epochs: int = 2
    batch_size: int = 64
    lr: float = 3e-4

    def __post_init__(self) -> None:
        unknown = [name for name in self.methods if name not in METHODS or name == RANDOM]
        if unknown or len(set(self.methods)) != len(self.methods):
            known = ", ".join(name for name in METHODS if name != RANDOM)
            raise ValueError(f"methods: expected different ones of {known}, got {', '.join(self.methods)}.")
        if not self.fractions or not all(0 < share <= 1 for share in self.fractions):
            raise ValueError(f"fractions: expected shares above 0 and at most 1, got {list(self.fractions)}.")
        least = {"seeds": 2, "training": 2, "held_out": 2, "scenes": 0, "epochs": 1, "batch_size": 2}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}: expected {bound} or more, got {getattr(self, name)}.")
        if not self.lr > 0:
            raise ValueError(f"lr: expected a rate above 0, got {self.lr}.")


QUICK = Settings(("m2ib", "grad-eclip"), (0.2,), seeds=2, training=192, held_out=64)
"""A run of a minute or two that shows how it goes; its intervals are too wide to say anything."""


class FineTuning:
    r"""A model fine-tuned on pairs; the model given is left as it is.

    A seed decides the order of the pairs and nothing else, so fits of one seed see the same pairs in the same batches,
    whatever is replaced in them. The fit of a seed to given pairs is kept until :meth:`forget`, so that two protocols
    can share it.

    Args:

        model (transformers.CLIPModel): The compact dual encoder.
        settings (Settings): Epochs, batches and rate.
        on_fit (Callable, optional): Called after every fit. Default: None
    """

    def __init__(self, model: Any, settings: Settings, on_fit: Callable[[], Any] | None = None) -> None:
        self.model, self.settings, self.on_fit = model, settings, on_fit
        self._kept: dict[str, Any] = {}

    def __call__(self, train: tuple[Tensor, ...], seed: int) -> Any:
        key = digest([*train, torch.tensor(seed)])
        if key not in self._kept:
            self._kept[key] = self._fit(train, seed)
            if self.on_fit is not None:
                self.on_fit()
        return self._kept[key]

    def forget(self) -> None:
        self._kept.clear()

    def _fit(self, train: tuple[Tensor, ...], seed: int) -> Any:
        pixels, ids = train
        model = copy.deepcopy(self.model).requires_grad_(True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.settings.lr, weight_decay=0.0)
        for rows in batches(len(pixels), self.settings.batch_size, self.settings.epochs, seed):
            loss = contrastive_loss(embed_images(model, pixels[rows]), embed_texts(model, ids[rows]), model.logit_scale)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return model.requires_grad_(False)


def batches(pairs: int, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Rows of each update: every epoch in a new order, without the last batch if it is smaller than the rest."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        parts = torch.randperm(pairs, generator=random).split(size)
        yield from parts if len(parts) == 1 or len(parts[-1]) == size else parts[:-1]


@torch.no_grad()
def held_out_loss(model: Any, test: tuple[Tensor, ...]) -> float:
    """CLIP's loss among all held-out pairs, in nats."""
    return float(contrastive_loss(embed_images(model, test[0]), embed_texts(model, test[1]), model.logit_scale))


@torch.no_grad()
def retrieval(model: Any, test: tuple[Tensor, ...]) -> float:
    """How often a picture finds its own caption among those of 64 pairs; in the last set among those that are left."""
    pictures, captions = embed_images(model, test[0]), embed_texts(model, test[1])
    sets = zip(pictures.split(_RETRIEVED_AMONG), captions.split(_RETRIEVED_AMONG), strict=True)
    # A caption that scores as high as the right one counts against it: replaced captions may be equal.
    found = [((scores := a @ b.T) >= scores.diagonal()[:, None]).sum(1) == 1 for a, b in sets]
    return float(torch.cat(found).double().mean())


def run(
    encoder: DualEncoder, output: str | os.PathLike[str], settings: Settings | None = None, show_progress: bool = False
) -> Results:
    r"""Measure ROAR and ROAR+ of every method, for both modalities, and write what is found.

    Args:

        encoder (DualEncoder): The compact dual encoder, on the CPU.
        output (str or PathLike): Folder for maps, cells, ``roar.csv`` and ``roar.png``. Finished maps and cells are
                    read back, so an interrupted run goes on; other methods, shares and seeds only add to it.
        settings (Settings, optional): Default: None (those of the documentation)
        show_progress (bool, optional): Show progress bars. Default: False

    Returns:
        dict: (modality, protocol) to its :class:`captum_m2ib.metrics.RetrainTable`.

    Raises:
        ValueError: if the folder holds a run with other scenes, another model or other fits.
    """
    from tqdm.auto import tqdm

    given, folder = settings or Settings(), Path(output)
    _check_folder(folder, given, encoder)
    study = _Study(encoder, folder, given, show_progress)
    units = [(name, method, share) for name in MODALITIES for method in study.maps for share in given.fractions]
    fits = 0
    with tqdm(units, desc="Fits", disable=not show_progress) as bar:

        def count() -> None:
            nonlocal fits
            fits += 1
            bar.set_postfix(fits=fits)

        study.fit.on_fit = count
        # The smallest parts first: what both protocols fit alike is kept in memory for one part only.
        for modality, method, share in bar:
            study.measure(modality, [method], [share])
            study.fit.forget()
    results = {key: table for name in MODALITIES for key, table in study.measure(name, study.maps, given.fractions)}
    write_table(folder / "roar.csv", results)
    draw(results).savefig(folder / "roar.png")
    return results


def draw_pairs(count: int, seed: int, side: int) -> list[Scene]:
    """Scenes with their captions; the first of a seed are the same however many are asked for."""
    blocks = range(-(-count // _DRAWN_AT_ONCE))
    scenes = [draw_scenes(generator("scenes", seed, block), _DRAWN_AT_ONCE, side) for block in blocks]
    return [scene for block in scenes for scene in block][:count]


def true_maps(scenes: Sequence[Scene], length: int) -> tuple[Tensor, Tensor]:
    """Where what a caption names can be seen, (N, H, W), and which words name it, (N, length): 1 there, else 0."""
    pictures, captions = [], torch.zeros(len(scenes), length)
    for row, scene in zip(captions, scenes, strict=True):
        named = {index for index in scene.word_objects if index is not None}
        pictures.append(np.any(scene.masks[sorted(named)], axis=0))
        row[1 : 1 + len(scene.words)] = torch.tensor([float(index is not None) for index in scene.word_objects])
    return torch.from_numpy(np.stack(pictures)).float(), captions


def digest(tensors: Sequence[Tensor]) -> str:
    """A name for the contents of tensors."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


class _Study:
    """The pairs, every method's maps of them, and the protocols on both."""

    def __init__(self, encoder: DualEncoder, folder: Path, settings: Settings, show_progress: bool) -> None:
        self.folder, self.settings = folder, settings
        model: Any = encoder.model
        self.fit, vision = FineTuning(model, settings), model.config.vision_config
        scenes = draw_pairs(settings.training + settings.held_out, settings.scenes, vision.image_size)
        pairs = encoder.prepare([scene.image for scene in scenes], [scene.caption for scene in scenes])
        self.pairs, self.words = pairs.inputs, ~torch.tensor(pairs.special)
        self.blocks = (vision.patch_size, 1)
        self.fills: tuple[Any, Any] = ("mean", encoder.processor.tokenizer.pad_token_id)
        self.maps: dict[str, tuple[Tensor, Tensor]] = {TRUTH: true_maps(scenes, pairs.inputs[1].shape[1])}
        for name in settings.methods:
            given = (*pairs.inputs, *pairs.additional_forward_args)
            self.maps[name] = _maps(encoder, name, given, folder / "maps", show_progress)

    def measure(
        self, modality: str, methods: Sequence[str] | Mapping[str, Any], fractions: Sequence[float]
    ) -> list[tuple[tuple[str, str], RetrainTable]]:
        """Both protocols' tables, by modality and protocol."""
        index, cut = MODALITIES.index(modality), self.settings.training
        train, test = (tuple(tensor[part] for tensor in self.pairs) for part in (slice(cut), slice(cut, None)))
        split = {name: (self.maps[name][index][:cut], self.maps[name][index][cut:]) for name in methods}
        words = None if index == 0 else (self.words[:cut], self.words[cut:])
        options: dict[str, Any] = {
            "modality": index,
            "fill": self.fills[index],
            "block": self.blocks[index],
            "fractions": tuple(fractions),
            "seeds": tuple(range(1, self.settings.seeds + 1)),
        }
        plus = roar_plus(
            self.fit,
            held_out_loss,
            train,
            test,
            {name: maps[0] for name, maps in split.items()},
            maskable=words and words[0],
            path=self.folder / f"{modality}-roar-plus.json",
            **options,
        )
        both = roar(
            self.fit,
            retrieval,
            train,
            test,
            split,
            maskable=words,
            path=self.folder / f"{modality}-roar.json",
            **options,
        )
        return [((modality, table.protocol), table) for table in (plus, both)]


def _maps(
    encoder: DualEncoder, name: str, given: tuple[Tensor, ...], folder: Path, show_progress: bool
) -> tuple[Tensor, Tensor]:
    """A method's maps of all pairs, (N, H, W) and (N, L), made or read back part by part."""
    from tqdm.auto import tqdm

    folder.mkdir(parents=True, exist_ok=True)
    method: Any = METHODS[name](encoder)
    # A method that is tuned anew must not be given its former maps.
    settings = f"{name}-{hashlib.sha256(repr(METHODS[name].settings).encode()).hexdigest()[:8]}"
    parts = []
    starts = range(0, len(given[0]), _EXPLAINED_AT_ONCE)
    for start in tqdm(starts, desc=f"Maps of {name}", unit="batch", disable=not show_progress):
        rows = slice(start, min(start + _EXPLAINED_AT_ONCE, len(given[0])))
        path = folder / f"{settings}-{rows.start}-{rows.stop}.npz"
        if not path.exists():
            pixels, ids, *additional = (tensor[rows] for tensor in given)
            image, text = method.attribute((pixels, ids), additional_forward_args=tuple(additional) or None)
            unfinished = path.with_suffix(".part")
            with unfinished.open("wb") as file:
                np.savez_compressed(file, image=image.sum(1).float().cpu().numpy(), text=text.float().cpu().numpy())
            os.replace(unfinished, path)
        with np.load(path, allow_pickle=False) as kept:
            parts.append((torch.from_numpy(kept["image"]), torch.from_numpy(kept["text"])))
    image, text = (torch.cat(column) for column in zip(*parts, strict=True))
    return image, text


def _check_folder(folder: Path, settings: Settings, encoder: DualEncoder) -> None:
    """Cells and maps know their pairs, but neither the model nor how it is fitted: these are kept beside them."""
    chosen = {name: value for name, value in asdict(settings).items() if name not in ("methods", "fractions", "seeds")}
    chosen["model"] = digest(list(encoder.model.state_dict().values()))
    path = folder / "settings.json"
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if changed := sorted(name for name in chosen if kept.get(name) != chosen[name]):
            raise ValueError(
                f"output: {folder} holds a run with another {', '.join(changed)}; choose another folder, or the same "
                "settings to go on."
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(chosen, indent=1) + "\n")
