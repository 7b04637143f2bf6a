"""Training of the compact dual encoder on scenes drawn afresh at every step, and its held-out report.

The main loss is CLIP's: with unit embeddings ``u`` of the pictures and ``v`` of their captions and a learned
temperature ``t``, the mean of the cross entropies of ``u v^T / t`` along its rows and along its columns,
against the diagonal. Beside it stands :func:`naming_loss`, which contrasts every picture with a caption for
every kind of object, so that the model learns to name one object among others. Batch ``i`` is determined by
the seed and ``i`` alone, the rate by the step alone, so an interrupted run that resumes ends where an
uninterrupted one ends.

    captum-m2ib train-scenes --output checkpoint
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from captum_m2ib.scenes.captions import name_kinds
from captum_m2ib.scenes.drawing import draw_batch, generator
from captum_m2ib.scenes.evaluation import evaluate_naming, evaluate_retrieval
from captum_m2ib.scenes.grounds import GROUNDS, TEXTURED
from captum_m2ib.scenes.model import (
    build_model,
    build_tokenizer,
    embed_images,
    embed_texts,
    image_side,
    normalize_images,
    save_checkpoint,
    tokenize,
)
from captum_m2ib.scenes.state import load_state, save_state

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import CLIPModel

_MAX_LOGIT_SCALE = math.log(100)
_READ_EVERY = 50
# Validation scenes from this index on serve the statistics; those before it the progress bar.
_STATISTICS_INDEX = 1000
_STATISTICS_LAYERS = re.compile(r"(vision|text)_model\.(embeddings|pre_layrnorm|encoder\.layers\.\d+)")


def train(
    output: str | os.PathLike[str],
    *,
    steps: int = 4000,
    batch_size: int = 128,
    lr: float = 2e-3,
    muon_lr: float = 8e-3,
    weight_decay: float = 0.1,
    warmup_steps: int = 200,
    clip_norm: float = 1.0,
    naming_weight: float = 1.0,
    model_options: Mapping[str, int] | None = None,
    seed: int = 0,
    ground: str = TEXTURED,
    device: str | torch.device | None = None,
    bf16: bool | None = None,
    compile: bool = False,
    workers: int | None = None,
    resume: bool = True,
    overwrite: bool = False,
    save_every: int = 100,
    evaluate_every: int = 500,
    report_sets: int = 8,
    report_trials: int = 2048,
    show_progress: bool = True,
) -> dict[str, Any]:
    r"""Trains the compact dual encoder and writes it as a checkpoint directory with a ``report.json``.

    Every ``save_every`` steps the state of the training goes into ``<output>.training.safetensors`` beside
    the output; it is removed when the output is complete.

    Args:
        output (str or path): The checkpoint directory to write.
        steps (int): Number of updates. Default: 4000.
        batch_size (int): Scenes per update, at least 2. Default: 128.
        lr (float): Highest learning rate of AdamW, for embeddings, biases and norms: reached linearly, left
            along a cosine to 0. Default: 2e-3.
        muon_lr (float): The same of Muon, for the matrices of the blocks. Default: 8e-3.
        weight_decay (float): On matrices only. Default: 0.1.
        warmup_steps (int): Updates until the highest rate. Default: 200.
        clip_norm (float): Largest norm of the gradient. Default: 1.
        naming_weight (float): Weight of ``naming_loss`` beside CLIP's loss. Default: 1.
        model_options (Mapping[str, int], optional): Sizes, as arguments of
            :func:`captum_m2ib.scenes.build_model`. Default: None (as for the shipped model).
        seed (int): Seed of the weights and of the scenes. Default: 0.
        ground (str): What the objects of the scenes lie on, one of ``captum_m2ib.scenes.GROUNDS``. Default:
            ``"textured"``.
        device (str or torch.device, optional): Default: CUDA where there is one, else the CPU.
        bf16 (bool, optional): Compute in bfloat16 (autocast); CUDA only. Default: on CUDA yes.
        compile (bool): Compile the image tower; CUDA only. Default: False.
        workers (int, optional): Processes that draw scenes; 0 draws in this one. Default: 1 on the CPU, up to
            8 on CUDA.
        resume (bool): Go on from the saved state if there is one. Default: True.
        overwrite (bool): Replace an output that is already there. Default: False.
        save_every (int): Updates between saved states. Default: 100.
        evaluate_every (int): Updates between the retrieval figures in the progress bar. Default: 500.
        report_sets (int): Sets of 256 held-out pairs in the report. Default: 8.
        report_trials (int): Naming trials in the report. Default: 2048.
        show_progress (bool): Show a progress bar and print the report. Default: True.

    Returns:
        dict[str, Any]: What ``report.json`` holds: ``retrieval`` (see :func:`evaluate_retrieval`) and
        ``naming`` (see :func:`evaluate_naming`), both measured with the float16 weights as written, ``loss``,
        ``settings``, ``seconds``, ``device`` and ``versions``.

    Raises:
        FileExistsError: If ``output`` is there and ``overwrite`` is False.
        FloatingPointError: If the loss is not finite.
        ValueError: If a number is out of range, or a saved state was made with other settings.
    """
    target, place = Path(output), _device(device)
    _check_counts(
        seed=(seed, 0),
        steps=(steps, 1),
        batch_size=(batch_size, 2),
        warmup_steps=(warmup_steps, 0),
        save_every=(save_every, 1),
        evaluate_every=(evaluate_every, 1),
        report_sets=(report_sets, 1),
        report_trials=(report_trials, 1),
    )
    if ground not in GROUNDS:
        raise ValueError(f"ground: expected one of {', '.join(GROUNDS)}, got {ground!r}; choose one of these.")
    if place.type != "cuda" and (bf16 or compile):
        raise ValueError(
            f"bf16, compile: expected False on {place}, got {bf16} and {compile}; both need device='cuda'."
        )
    if target.exists() and not overwrite:
        raise FileExistsError(
            f"output: expected a path that does not exist, got {str(target)!r}; choose another or pass overwrite=True."
        )
    settings: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "muon_lr": muon_lr,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
        "clip_norm": clip_norm,
        "naming_weight": naming_weight,
        "model_options": dict(model_options or {}),
        "seed": seed,
        "ground": ground,
        "bf16": place.type == "cuda" if bf16 is None else bf16,
    }
    began = time.monotonic()
    model: Any = build_model(seed=seed, **settings["model_options"])
    model.to(place)
    optimizers = optimizers_of(list(model.named_parameters()), lr, muon_lr, weight_decay)
    state = target.with_name(target.name + ".training.safetensors")
    progress: dict[str, Any] = {"step": 0, "seconds": 0.0}
    if resume and state.exists():
        progress = load_state(state, model, optimizers, settings)
    if compile:
        model.vision_model.compile()

    losses = _Losses(progress.get("loss"))
    batches = _batches(settings, image_side(model), progress["step"], place, workers)
    bar = _progress_bar(steps, progress["step"], show_progress)
    with bar:
        for step, batch in enumerate(batches, start=progress["step"]):
            set_rate(optimizers, rate_at(step, steps, warmup_steps))
            images, input_ids, name_ids, kinds = (part.to(place, non_blocking=True) for part in batch)
            with torch.autocast(place.type, torch.bfloat16, enabled=settings["bf16"]):
                image_embeddings = embed_images(model, normalize_images(images))
                text_embeddings = embed_texts(model, input_ids)
                name_embeddings = embed_texts(model, name_ids)
            image_embeddings = image_embeddings.float()
            loss = contrastive_loss(image_embeddings, text_embeddings.float(), model.logit_scale)
            if naming_weight:
                names = naming_loss(image_embeddings, name_embeddings.float(), kinds, model.logit_scale)
                loss = loss + naming_weight * names
            model.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            for optimizer in optimizers:
                optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, _MAX_LOGIT_SCALE)
            losses.add(loss.detach())
            done = step + 1
            saving = done % save_every == 0 and done < steps
            # Only here does the host wait for the device.
            if done % _READ_EVERY == 0 or done == steps or saving:
                bar.set_postfix(losses.read(done), refresh=False)
            if show_progress and (done % evaluate_every == 0 or done == steps):
                held_out = evaluate_retrieval(model, sets=1, seed=seed, purpose="validation", ground=ground)
                losses.shown.update(top1=f"{held_out['top1']:.3f}")
                bar.set_postfix(losses.shown, refresh=False)
            if saving:
                seconds = progress["seconds"] + time.monotonic() - began
                save_state(
                    state,
                    model,
                    optimizers,
                    {"step": done, "seconds": seconds, "loss": losses.mean},
                    settings,
                )
            bar.update()

    _round_to_half(model)
    report = {
        "retrieval": evaluate_retrieval(model, sets=report_sets, seed=seed, ground=ground),
        "naming": evaluate_naming(model, report_trials, seed, ground),
        "loss": losses.mean,
        "settings": settings,
        "seconds": round(progress["seconds"] + time.monotonic() - began, 1),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else place.type,
        "versions": _versions(),
    }
    _write_output(model, report, target)
    state.unlink(missing_ok=True)
    if show_progress:
        print(_readable(report))
    return report


def contrastive_loss(
    image_embeddings: torch.Tensor, text_embeddings: torch.Tensor, logit_scale: torch.Tensor
) -> torch.Tensor:
    """CLIP's symmetric loss.

    Args:
        image_embeddings (torch.Tensor): Unit vectors, (N, D).
        text_embeddings (torch.Tensor): Unit vectors, (N, D); row i belongs to picture i.
        logit_scale (torch.Tensor): Logarithm of the inverse temperature, a scalar.

    Returns:
        torch.Tensor: The loss in nats, a scalar; log N when nothing is known.
    """
    logits = logit_scale.exp() * image_embeddings @ text_embeddings.T
    labels = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)) / 2


def naming_loss(
    image_embeddings: torch.Tensor,
    name_embeddings: torch.Tensor,
    kinds: torch.Tensor,
    logit_scale: torch.Tensor,
) -> torch.Tensor:
    """The contrastive loss of captions that name one kind of object, each true of any number of pictures.

    Every true pair of picture and kind competes with the kinds that the picture lacks, and with the pictures
    that lack the kind; other true pairs are left out, as neither is wrong.

    Args:
        image_embeddings (torch.Tensor): Unit vectors, (N, D).
        name_embeddings (torch.Tensor): Unit vectors, (K, D); row k belongs to a caption that names kind k.
        kinds (torch.Tensor): Which kinds each picture contains, bool (N, K).
        logit_scale (torch.Tensor): Logarithm of the inverse temperature, a scalar.

    Returns:
        torch.Tensor: The loss in nats, a scalar.
    """
    return true_pairs_loss(logit_scale.exp() * image_embeddings @ name_embeddings.T, kinds)


def true_pairs_loss(logits: torch.Tensor, is_true: torch.Tensor) -> torch.Tensor:
    """The contrastive loss where any number of captions are true of a picture: each true pair against wrong ones.

    Args:
        logits (torch.Tensor): Of every picture and every caption, (N, K).
        is_true (torch.Tensor): Which belong together, bool (N, K).

    Returns:
        torch.Tensor: The loss in nats, a scalar.
    """
    wrong = logits.masked_fill(is_true, -torch.inf)
    among_captions = functional.softplus(wrong.logsumexp(dim=1, keepdim=True) - logits)
    among_images = functional.softplus(wrong.logsumexp(dim=0, keepdim=True) - logits)
    return ((among_captions + among_images) * is_true).sum() / (2 * is_true.sum())


class _Steps(Dataset[tuple[torch.Tensor, ...]]):
    """Item i is the batch of step i.

    Pictures, uint8 (N, H, W, 3); token ids of their captions, int64 (N, longest); token ids of a caption for
    each kind of object, int64 (K, longest); which kinds each picture contains, bool (N, K).
    """

    def __init__(self, settings: Mapping[str, Any], image_size: int, tokenizer: Tokenizer) -> None:
        self.settings, self.image_size, self.tokenizer = settings, image_size, tokenizer

    def __len__(self) -> int:
        return self.settings["steps"]

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        seed = self.settings["seed"]
        images, captions, kinds = draw_batch(
            self.settings["batch_size"],
            seed,
            self.image_size,
            purpose="training",
            index=step,
            ground=self.settings["ground"],
        )
        names = name_kinds(generator("naming", seed, step))
        return (
            torch.from_numpy(images),
            tokenize(self.tokenizer, captions),
            tokenize(self.tokenizer, names),
            torch.from_numpy(kinds),
        )


class _Losses:
    """Sums losses where they are, and moves them to the host only when read."""

    def __init__(self, mean: float | None) -> None:
        self.mean, self.shown = mean, dict[str, str]()
        self._total: torch.Tensor | None = None
        self._count = 0

    def add(self, loss: torch.Tensor) -> None:
        self._total = loss if self._total is None else self._total + loss
        self._count += 1

    def read(self, step: int) -> dict[str, str]:
        """The mean since the last reading, for the progress bar."""
        if self._total is not None:
            self.mean = float(self._total) / self._count
            if not math.isfinite(self.mean):
                raise FloatingPointError(
                    f"lr: expected training to stay finite, got a loss of {self.mean} at step {step}; "
                    "pass a lower lr, a longer warm-up, or resume=False if it began from a saved state."
                )
        self._total, self._count = None, 0
        self.shown.update(loss=f"{self.mean:.3f}")
        return self.shown


def _batches(
    settings: Mapping[str, Any], image_size: int, start: int, device: torch.device, workers: int | None
) -> DataLoader:
    if workers is None:
        spare = max(1, (os.cpu_count() or 1) - 1)
        workers = min(8, spare) if device.type == "cuda" else 1
    _check_counts(workers=(workers, 0))
    return DataLoader(
        _Steps(settings, image_size, build_tokenizer()),
        batch_size=None,
        sampler=range(start, settings["steps"]),
        num_workers=workers,
        pin_memory=device.type == "cuda",
    )


def optimizers_of(
    named: Sequence[tuple[str, torch.nn.Parameter]], lr: float, muon_lr: float, weight_decay: float
) -> tuple[torch.optim.Optimizer, ...]:
    """Muon for the matrices that map activations to activations, AdamW for everything else.

    Args:
        named (sequence): Names and parameters; what is called after an embedding is none of those matrices.
        lr (float): Of AdamW.
        muon_lr (float): Of Muon.
        weight_decay (float): On matrices and tables only.

    Returns:
        tuple[torch.optim.Optimizer, ...]: Both.

    Raises:
        RuntimeError: If this torch has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"torch: training the compact model needs torch 2.9 or newer (torch.optim.Muon), got {torch.__version__}; "
            "the shipped checkpoint needs no training."
        )
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
    tables = [p for name, p in named if p.ndim > 2 or (p.ndim == 2 and "embed" in name)]
    vectors = [p for _, p in named if p.ndim < 2]
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return (
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98)),
    )


def set_rate(optimizers: Sequence[torch.optim.Optimizer], share: float) -> None:
    """Sets learning rates to a share of the highest."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * share


def rate_at(step: int, steps: int, warmup_steps: int) -> float:
    """Share of the highest learning rate at an update, counted from 0."""
    warmup_steps = min(warmup_steps, steps // 2)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps)))


def write_statistics(
    directory: str | os.PathLike[str], seed: int = 0, scenes: int = 2048, ground: str = TEXTURED
) -> None:
    """Estimates the statistics that the standardised prior needs, and adds them to a checkpoint directory.

    Args:
        directory (str or path): A checkpoint of the compact dual encoder.
        seed (int): Which validation scenes. Default: 0.
        scenes (int): How many, a multiple of 64. Default: 2048.
        ground (str): What their objects lie on. Default: ``"textured"``.
    """
    from captum_m2ib.encoders.checkpoints import STATISTICS_FILE
    from captum_m2ib.encoders.dual_encoder import DualEncoder
    from captum_m2ib.engine.statistics import estimate_statistics, save_statistics

    encoder = DualEncoder.from_pretrained(directory)
    size = encoder.processor.image_processor.size["height"]
    batches = (
        draw_batch(64, seed, size, purpose="validation", index=_STATISTICS_INDEX + i, ground=ground)
        for i in range(scenes // 64)
    )
    pairs = (encoder.prepare(list(batch.images), batch.captions) for batch in batches)
    names = [name for name, _ in encoder.model.named_modules() if _STATISTICS_LAYERS.fullmatch(name)]
    save_statistics(Path(directory) / STATISTICS_FILE, estimate_statistics(encoder, names, pairs))


def _write_output(model: CLIPModel, report: Mapping[str, Any], target: Path) -> None:
    """Writes a directory beside the target and moves it into place when it is complete."""
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save_checkpoint(model, partial)
    settings = report["settings"]
    write_statistics(partial, settings["seed"], 256 * report["retrieval"]["sets"], settings["ground"])
    (partial / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if target.exists():
        replaced = target.with_name(target.name + ".replaced")
        os.replace(target, replaced)
        os.replace(partial, target)
        shutil.rmtree(replaced)
    else:
        os.replace(partial, target)


@torch.no_grad()
def _round_to_half(model: CLIPModel) -> None:
    for parameter in model.parameters():
        parameter.copy_(parameter.half())


def _progress_bar(steps: int, start: int, show_progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=steps, initial=start, desc="training", unit="step", mininterval=2, disable=not show_progress)


def _device(device: str | torch.device | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _check_counts(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}; raise it.")


def _versions() -> dict[str, str]:
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}


def _readable(report: Mapping[str, Any]) -> str:
    retrieval, naming = report["retrieval"], report["naming"]
    return (
        f"held-out retrieval among {retrieval['size']} captions, {retrieval['sets']} sets: "
        f"top-1 {retrieval['top1']:.3f} +- {retrieval['top1_std']:.3f}, "
        f"top-5 {retrieval['top5']:.3f} +- {retrieval['top5_std']:.3f}\n"
        f"naming, one of 8 captions, {naming['n']} trials: "
        f"{naming['accuracy']:.3f} +- {naming['standard_error']:.3f}"
    )
