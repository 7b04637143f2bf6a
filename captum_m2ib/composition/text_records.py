"""Attributions to tokens as records for ``captum.attr.visualization.visualize_text``."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from captum_m2ib.visualization import clean_token

if TYPE_CHECKING:
    from captum.attr._utils.visualization import VisualizationDataRecord


def text_records(
    tokens: Sequence[Sequence[str]],
    attributions: Tensor,
    scores: Tensor | Sequence[float],
    lengths: Sequence[int] | None = None,
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
        lengths (sequence of int, optional): How many tokens of each pair are real, such as
                    ``encoder.token_counts(pairs)``. Default: None (all)
        unit (str, optional): What the attributions are measured in. Default: "bits"

    Returns:
        list[VisualizationDataRecord]: in the order of the pairs.

    Raises:
        ValueError: if the shapes do not fit, or attributions hold NaN or infinity.

    Examples::

        >>> # input_ids (2, 12), token_bits (2, 12)
        >>> records = text_records(pairs.tokens, token_bits, scores, encoder.token_counts(pairs))
        >>> visualization.visualize_text(records)  # from captum.attr import visualization
    """
    from captum.attr import visualization

    counts = [len(row) for row in tokens] if lengths is None else list(lengths)
    values, totals = attributions.detach(), torch.as_tensor(scores).detach().flatten().tolist()
    fits = values.ndim == 2 and len(values) == len(tokens) == len(counts) == len(totals)
    if not fits or any(count > min(len(row), values.shape[1]) for row, count in zip(tokens, counts, strict=True)):
        raise ValueError(
            f"attributions: expected one number per token, ({len(tokens)}, {max(counts, default=0)}), and as many "
            f"lengths and scores as captions, got {tuple(values.shape)}, {len(counts)} lengths and {len(totals)} "
            "scores; sum embeddings' attributions over channels first."
        )
    if not bool(values.isfinite().all()):
        raise ValueError("attributions: expected finite numbers, got NaN or infinity.")
    records = []
    for row, value, score, count in zip(tokens, values.double().cpu(), totals, counts, strict=True):
        shown = value[:count]
        largest = float(shown.abs().max()) if count else 0.0
        scaled = shown / largest if largest > 0 else torch.zeros_like(shown)
        words = [html.escape(clean_token(token)) for token in row[:count]]
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
