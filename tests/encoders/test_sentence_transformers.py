"""Models of sentence-transformers, loaded from directories of the hub's form: their own scores, prompts and pooling."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import embedders
import numpy as np
import page_zoo
import pytest
import torch
import transformers
from PIL import Image
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Router
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tiny_parts import LEGACY
from torch import nn

from captum_m2ib import DualEncoder, MultiModalInfoBottleneck, PatchLayout, Sound, TextLayout, explain
from captum_m2ib.encoders.naming import load_named

pytestmark = pytest.mark.skipif(LEGACY, reason="processors of this transformers have other classes")

TEXTS = ["red circle", "a blue circle"]
FEW: dict[str, Any] = {"n_steps": 2, "n_samples": 2, "check": False}


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)) for size in ((40, 64), (64, 40))]


def one_network(_: Path, folder: Path) -> SentenceTransformer:
    embedders.save_qwen3_vl(folder)
    modules = [Transformer(str(folder)), Pooling(32, "lasttoken"), Normalize()]
    return SentenceTransformer(modules=modules, prompts={"query": "the ", "document": "a page"}, device="cpu")


def averaged(_: Path, folder: Path) -> SentenceTransformer:
    embedders.save_embedding_gemma2(folder)
    modules = [Transformer(str(folder)), Pooling(16, "mean", include_prompt=False), Normalize()]
    return SentenceTransformer(modules=modules, prompts={"query": "the chart: "}, device="cpu")


def projected(clip: Path, _: Path) -> SentenceTransformer:
    modules = [Transformer(str(clip)), Dense(16, 8, module_input_name="sentence_embedding")]
    return SentenceTransformer(modules=modules, similarity_fn_name="dot", truncate_dim=6, device="cpu")


def distant(clip: Path, _: Path) -> SentenceTransformer:
    return SentenceTransformer(modules=[Transformer(str(clip))], similarity_fn_name="euclidean", device="cpu")


def plain(clip: Path, _: Path) -> SentenceTransformer:
    return SentenceTransformer(
        modules=[Transformer(str(clip)), Normalize()],
        prompts={"query": "the "},
        default_prompt_name="query",
        device="cpu",
    )


def routed(_: Path, folder: Path) -> SentenceTransformer:
    embedders.save_vit(folder / "vit")
    embedders.save_bert(folder / "bert")
    image = [Transformer(str(folder / "vit")), Pooling(32, "cls"), Dense(32, 8)]
    text = [Transformer(str(folder / "bert")), Pooling(32, "mean", include_prompt=False), Dense(32, 8)]
    router = Router({"image": image, "text": text}, default_route="text")
    return SentenceTransformer(
        modules=[router], similarity_fn_name="manhattan", prompts={"query": "the chart: "}, device="cpu"
    )


KINDS: dict[str, Callable[[Path, Path], SentenceTransformer]] = {
    one.__name__: one for one in (one_network, averaged, projected, distant, plain, routed)
}


@functools.cache
def saved(kind: str, clip: Path, folder: Path) -> Path:
    torch.manual_seed(1)
    made = KINDS[kind](clip, folder / f"{kind}_parts")
    made.save(str(folder / kind))
    return folder / kind


@pytest.fixture(params=KINDS, scope="module")
def folder(request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(request.param, checkpoint, tmp_path_factory.getbasetemp())


@torch.no_grad()
def test_scores_are_the_packages_own(folder: Path):
    encoder, own = DualEncoder.from_sentence_transformers(folder), SentenceTransformer(str(folder), device="cpu")
    pairs = encoder.prepare(pictures(), TEXTS)
    arguments = (*pairs.inputs, *pairs.additional_forward_args)
    # One by one: some processors take a list of pictures for the pictures of one document.
    expected = own.similarity(
        np.concatenate([own.encode_document([one]) for one in pictures()]), own.encode_query(TEXTS)
    )
    assert float(expected.std()) > 1e-3
    torch.testing.assert_close(encoder.similarities(*arguments), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder(*arguments), expected.diagonal(), rtol=0, atol=1e-5)


def test_pictures_and_captions_are_explained(folder: Path):
    encoder = DualEncoder.from_sentence_transformers(folder)
    (found,) = explain(encoder, pictures()[0], TEXTS[0], **FEW)
    for bits in (found.image_bits, found.token_bits):
        assert np.isfinite(bits).all() and bits.sum() > 0
    assert found.tokens[-1] != "red" and "red" in found.tokens


def test_a_model_in_hand_is_the_one_that_is_explained(checkpoint: Path, tmp_path: Path):
    made = projected(checkpoint, tmp_path)
    encoder = DualEncoder.from_sentence_transformers(made)
    assert encoder.model is made
    assert not any(module.training for module in encoder.modules())
    assert isinstance(encoder.layouts[0], PatchLayout) and isinstance(encoder.layouts[1], TextLayout)


def test_one_network_is_told_apart_by_call(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    encoder = DualEncoder.from_sentence_transformers(saved("one_network", checkpoint, tmp_path_factory.getbasetemp()))
    layers = MultiModalInfoBottleneck.published(encoder).layers
    assert [layer.name for layer in layers] == ["0.model.visual.blocks.1", "0.model.language_model.layers.1"]
    assert [layer.call for layer in layers] == [None, 1]


def test_prompts_are_the_models_own(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    encoder = DualEncoder.from_sentence_transformers(saved("one_network", checkpoint, tmp_path_factory.getbasetemp()))
    pairs = encoder.prepare(pictures()[0], TEXTS[0])
    assert "the" in pairs.tokens[0]
    page = encoder.processor.tokenizer.convert_ids_to_tokens(
        pairs.additional_forward_args[encoder.argument_names.index("page_input_ids") - 2][0].tolist()
    )
    assert "a" in page and "the" not in page


def test_a_text_that_is_cut_is_told(checkpoint: Path, tmp_path: Path):
    made = plain(checkpoint, tmp_path)
    made.max_seq_length = 6
    with pytest.warns(UserWarning, match=r"^captions: the model reads 6 tokens, 'a red"):
        DualEncoder.from_sentence_transformers(made).prepare(pictures()[0], "a red square and a blue circle")


def test_a_model_of_texts_alone_is_refused(tmp_path: Path):
    embedders.save_bert(tmp_path)
    made = SentenceTransformer(modules=[Transformer(str(tmp_path)), Pooling(32, "mean")], device="cpu")
    with pytest.raises(TypeError, match=r"^model: .*SentenceTransformer .* got one of text; load another"):
        DualEncoder.from_sentence_transformers(made)


def test_what_is_no_model_is_refused(tmp_path: Path):
    with pytest.raises(OSError, match=r"^model: .* is not a directory"):
        DualEncoder.from_sentence_transformers(tmp_path / "none")
    (tmp_path / "modules.json").write_text('[{"idx": 0, "name": "0", "path": "", "type": "no.such.Module"}]')
    with pytest.raises(OSError, match=r"^model: sentence-transformers cannot load "):
        DualEncoder.from_sentence_transformers(tmp_path)


def test_a_module_of_the_chain_runs_once_per_side(checkpoint: Path, tmp_path: Path):
    made = projected(checkpoint, tmp_path)
    calls = []
    made[1].register_forward_hook(lambda *_: calls.append(1))
    encoder = DualEncoder.from_sentence_transformers(made)
    assert isinstance(made[1], nn.Module)
    pairs = encoder.prepare(pictures(), TEXTS)
    calls.clear()
    encoder(*pairs.inputs, *pairs.additional_forward_args)
    assert len(calls) == 2


def test_a_command_line_names_it(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = saved("projected", checkpoint, tmp_path_factory.getbasetemp())
    assert isinstance(load_named(f"sentence-transformers:{folder}").model, SentenceTransformer)


def test_a_processor_that_writes_no_prompt_is_refused(tmp_path: Path):
    embedders.save_embedding_gemma2(tmp_path)
    processor = transformers.EmbeddingGemma2Processor.from_pretrained(tmp_path)
    encoder = DualEncoder(page_zoo.embedding_gemma2(), processor=processor)
    with pytest.raises(ValueError, match=r"^processor: .* got EmbeddingGemma2Processor; .*from_sentence_transformers"):
        encoder.prepare(pictures()[0], TEXTS[0])


def test_what_a_network_reads_and_is_not_known_is_refused(checkpoint: Path, tmp_path: Path):
    made = plain(checkpoint, tmp_path)
    preprocess = made.preprocess

    def with_positions(inputs: Any, **options: Any) -> dict[str, Any]:
        return {**preprocess(inputs, **options), "position_ids": torch.arange(3)}

    made.preprocess = with_positions
    with pytest.raises(ValueError, match=r"^processor: .* of one text makes position_ids, which its network reads"):
        DualEncoder.from_sentence_transformers(made).prepare(pictures()[0], TEXTS[0])


def test_videos_and_texts(tmp_path: Path):
    torch.manual_seed(0)
    embedders.save_videoprism(tmp_path)
    made = SentenceTransformer(str(tmp_path), device="cpu")
    encoder = DualEncoder.from_sentence_transformers(made)
    frames = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    own = [np.asarray(made.encode([one])).reshape(-1) for one in ({"video": frames}, TEXTS[0])]
    (shown,) = explain(encoder, frames, TEXTS[0], **FEW)
    assert shown.score == pytest.approx(float(made.similarity(*own)), abs=1e-4)
    assert shown.kind == "video" and shown.image_bits.shape == (4, 32, 32) and shown.image_total_bits > 0


def test_sounds_and_texts(tmp_path: Path):
    torch.manual_seed(0)
    embedders.save_clap(tmp_path)
    made = SentenceTransformer(modules=[Transformer(str(tmp_path))], device="cpu")
    encoder = DualEncoder.from_sentence_transformers(made)
    samples = np.random.default_rng(0).normal(size=80_000).astype(np.float32) / 10
    pairs = encoder.prepare([Sound(samples, 16_000)], TEXTS[:1])
    own = [made.encode([one])[0] for one in ({"array": samples, "sampling_rate": 16_000}, TEXTS[0])]
    with torch.no_grad():
        found = float(encoder(*pairs.inputs, *pairs.additional_forward_args))
    assert found == pytest.approx(float(made.similarity(*own)), abs=1e-5)
    (shown,) = explain(encoder, Sound(samples, 16_000), TEXTS[0], **FEW)
    assert shown.kind == "sound" and shown.image_total_bits > 0
    made.prompts = {"query": "find: "}
    with pytest.raises(ValueError, match=r"^processor: this SentenceTransformer puts prompts before its inputs"):
        encoder.prepare(Sound(samples, 16_000), TEXTS[0])
