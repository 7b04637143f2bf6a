r"""The similarity map of late interaction: how well each patch of a page matches the query's tokens.

What the tools around ColPali draw. With page tokens :math:`p_i` and the query's tokens :math:`q_j` of which some count
(see :meth:`DualEncoder.count_tokens`), a patch's value is the mean over those of

.. math:: p_i \cdot q_j

and a query token's is its best match, :math:`\max_i p_i \cdot q_j`, over all of the page's tokens. One pass, no
gradients. It says where the page resembles the query, not what the score rests on: in the score each query token takes
its best page token alone, and a page token has read the whole page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from captum_m2ib import _captum
from captum_m2ib.attr._arguments import Explained, rows_at_once
from captum_m2ib.attr._scoring import as_forward_func
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.encoders.late_interaction import Interaction
from captum_m2ib.engine.gates import check_finite
from captum_m2ib.engine.layouts import PackedLayout, PatchLayout
from captum_m2ib.engine.real_units import real_tokens
from captum_m2ib.engine.units import packed_grid, to_input


class SimilarityMap(_captum.Attribution):
    r"""Similarity of a page's patches to a query's tokens, of a late-interaction model.

    Faysse et al., "ColPali: Efficient Document Retrieval with Vision Language Models", ICLR 2025,
    https://arxiv.org/abs/2407.01449

    Args:

        forward_func (DualEncoder or nn.Module): A late-interaction model, such as ColPali.

    Raises:
        ValueError: if its score is no MaxSim of tokens.
    """

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        forward_func = as_forward_func(forward_func)
        if not isinstance(forward_func, DualEncoder) or not forward_func.has_terms:
            raise ValueError(
                "forward_func: expected a model of late interaction, such as ColPali, got "
                f"{type(forward_func).__name__} without embeddings of single tokens; choose another method."
            )
        _captum.Attribution.__init__(self, forward_func)

    def attribute_future(self) -> None:
        """Not offered, as for most of Captum's methods."""
        raise NotImplementedError(f"attribute_future is not implemented for {type(self).__name__}")

    @_captum.log_usage(part_of_slo=True)
    @torch.no_grad()
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Any = None,
        additional_forward_args: Any = None,
        internal_batch_size: int | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        r"""Attribute each pair's score to its page and its query.

        Args:

            inputs (Tensor or tuple[Tensor, Tensor]): Pages, or pages and queries, as :meth:`DualEncoder.prepare` makes
                        them; queries that are not explained come first among the additional arguments.
            target (None, optional): As everywhere in Captum; a pair has one score, so there is none to select.
                        Default: None
            additional_forward_args (Any, optional): What else the model reads, and which tokens of the query count.
                        Default: None
            internal_batch_size (int, optional): Most pairs in one pass. Default: None (all at once)

        Returns:
            *Tensor* or *tuple[Tensor, ...]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor, ...]*):
                        Of the inputs' shapes; from -1 to 1 before they are spread over pixels, whose sums they keep.
                        Query tokens that do not count, and padding, are exactly 0.

        Raises:
            ValueError: if batch sizes differ, or a similarity is NaN.
        """
        given = Explained.ensure(self.forward_func, inputs, target, additional_forward_args, 2)
        at_once, _ = rows_at_once(internal_batch_size, 1)
        pages, queries = [], []
        for start, chunk in given.parts(at_once):
            found = self.forward_func.interaction(*chunk)
            check_finite("similarity", found.matches.nan_to_num(nan=torch.nan, neginf=0.0), start)
            pages.append(self._on_page(found, chunk))
            queries.append(torch.where(found.counted, found.matches.amax(-1), 0.0))
        maps = (torch.cat(pages).contiguous(), torch.cat(queries).contiguous())
        return _captum.format_output(_captum.is_tuple(inputs), maps[: len(given.inputs)])

    @torch.no_grad()
    def of_tokens(self, inputs: tuple[Tensor, Tensor], additional_forward_args: Any = None) -> list[Tensor]:
        r"""How well each token of a query matches each patch of its page: what the score takes the best of.

        Args:

            inputs (tuple[Tensor, Tensor]): Pages and queries, as for :meth:`attribute`.
            additional_forward_args (Any, optional): What else the model reads. Default: None

        Returns:
            list[Tensor]: per pair (tokens, rows, columns); 0 for tokens that do not count.

        Raises:
            ValueError: if a page is cut into tiles, which have no grid of their own.
        """
        chunk = Explained.ensure(self.forward_func, inputs, None, additional_forward_args, 2).arguments
        found, layout = self.forward_func.interaction(*chunk), self.forward_func.layouts[0]
        matches = torch.where(found.counted.unsqueeze(-1), found.matches, 0.0)
        if isinstance(layout, PackedLayout):
            real = real_tokens(layout, inputs[0], chunk)
            units = inputs[0].new_zeros(matches.shape[1], *inputs[0].shape[:2])
            for index, (row, place) in enumerate(zip(matches, found.patches, strict=True)):
                kept = slice(None) if real is None else real[index]
                units[:, index, kept] = row[:, place].repeat_interleave(layout.merge**2, dim=1)
            grids = range(len(inputs[0]))
            return [torch.stack([packed_grid(layout, one, chunk, index) for one in units]) for index in grids]
        coarse, grid = _merged(layout, inputs[0], int(found.patches[0].sum()))
        if len(grid) != 2:
            raise ValueError("inputs: expected pages in one piece, got tiles, whose patches lie in no one grid.")
        factors = [large // small for large, small in zip(coarse.patch_size, layout.patch_size, strict=True)]
        maps = [row[:, place].unflatten(1, grid) for row, place in zip(matches, found.patches, strict=True)]
        return [one.repeat_interleave(factors[0], 1).repeat_interleave(factors[1], 2) for one in maps]

    def _on_page(self, found: Interaction, chunk: tuple[Any, ...]) -> Tensor:
        """The mean over counted tokens, at the places of the page's patches, spread over its pixels."""
        weights = found.counted / found.counted.sum(1, keepdim=True)
        means = (weights.unsqueeze(-1) * found.matches.masked_fill(found.matches.isinf(), 0.0)).sum(1)
        layout, inputs = self.forward_func.layouts[0], chunk[0]
        if isinstance(layout, PackedLayout):
            units = inputs.new_zeros(inputs.shape[:2])
            real = real_tokens(layout, inputs, chunk)
            for index, (row, mean, place) in enumerate(zip(units, means, found.patches, strict=True)):
                row[slice(None) if real is None else real[index]] = mean[place].repeat_interleave(layout.merge**2)
            return to_input(layout, units, inputs)
        coarse, grid = _merged(layout, inputs, int(found.patches[0].sum()))
        return to_input(coarse, means[found.patches].view(len(inputs), *grid), inputs)


def _merged(layout: PatchLayout, inputs: Tensor, tokens: int) -> tuple[PatchLayout, tuple[int, ...]]:
    """The grid of so many tokens, each of which stands for a square of patches."""
    axes = layout.axes or tuple(range(inputs.ndim - len(layout.patch_size), inputs.ndim))
    for factor in range(1, 9):
        patch = (*layout.patch_size[:-2], *(side * factor for side in layout.patch_size[-2:]))
        grid = tuple(inputs.shape[axis] // side for axis, side in zip(axes, patch, strict=True))
        if torch.Size(grid).numel() == tokens:
            return replace(layout, patch_size=patch), grid
    raise ValueError(
        f"inputs: expected a page whose {tokens} tokens are a grid of its patches of {layout.patch_size}, got pixels "
        f"of shape {tuple(inputs.shape)}; prepare it with the model's own processor."
    )
