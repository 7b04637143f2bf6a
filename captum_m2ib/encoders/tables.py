"""The modules that turn a text tower's token ids into rows, found by following a pass, whatever their class.

Adapters wrap a table, copy it or compute its rows anew, and a model may hold a table that nothing reads. What counts is
what happens: the tower is given two captions that differ in one token, and a module that receives the ids and returns
rows of which only that token's differ embeds them. Of several, one inside the other, the outermost is read; several one
after the other are :class:`captum_m2ib.encoders.token_rows.TokenRows`. Where all of them return the same rows for both
captions, the tower has to return the same, too: else it reads the ids where no module does.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_m2ib.encoders.towers import config_of, device_of, token_tables
from captum_m2ib.engine.interception import Handler, borrowing, intercept
from captum_m2ib.engine.layers import tensors_in
from captum_m2ib.engine.statistics import ChannelStatistics, RunningStatistics

# Ids that no tokenizer pads with, of which the second stands at one place.
_ID, _OTHER, _PLACE = 2, 3, 1
_LENGTH = 8
# Others at that place, of which one at most ends a caption, before the highest id, at which some towers let one end.
_OTHERS, _HIGHEST = (3, 5, 7), 8
# How much of what a token changes may go another way before it is no rounding.
_AROUND = 1e-3
# What rounding may change of a row, as a share of what the changed token changes of its own.
_ROUNDING = 1e-6
# How many tokens of a vocabulary are embedded together.
_AT_ONCE = 512


class TokenModules(NamedTuple):
    r"""What embeds a text tower's tokens.

    Attributes:

        embeddings (nn.Module or None): From ids to rows, with their positions where it adds them.
        table (nn.Module or None): The part of it that knows no positions.
        further (tuple[nn.Module, ...]): What else the same ids enter, from ids to rows of its own.
        are_all (bool): Whether nothing but these reads which token is where, as far as a pass shows.
    """

    embeddings: nn.Module | None
    table: nn.Module | None
    further: tuple[nn.Module, ...] = ()
    are_all: bool = True


def find_token_modules(tower: nn.Module, call: Callable[[Tensor], Any] | None = None) -> TokenModules:
    r"""What embeds a tower's tokens.

    Args:

        tower (nn.Module): The tower.
        call (Callable, optional): Runs the tower on token ids, (2, L). Default: None (nothing is run)

    Returns:
        TokenModules: as a pass through the tower shows them, else by their names.
    """
    named = [(name, module) for name, module in tower.named_modules() if name]
    table = next((table for name, table in token_tables(named)), None)
    whole = next((module for name, module in named if name.split(".")[-1] == "embeddings"), table)
    if call is None or table is None:
        return TokenModules(whole, table)
    seen = _follow(tower, call)
    return TokenModules(seen.embeddings or whole, seen.table or table, seen.further, seen.are_all)


def vocabulary_statistics(embeddings: nn.Module) -> ChannelStatistics | None:
    """Channels over every token of the vocabulary, each at one position, positions cycling."""
    tables = {name: module for name, module in embeddings.named_modules() if isinstance(module, nn.Embedding)}
    tokens = next((table for _, table in token_tables(tables.items())), None)
    if tokens is None:
        return None
    running = RunningStatistics()
    with torch.no_grad():
        if tokens is embeddings and not tokens.weight.is_meta:
            running.update(tokens.weight)
            return running.result()
        positions = next((table for name, table in tables.items() if "position" in name), None)
        # Some tables keep their first rows for padding.
        length = (
            _positions(embeddings)
            if positions is None
            else positions.num_embeddings - 1 - (positions.padding_idx or -1)
        )
        by_name = "input_ids" in inspect.signature(embeddings.forward).parameters
        for ids in _lines(torch.arange(tokens.num_embeddings, device=device_of(embeddings)), length):
            output = embeddings(input_ids=ids) if by_name else embeddings(ids)
            running.update(tensors_in(output)[0].flatten(0, -2))
    return running.result()


def _lines(ids: Tensor, length: int) -> Iterator[Tensor]:
    """Ids in lines of a length, (lines, length), many lines at a time, and the rest in a line of its own."""
    whole = len(ids) // length * length
    if whole:
        yield from ids[:whole].view(-1, length).split(max(1, _AT_ONCE // length))
    if whole < len(ids):
        yield ids[None, whole:]


def _positions(embeddings: nn.Module) -> int:
    """How many tokens a module embeds at once that computes their positions."""
    numbered = getattr(embeddings, "position_ids", None)
    return min(numbered.shape[-1], 64) if isinstance(numbered, Tensor) else 64


def _follow(tower: nn.Module, call: Callable[[Tensor], Any]) -> TokenModules:
    """What embeds the tokens in a pass through the tower; nothing if the tower does not run on such ids."""
    device = device_of(tower)
    ids = torch.full((2, _length(tower)), _ID, device=device)
    ids[1, _PLACE] = _OTHER
    follower = _Follower(ids)
    are_all = True
    # A tower that wants other ids is asked for its layers by name, where none were seen before.
    with contextlib.suppress(Exception), borrowing(tower, warn=False), torch.no_grad():
        with intercept(follower):
            call(ids)
        are_all = not all(_goes_around(follower.found, call, ids, other) for other in _OTHERS)
    return follower.found._replace(are_all=are_all)


def _goes_around(found: TokenModules, call: Callable[[Tensor], Any], ids: Tensor, other: int) -> bool:
    """Whether a tower still tells two captions apart whose token modules return the same rows."""
    modules = {found.embeddings, *found.further} - {None}
    if not modules or ids.shape[1] <= _PLACE + 1:
        return False
    ids = ids.clone()
    ids[1, _PLACE], ids[:, -1] = other, _HIGHEST

    def alike(proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        output = proceed(module, *args, **kwargs)
        if module not in modules or not isinstance(output, Tensor):
            return output
        rows = output.clone()
        one, two = ((0, _PLACE), (1, _PLACE)) if rows.shape[:2] == ids.shape else ((_PLACE, 0), (_PLACE, 1))
        rows[two] = rows[one]
        return rows

    apart = _apart(call(ids))
    with intercept(alike):
        return _apart(call(ids)) > _AROUND * apart


def _apart(output: Any) -> float:
    """How far what a tower returns for two captions lies apart."""
    found = [tensor.float() for tensor in tensors_in(output) if tensor.is_floating_point() and tensor.shape[:1] == (2,)]
    return max((float((tensor[0] - tensor[1]).abs().max()) for tensor in found), default=0.0)


def _length(tower: nn.Module) -> int:
    """How many ids a tower takes: all of its context where it takes no fewer."""
    fixed = getattr(tower, "context_length", None)
    longest = getattr(config_of(tower, "text_config"), "max_position_embeddings", None)
    # Towers of open_clip that take any number say 0.
    if isinstance(fixed, int) and fixed > 0:
        return fixed
    return max(min(longest, _LENGTH), 2) if isinstance(longest, int) else _LENGTH


class _Follower:
    """Notes the outermost modules that embed the ids, each token on its own."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids
        self._calls = 0
        # By the call at which each began: rows that depend on their own token, and of these such as on nothing else.
        self._rows: dict[int, nn.Module] = {}
        self._alike: dict[int, nn.Module] = {}

    @property
    def found(self) -> TokenModules:
        """What embeds the ids."""
        embeddings, *others = dict.fromkeys(self._rows[start] for start in sorted(self._rows)) or [None]
        table = self._alike[min(self._alike)] if self._alike else None
        return TokenModules(embeddings, table, tuple(one for one in others if one is not None))

    def __call__(self, proceed: Handler, module: nn.Module, args: Any, kwargs: Any) -> Any:
        start = self._calls
        self._calls += 1
        received = tensors_in((args, kwargs))
        output = proceed(module, *args, **kwargs)
        changed = self._changed(output)
        if changed is None:
            return output
        rows, is_mixed = changed
        if not is_mixed and any(self._is_ids(tensor) for tensor in received):
            _note(self._rows, start, module)
            if torch.equal(rows[0, :1].expand_as(rows[0]), rows[0]):
                _note(self._alike, start, module)
        return output

    def _is_ids(self, tensor: Tensor) -> bool:
        if tensor.is_floating_point() or tensor.ndim != 2:
            return False
        return any(tensor.shape == one.shape and bool((tensor == one).all()) for one in (self._ids, self._ids.T))

    def _changed(self, output: Any) -> tuple[Tensor, bool] | None:
        """The rows of both captions, and whether the changed token has changed another's; None where none are."""
        found = next((tensor for tensor in tensors_in(output) if tensor.is_floating_point()), None)
        pairs, length = self._ids.shape
        if found is None or found.ndim != 3 or {*found.shape[:2]} != {pairs, length}:
            return None
        rows = found if found.shape[0] == pairs else found.transpose(0, 1)
        change = (rows[0] - rows[1]).float().abs().amax(-1)
        own = float(change[_PLACE])
        others = float(change[torch.arange(length, device=change.device) != _PLACE].max())
        return (rows, others > _ROUNDING * own) if max(own, others) > 0 else None


def _note(known: dict[int, nn.Module], start: int, module: nn.Module) -> None:
    """Keep a call that ends now in the place of those inside it."""
    for inner in [one for one in known if one > start]:
        del known[inner]
    known[start] = module
