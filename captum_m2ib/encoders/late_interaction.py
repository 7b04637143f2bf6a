"""Scores of late interaction: of which tokens they are made, and the score of some of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from captum_m2ib.encoders.families import patches_among
from captum_m2ib.encoders.pairs import Pairs
from captum_m2ib.encoders.scores import MaxSim, is_token
from captum_m2ib.encoders.spans import find_span
from captum_m2ib.encoders.tower_pair import TowerPair


class Interaction(NamedTuple):
    r"""What a MaxSim score is made of.

    Attributes:

        matches (Tensor): Of every query token with every page token, (N, query tokens, page tokens); minus infinity at
            padding of the page.
        counted (Tensor): Which query tokens count, boolean, (N, query tokens).
        patches (Tensor): Which page tokens are patches, in their order, boolean, (N, page tokens).
    """

    matches: Tensor
    counted: Tensor
    patches: Tensor


class LateInteraction(TowerPair):
    """What the tokens of a query add to a score that is a sum over them."""

    def count_tokens(self, pairs: Pairs, tokens: str | Sequence[str] | Tensor) -> Pairs:
        r"""The same pairs with a score that counts some tokens of the query alone, as a MaxSim score can.

        Args:

            pairs (Pairs): As :meth:`prepare` returns them.
            tokens (str, sequence of str or Tensor): Words as they follow one another in every query, or one such string
                per pair; or which tokens count, boolean, (N, L).

        Returns:
            Pairs: with that as one more additional argument.

        Raises:
            ValueError: if the score is no sum over tokens, the words cannot be found among a query's tokens, or no real
                token is left.
        """
        self._ensure_terms()
        if isinstance(tokens, Tensor):
            counted = tokens.bool().cpu()
        else:
            words = [tokens] * len(pairs) if isinstance(tokens, str) else list(tokens)
            if len(words) != len(pairs):
                raise ValueError(
                    f"tokens: expected one string for all pairs or one per pair, {len(pairs)}, got {len(words)}."
                )
            found = zip(pairs.captions, pairs.tokens, words, strict=True)
            counted = torch.tensor([find_span(*each) for each in found])
        real = self.real_tokens(pairs)
        if counted.shape != real.shape or not bool((counted & real).any(1).all()):
            raise ValueError(
                f"tokens: expected at least one real token per pair among (N, L) = {tuple(real.shape)}, got a mask of "
                f"shape {tuple(counted.shape)} with {counted.sum().item()} of them."
            )
        missing = (None,) * (len(self._slots) - 2 - len(pairs.additional_forward_args))
        additional = (*pairs.additional_forward_args, *missing, counted.to(pairs.inputs[1].device))
        return replace(pairs, additional_forward_args=additional)

    @property
    def has_terms(self) -> bool:
        """Whether the score is a sum over the tokens of the query, of which some can be chosen."""
        return isinstance(self._family.score, MaxSim)

    def interaction(self, page: Tensor, query: Tensor, *additional: Any) -> Interaction:
        r"""What a MaxSim score is made of.

        Args:

            page, query (Tensor): As for :meth:`forward`.
            *additional: As for :meth:`forward`.

        Returns:
            Interaction: matches of all tokens.

        Raises:
            ValueError: if the score is no MaxSim, or the first input is no page.
        """
        self._ensure_terms()
        if not self._is_in_order:
            raise ValueError("modalities: expected pages first, then queries; leave modalities out.")
        read, counted = self._split(additional)
        of_page, of_query = self._outputs(page, query, read)
        is_query = is_token(of_query)
        ids = read[self.argument_names.index("page_input_ids") - 2]
        return Interaction(
            cast(MaxSim, self._family.score).matches(of_page, of_query),
            is_query if counted is None else is_query & counted.bool(),
            patches_among(self.model, ids),
        )

    def _ensure_terms(self) -> None:
        if not self.has_terms:
            raise ValueError(
                f"tokens: {type(self._towers[1].model).__name__} scores a caption as a whole, and no token has a share "
                "of its own in that; leave tokens out, or explain a model of late interaction, such as ColPali."
            )

    def _split(self, additional: tuple[Any, ...]) -> tuple[tuple[Any, ...], Tensor | None]:
        """What the towers read, and which tokens of the query count."""
        taken = len(self._slots) - 2
        if not self.has_terms or len(additional) != taken + 1:
            return additional, None
        return additional[:taken], additional[taken]
