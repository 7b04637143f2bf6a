"""Attributions to tokens as records for ``captum.attr.visualization.visualize_text``."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_m2ib.explanations.visualization import clean_token

if TYPE_CHECKING:
    from captum.attr._utils.visualization import VisualizationDataRecord


def text_records(
    tokens: Sequence[Sequence[str]],
    attributions: Tensor,
    scores: Tensor | Sequence[float],
    real: Tensor | None = None,
    unit: str = "bits",
) -> list[VisualizationDataRecord]:
    r"""Records for Captum's ``visualize_text``, one per pair, safe to show whatever the captions hold.

    Captum puts tokens into HTML as they are and colours values from -1 to 1. Here tokens are cleaned of their
    tokenizer's marks and escaped, padding is dropped, and a caption's attributions are divided by their largest
    magnitude; the record's ``attr_score`` is their sum as it was. In the table "Predicted Label" holds the pair's
    score and "Attribution Label" the unit.

    Args:

        tokens (sequence of sequences of str): Per pair, its tokens, such as ``pairs.tokens``.
        attributions (Tensor): One number per token, (N, L), of either sign.
        scores (Tensor or sequence of float): The pairs' scores, (N,).
        real (Tensor, optional): Which tokens are real, (N, L) boolean, such as ``encoder.real_tokens(pairs)``.
                    Default: None (all)
        unit (str, optional): What the attributions are measured in. Default: "bits"

    Returns:
        list[VisualizationDataRecord]: in the order of the pairs.

    Raises:
        ValueError: if the shapes do not fit, or attributions hold NaN or infinity.

    Examples::

        >>> scores = encoder(*pairs.inputs, *pairs.additional_forward_args)
        >>> records = text_records(pairs.tokens, token_bits, scores, encoder.real_tokens(pairs))
        >>> records[0].raw_input_ids  # for captum.attr.visualization.visualize_text(records)
        ['[start]', 'a', 'white', 'square', '[end]']
    """
    from captum.attr import visualization

    values, totals = attributions.detach().double().cpu(), torch.as_tensor(scores).detach().flatten().tolist()
    shape = (len(tokens), max(map(len, tokens), default=0))
    if values.shape != shape or len(totals) != len(tokens) or any(len(row) != shape[1] for row in tokens):
        raise ValueError(
            f"attributions: expected one number per token, {shape}, and one score per caption, got "
            f"{tuple(values.shape)} and {len(totals)} scores; sum embeddings' attributions over channels first."
        )
    kept = torch.ones(shape, dtype=torch.bool) if real is None else real.detach().cpu().bool()
    if kept.shape != shape:
        raise ValueError(f"real: expected which tokens are real, {shape}, got {tuple(kept.shape)}.")
    if not bool(values.isfinite().all()):
        raise ValueError("attributions: expected finite numbers, got NaN or infinity.")
    records = []
    for row, value, score, keep in zip(tokens, values, totals, kept, strict=True):
        shown = value[keep]
        largest = float(shown.abs().max()) if len(shown) else 0.0
        scaled = shown / largest if largest > 0 else torch.zeros_like(shown)
        words = [html.escape(clean_token(token)) for token, shows in zip(row, keep, strict=True) if shows]
        records.append(
            visualization.VisualizationDataRecord(
                word_attributions=scaled,
                pred_prob=score,
                pred_class="score",
                true_class="",
                attr_class=html.escape(unit),
                attr_score=float(shown.sum()),
                raw_input_ids=words,
                convergence_score=float("nan"),
            )
        )
    return records
