"""Explain batches of rows: the same class under every engine, and for ``datasets.map``.

A row that cannot be explained becomes a row that says why; a batch that does not fit into memory is halved. Nothing
that a row gets depends on which rows it shares a batch with.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from captum_m2ib.audit.decode import KINDS, RowError, read_ahead
from captum_m2ib.audit.measures import cosine, half_scores
from captum_m2ib.audit.processes import survive_fork
from captum_m2ib.audit.reader import Reader, Ready, inside
from captum_m2ib.audit.results import PASSED_ON, RESULTS, checked, failed, gated_scores, grids_of, shown, storable
from captum_m2ib.audit.rows import Row
from captum_m2ib.explanations.units import WORDINGS
from captum_m2ib.explanations.visualization import clean_token

if TYPE_CHECKING:
    from captum_m2ib.encoders.dual_encoder import DualEncoder, Pairs

PUBLISHED = "m2ib-published"


class Worker:
    r"""Explain batches of pairs, row by row safe.

    Built from settings alone, so that it can be sent to other processes; the model is loaded at the first batch, or by
    :meth:`load`.

    Args:

        model (str, optional): Hub id, checkpoint directory, or ``module:function``, a Python function that returns a
            :class:`DualEncoder` with a processor. Default: None (the compact model that is shipped)
        revision (str, optional): Branch, tag or commit on the hub. Default: None
        device (str, optional): For example ``"cuda"``. Default: None (the CPU)
        layers (sequence of str, optional): Dotted names of the image's and the text's layer, or "inputs[0]" for the
            picture itself. Default: None (recommended layers)
        method (str, optional): A name of :data:`captum_m2ib.attr.registry.METHODS`. Default: "m2ib"
        published (bool, optional): The same as ``method="m2ib-published"``. Default: False
        beta, variance, n_steps, n_samples, lr, seed, joint: As for :meth:`MultiModalInfoBottleneck.attribute`;
            ``beta``, ``variance`` and ``lr`` one number for both modalities. Other methods take those of them that
            their own ``attribute`` has.
        contrast (str, optional): A caption whose image map every row's is compared with, unless the row has its own;
            takes half as long again. Default: None
        halves (bool, optional): Also score the picture with only the half of its pixels that holds the most bits, and
            with only the other half; not of sounds and videos. Default: False
        check (bool, optional): Also look at what the score loses where the maps' top positions are hidden; see
            :mod:`captum_m2ib.engine.check`. Default: True
        cut_captions (bool, optional): Explain the beginning of captions that the model cannot read to their end.
            Default: False (such a row is an error)
        thumbnail (int, optional): Longer side of the picture kept for looking at, in pixels; of a sound its spectrogram
            or wave, of a video its frames in rows; 0 for none. Default: 128
        batch_size (int, optional): Most pairs explained at once; changes no result. Default: 8
        internal_batch_size (int, optional): Most rows (pairs times draws) in one forward pass; changes no result.
            Default: None (as many as M2IB's ``memory_budget`` has room for; 80 for other methods)

    Raises:
        ValueError: if a setting is out of range, the method is unknown, or it takes no such setting.

    Examples::

        >>> worker = Worker(n_steps=2)  # the shipped model; of a datasets.Dataset: dataset.map(worker, batched=True)
        >>> rows = worker({"image": images, "caption": captions})
        >>> len(rows["score"]), rows["error"]
        (2, [None, None])
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        revision: str | None = None,
        device: str | None = None,
        layers: Sequence[str] | None = None,
        method: str = "m2ib",
        published: bool = False,
        beta: float | None = None,
        variance: float | None = None,
        n_steps: int | None = None,
        n_samples: int | None = None,
        lr: float | None = None,
        seed: int = 0,
        joint: bool = False,
        contrast: str | None = None,
        halves: bool = False,
        check: bool = True,
        cut_captions: bool = False,
        thumbnail: int = 128,
        batch_size: int = 8,
        internal_batch_size: int | None = None,
    ) -> None:
        from captum_m2ib.attr.registry import entry_named, settings_of

        if published and layers is not None:
            raise ValueError("published: chooses the layers itself; leave out layers or published.")
        if published and method not in ("m2ib", PUBLISHED):
            raise ValueError(f"published: is a method of its own; leave out published, or method={method!r}.")
        self.method = PUBLISHED if published else method
        entry_named(self.method, layers)
        for name, number, least in (
            ("n_steps", n_steps, 1),
            ("n_samples", n_samples, 1),
            ("batch_size", batch_size, 1),
            ("internal_batch_size", internal_batch_size, 1),
            ("thumbnail", thumbnail, 0),
            ("seed", seed, 0),
        ):
            if number is not None and (not isinstance(number, int) or number < least):
                raise ValueError(f"{name}: expected a whole number of at least {least}, got {number!r}.")
        if contrast is not None and not contrast.strip():
            raise ValueError("contrast: expected a caption with at least one word, got an empty one.")
        self.model, self.revision, self.device = model, revision, device
        self.layers = None if layers is None else list(layers)
        self.optimisation: dict[str, Any] = {
            "beta": beta,
            "variance": variance,
            "n_steps": n_steps,
            "n_samples": n_samples,
            "lr": lr,
            "seed": seed,
            "joint": joint,
        }
        self._options = settings_of(self.method, {**self.optimisation, "joint": joint or None})
        self.contrast, self.halves, self.cut_captions, self.thumbnail = contrast, halves, cut_captions, thumbnail
        self.check = check
        self.batch_size, self.internal_batch_size = batch_size, internal_batch_size
        self._method: Any = None

    def read_ahead(self, row: Row) -> Row:
        r"""Read what a row holds before its turn; fit for any thread.

        Args:

            row (Row): As the manifest gives it.

        Returns:
            Row: the same; as it is while no model is there that says what it reads.
        """
        return row if self._method is None else read_ahead(row, self._reader.kind)

    def __reduce__(self) -> tuple[Any, ...]:
        # The model stays behind: another process loads its own.
        return partial(type(self), self.model, **self._arguments()), ()

    @property
    def model_name(self) -> str:
        """The model as the table names it."""
        return self.model or "shipped"

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that a result depends on, besides the pair and the model; JSON can hold it."""
        chosen = {
            "revision": self.revision,
            "layers": self.layers,
            "method": self.method,
            "published": self.method == PUBLISHED,
            **self.optimisation,
            "contrast": self.contrast,
            "halves": self.halves,
            "check": self.check,
            "cut_captions": self.cut_captions,
            "thumbnail": self.thumbnail,
        }
        return dict(json.loads(json.dumps(chosen)))

    def _arguments(self) -> dict[str, Any]:
        sizes = {"batch_size": self.batch_size, "internal_batch_size": self.internal_batch_size}
        return {**self.settings, **sizes, "device": self.device}

    def load(self) -> Any:
        r"""The attribution method on the loaded model; loads it once.

        Returns:
            Attribution: the settings' method, with their layers.
        """
        survive_fork()
        if self._method is None:
            self._method = self._load()
        return self._method

    def _load(self) -> Any:
        from captum_m2ib.attr.registry import method_named
        from captum_m2ib.encoders.naming import load_named
        from captum_m2ib.scenes import CHECKPOINT

        encoder = load_named(self.model or CHECKPOINT, revision=self.revision, device=self.device)
        if encoder.processor is None:
            raise ValueError(f"model: {self.model} has no processor that turns pictures and captions into inputs.")
        first, second = (side.modality for side in encoder.sides)
        if first not in KINDS or second != "text" or encoder.reads_tokens(0):
            compared = f"{first} as codes" if encoder.reads_tokens(0) and first != "text" else first
            raise ValueError(
                f"model: audits take pictures, sounds or videos and captions, and {self.model} compares {compared} "
                f"with {second}; explain its pairs one by one."
            )
        if self.halves and first != "image":
            raise ValueError(f"halves: are those of pictures, and {self.model} reads {first}; leave it out.")
        return method_named(self.method, encoder, self.layers)

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        r"""Explain a batch.

        Args:

            batch (mapping): Columns of one length: ``caption``, and what the model reads: ``image`` (path, bytes, PIL
                image, array, or mapping with ``bytes`` or ``path``), ``sound`` (path, bytes or :class:`Sound`, or such
                a mapping, or one with ``array`` and ``sampling_rate``) or ``video`` (folder, frames, GIF file or its
                bytes, or :class:`Video`); optionally ``row``, ``id``, ``boxes``, ``mask``, ``contrast``,
                ``frames_per_second`` and ``problem``.

        Returns:
            dict: columns of the same length and order: ``row``, ``id`` and ``caption`` as given, and
            :data:`captum_m2ib.audit.results.RESULTS`.

        Raises:
            ValueError, OSError: if the model cannot be loaded.
        """
        # Else a model that cannot be loaded would be an error of every row.
        self.load()
        count = len(batch["caption"])
        rows = [{name: column[index] for name, column in batch.items()} for index in range(count)]
        results: list[dict[str, Any]] = []
        start = 0
        while start < count:
            # Anew each time: running out of memory makes it smaller.
            chunk = rows[start : start + self.batch_size]
            results += self._explain(chunk)
            start += len(chunk)
        columns: dict[str, list[Any]] = {name: list(batch[name]) for name in PASSED_ON if name in batch}
        return {**columns, **{name: [result.get(name) for result in results] for name in RESULTS}}

    def _explain(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        results: list[dict[str, Any]] = []
        ready: list[Ready] = []
        reader = self._reader
        for row in rows:
            try:
                pair = reader.read(row)
            except RowError as error:
                results.append(failed(error.kind, error))
            else:
                ready.append(pair)
                results.append(pair.result)
        self._explain_pairs(*reader.readable(ready))
        return results

    @property
    def _reader(self) -> Reader:
        return Reader(self._encoder, self.contrast, self.cut_captions)

    @property
    def _encoder(self) -> DualEncoder:
        encoder: DualEncoder = self.load().forward_func
        return encoder

    def _explain_pairs(self, ready: list[Ready], pairs: Pairs | None = None) -> None:
        if not ready:
            return
        from captum_m2ib.engine.stakes import NothingToExplainWarning

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="captions:")
                # The row's verdict says so.
                warnings.filterwarnings("ignore", category=NothingToExplainWarning)
                found = self._attribute(ready, self._reader.inputs(ready) if pairs is None else pairs)
        except Exception as error:
            # A worker must outlive whatever one pair does to the model; halving finds that pair.
            self._explain_halves(ready, error)
            return
        for pair, result in zip(ready, found, strict=True):
            pair.result.update(result)

    def _explain_halves(self, ready: list[Ready], error: Exception) -> None:
        exhausted = _is_out_of_memory(error)
        if exhausted:
            _release_memory()
            self.batch_size = max(min(self.batch_size, len(ready) // 2), 1)
        if len(ready) > 1:
            middle = len(ready) // 2
            self._explain_pairs(ready[:middle])
            self._explain_pairs(ready[middle:])
        elif exhausted and self.internal_batch_size != 1:
            self.internal_batch_size = (self.internal_batch_size or 2) // 2
            self._explain_pairs(ready)
        else:
            ready[0].result.update(failed("memory" if exhausted else "model", error))

    def _attribute(self, ready: Sequence[Ready], pairs: Pairs) -> list[dict[str, Any]]:
        from captum_m2ib.explanations.methods import maps_of

        encoder = self._encoder
        if len(ready) > 1 and encoder.holds_sizes(pairs):
            return [self._attribute([one], self._reader.inputs([one]))[0] for one in ready]
        maps = maps_of(encoder, self.load(), pairs, self.internal_batch_size, self.check, self._options)
        grids, has_pixels = grids_of(maps.pixels, maps.patches), pairs.inputs[0].ndim == 4
        real = [row.nonzero().flatten().tolist() for row in encoder.real_tokens(pairs)]
        results = [
            {
                "score": float(maps.scores[i]),
                "method": self.method,
                **shown(self._reader.kind.name, maps.unit, grids[i], pairs, i, self.thumbnail),
                "tokens": [storable(clean_token(pairs.tokens[i][j])) for j in real[i]],
                "special": [pairs.special[i][j] for j in real[i]],
                "token_bits": maps.tokens[i, real[i]].float().cpu().numpy(),
                "text_bits": float(maps.tokens[i].sum()) if WORDINGS[maps.unit].has_totals else None,
                **inside(encoder, pair, maps.pixels[i].float().cpu().numpy() if has_pixels else grids[i]),
                **({} if maps.records is None else gated_scores(maps.records[i])),
                **({} if maps.checks is None else checked(maps.checks[i])),
            }
            for i, pair in enumerate(ready)
        ]
        if self.halves and has_pixels:
            for result, figures in zip(results, half_scores(encoder, pairs, maps.pixels), strict=True):
                result.update(figures)
        compared = [i for i, pair in enumerate(ready) if pair.contrast]
        if compared:
            others = self._contrast_maps([ready[i] for i in compared])
            for i, other in zip(compared, others, strict=True):
                results[i]["contrast_similarity"] = cosine(grids[i], other)
                results[i]["contrast"] = ready[i].contrast
        return results

    def _contrast_maps(self, ready: Sequence[Ready]) -> list[np.ndarray]:
        from captum_m2ib.explanations.methods import pictures_alone

        pairs = self._reader.inputs(ready, contrast=True)
        return grids_of(*pictures_alone(self._encoder, self.load(), pairs, self.internal_batch_size, self._options))


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU's allocator has no exception of its own.
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"OutOfMemoryError", "MemoryError"}) or "not enough memory" in str(error)


def _release_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
