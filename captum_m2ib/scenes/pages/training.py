"""Training of the compact late-interaction model on pages drawn afresh at every step.

First its image tower learns to read, as the tower of a real one does before it learns to retrieve: a linear head, which
is thrown away, says of each patch what stands there. Then, at each step, every kind of item is asked for by one query,
and each page is held against all of them: with the MaxSim score :math:`s` and a learned scale, every page and query
that belong together compete with the queries of what the page lacks, and with the pages that lack what the query names
(:func:`captum_m2ib.scenes.training.true_pairs_loss`).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from captum_m2ib.encoders.scores import MaxSim
from captum_m2ib.scenes.drawing import generator
from captum_m2ib.scenes.pages.drawing import KINDS, SIDE, Page, draw_page, query_of
from captum_m2ib.scenes.pages.model import PATCH, build_page_model, build_page_processor, page_values, save_page_model
from captum_m2ib.scenes.training import optimizers_of, rate_at, set_rate, true_pairs_loss

_HELD_OUT = 512
_LEAST_COVERED = 0.25


def train_pages(
    output: str | os.PathLike[str],
    *,
    reading_steps: int = 500,
    steps: int = 1500,
    batch_size: int = 48,
    lr: float = 2e-3,
    muon_lr: float = 8e-3,
    weight_decay: float = 0.05,
    warmup_steps: int = 100,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[str, Any]:
    r"""Trains the compact late-interaction model and writes it as a checkpoint directory with a ``report.json``.

    Args:
        output (str or path): The checkpoint directory to write; must not exist.
        reading_steps (int): Updates of the image tower alone, while it learns to read. Default: 500.
        steps (int): Updates after that, of the whole model. Default: 1500.
        batch_size (int): Pages per update. Default: 48.
        lr (float): Highest learning rate of AdamW, reached linearly, left along a cosine to 0. Default: 2e-3.
        muon_lr (float): The same of Muon, for the matrices of the blocks. Default: 8e-3.
        weight_decay (float): On matrices only. Default: 0.05.
        warmup_steps (int): Updates until the highest rate. Default: 100.
        seed (int): Seed of the weights and of the pages. Default: 0.
        show_progress (bool): Show a progress bar. Default: True.

    Returns:
        dict[str, Any]: What ``report.json`` holds: ``naming``, the share of held-out pages and queries where the page
        that holds what the query names is scored above one that does not; the last ``loss``; the settings.

    Raises:
        FileExistsError: If ``output`` is there.
        FloatingPointError: If the loss is not finite.
    """
    from tqdm import tqdm

    target = Path(output)
    if target.exists():
        raise FileExistsError(f"output: expected a path that does not exist, got {str(target)!r}; choose another.")
    began = time.monotonic()
    model, processor = build_page_model(seed=seed), build_page_processor()
    scale = torch.nn.Parameter(torch.tensor(0.0))
    _learn_to_read(model.vlm.vision_tower, reading_steps, batch_size, (lr, muon_lr, weight_decay), seed, show_progress)
    optimizers = optimizers_of([*model.named_parameters(), ("scale", scale)], lr, muon_lr, weight_decay)
    loss = torch.tensor(math.nan)
    bar = tqdm(range(steps), desc="training", unit="step", mininterval=2, disable=not show_progress)
    for step in bar:
        set_rate(optimizers, rate_at(step, steps, warmup_steps))
        pages = [draw_page(seed, step * batch_size + i) for i in range(batch_size)]
        rng = generator("naming", seed, step)
        scores = page_scores(model, processor, pages, [query_of(kind, rng) for kind in KINDS])
        loss = true_pairs_loss(scale.exp() * scores, torch.from_numpy(_named(pages)))
        _update(optimizers, loss, [*model.parameters(), scale])
        if step % 50 == 49:
            last = float(loss.detach())
            if not math.isfinite(last):
                raise FloatingPointError(f"lr: expected a finite loss, got {last} at step {step}; pass a lower lr.")
            bar.set_postfix(loss=f"{last:.3f}", refresh=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    report = {
        "naming": evaluate_pages(model.eval(), processor, seed),
        "loss": float(loss.detach()),
        "settings": {
            "reading_steps": reading_steps,
            "steps": steps,
            "batch_size": batch_size,
            "lr": lr,
            "muon_lr": muon_lr,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "seed": seed,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.monotonic() - began, 1),
    }
    save_page_model(model, target)
    (target / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def _learn_to_read(
    tower: Any, steps: int, batch_size: int, rates: tuple[float, float, float], seed: int, show_progress: bool
) -> None:
    """Train an image tower to say of each patch what stands there."""
    from tqdm import tqdm

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = torch.nn.Linear(tower.config.hidden_size, 1 + len(KINDS))
    named = [*tower.named_parameters(), ("head_embedding", head.weight), ("bias", head.bias)]
    optimizers = optimizers_of(named, *rates)
    # Most patches hold nothing.
    weights = torch.tensor([0.1] + [1.0] * len(KINDS))
    for step in tqdm(range(steps), desc="reading", unit="step", mininterval=2, disable=not show_progress):
        set_rate(optimizers, rate_at(step, steps, steps // 8))
        pages = [draw_page(seed, step * batch_size + i, "scenes") for i in range(batch_size)]
        hidden = tower(_values(pages)).last_hidden_state
        there = torch.from_numpy(np.stack([_kinds_of_patches(page) for page in pages]))
        loss = torch.nn.functional.cross_entropy(head(hidden).flatten(0, 1), there.flatten(), weights)
        _update(optimizers, loss, [parameter for _, parameter in named])


def _kinds_of_patches(page: Page) -> NDArray[np.int64]:
    """What stands at each patch: 0 for nothing, else one more than the index of its kind, (rows, columns)."""
    found = np.zeros((SIDE // PATCH, SIDE // PATCH), dtype=np.int64)
    for item in page.items:
        mask = page.mask(item.kind).reshape(SIDE // PATCH, PATCH, SIDE // PATCH, PATCH)
        found[mask.mean((1, 3)) > _LEAST_COVERED] = 1 + KINDS.index(item.kind)
    return found


def _update(
    optimizers: Sequence[torch.optim.Optimizer], loss: torch.Tensor, parameters: Sequence[torch.nn.Parameter]
) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for optimizer in optimizers:
        optimizer.step()


def _values(pages: Sequence[Page]) -> torch.Tensor:
    return page_values(torch.from_numpy(np.stack([np.asarray(page.picture) for page in pages])))


def page_scores(model: Any, processor: Any, pages: list[Page], queries: list[str]) -> torch.Tensor:
    """The MaxSim score of every page and every query, (pages, queries)."""
    values = _values(pages)
    prompt = processor.process_images([pages[0].picture])["input_ids"].expand(len(pages), -1)
    asked = processor.process_queries(queries)
    page = model(pixel_values=values, input_ids=prompt, token_type_ids=torch.zeros_like(prompt)).embeddings
    query = model(
        input_ids=asked["input_ids"],
        attention_mask=asked["attention_mask"],
        token_type_ids=torch.zeros_like(asked["input_ids"]),
    ).embeddings
    return MaxSim()(page.unsqueeze(1), query.unsqueeze(0))


@torch.no_grad()
def evaluate_pages(model: Any, processor: Any, seed: int) -> float:
    """How often a page that holds what a query names is scored above one that does not, over held-out pages."""
    pages = [draw_page(seed, index, "validation") for index in range(_HELD_OUT)]
    rng = generator("naming", seed, 10**6)
    queries = [query_of(kind, rng) for kind in KINDS]
    parts = [page_scores(model, processor, pages[start : start + 64], queries) for start in range(0, _HELD_OUT, 64)]
    scores, named = torch.cat(parts), torch.from_numpy(_named(pages))
    shares = [
        (scores[named[:, k], k].unsqueeze(1) > scores[~named[:, k], k].unsqueeze(0)).float().mean()
        for k in range(len(KINDS))
    ]
    return float(torch.stack(shares).mean())


def _named(pages: list[Page]) -> NDArray[np.bool_]:
    """Which kinds stand on each page, boolean, (pages, kinds)."""
    return np.array([[any(item.kind == kind for item in page.items) for kind in KINDS] for page in pages])
