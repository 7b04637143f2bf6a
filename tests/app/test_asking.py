"""What is asked on the page, without the page: what is refused and how, and what an answer holds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import late
import numpy as np
import pytest
import torch
import zoo
from PIL import Image

from captum_m2ib import DualEncoder, PairInteraction, explain
from captum_m2ib.app import asking
from captum_m2ib.app.asking import MOST_PIXELS, QUALITIES, ask, check_captions, check_picture, fitting, ways
from captum_m2ib.app.serving import Guarded, free_port
from captum_m2ib.attr.registry import METHODS, settings_of
from captum_m2ib.games import interactions
from captum_m2ib.scenes import CHECKPOINT, image_probes

PROBE = image_probes(9, 0, 64)[8]


@pytest.fixture(scope="module")
def encoder() -> DualEncoder:
    return DualEncoder.from_pretrained(CHECKPOINT)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    Image.fromarray(PROBE.image).save(path)
    return path


def test_an_answer_is_what_explain_says(encoder: DualEncoder, picture: Path):
    captions = [PROBE.caption, "a red moon"]
    found = ask(encoder, picture, "\n".join(captions), "grad-eclip")
    plain = explain(encoder, PROBE.image, captions, method="grad-eclip")
    assert [one.caption for one in found.explanations] == captions
    for one, other in zip(found.explanations, plain, strict=True):
        np.testing.assert_array_equal(one.image_bits, other.image_bits)
        assert one.check == other.check
    assert (found.interactions, found.notes) == ((None, None), ())


def test_interactions_are_those_of_the_real_tokens(encoder: DualEncoder, picture: Path):
    found = ask(encoder, picture, f"ring\n{PROBE.caption}", "legrad", words="gradients")
    pairs = encoder.prepare(PROBE.image, PROBE.caption)
    expected = PairInteraction(encoder).attribute(
        pairs.inputs, additional_forward_args=pairs.additional_forward_args, internal_batch_size=16
    )
    assert [len(one) for one in found.interactions] == [len(one.tokens) for one in found.explanations]
    np.testing.assert_allclose(found.interactions[1], expected[0].numpy(), atol=1e-6)


def test_interactions_by_masks_are_those_of_the_game(
    encoder: DualEncoder, picture: Path, monkeypatch: pytest.MonkeyPatch
):
    few = partial(interactions, budget=(256, 32))
    monkeypatch.setattr(asking, "interactions", few)
    found = ask(encoder, picture, PROBE.caption, "legrad", words="masks")
    tokens, (values,) = found.explanations[0].tokens, found.interactions
    game = few(encoder, PROBE.image, PROBE.caption)
    assert set(game.tokens) < set(tokens) and found.notes == ()
    for place, token in enumerate(tokens):
        expected = game.map_of(game.tokens.index(token)) if token in game.tokens else np.zeros((8, 8))
        np.testing.assert_allclose(values[place], expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore::captum_m2ib.NothingToExplainWarning")
def test_what_a_model_cannot_tell_is_said(picture: Path):
    model = zoo.encoder_of(zoo.model_named("colpali"), processor=late.colpali())
    found = ask(model, picture, "a red circle", "similarity-map", words="gradients")
    assert found.interactions == (None,) and "similarity-map" in fitting(model)
    assert any(
        note.startswith("Which patches each word goes with is not known of this model by gradients: ")
        for note in found.notes
    )


@pytest.mark.filterwarnings("ignore::captum_m2ib.NothingToExplainWarning")
@pytest.mark.parametrize(("name", "processor"), [("colpali", late.colpali), ("colqwen2", late.colqwen2)])
def test_words_of_late_interaction_are_told_by_its_matches(name: str, processor: Callable[[], Any], picture: Path):
    model = zoo.encoder_of(zoo.model_named(name), processor=processor())
    assert ways(model) == ["matches", "masks"]
    found = ask(model, picture, "a red circle", "similarity-map", words="matches")
    (explanation,), (values,) = found.explanations, found.interactions
    assert found.notes == () and values is not None and values.shape[1:] == explanation.patch_bits.shape
    pairs = model.prepare(PROBE.image, "a red circle")
    with torch.no_grad():
        matches = model.interaction(*pairs.inputs, *pairs.additional_forward_args)
    real = model.real_tokens(pairs)[0]
    of_patches = matches.matches[0, :, matches.patches[0]][real]
    best = of_patches.amax(1) - of_patches.mean(1)
    counted = matches.counted[0][real].numpy()
    np.testing.assert_allclose(values.max((1, 2))[counted], best.numpy()[counted], atol=1e-5)
    assert (values[~counted] == 0).all() and counted[explanation.tokens.index("red")]


def test_words_of_late_interaction_by_masks_are_those_of_its_own_score(picture: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(asking, "interactions", partial(interactions, budget=(64, 32)))
    model = zoo.encoder_of(zoo.model_named("colpali"), processor=late.colpali())
    found = ask(model, picture, "red circle", "similarity-map", words="masks")
    assert found.notes == () and found.interactions[0] is not None and found.interactions[0].any()


def test_a_score_of_two_embeddings_has_no_matches(encoder: DualEncoder, picture: Path):
    assert ways(encoder) == ["gradients", "masks"]
    found = ask(encoder, picture, "a ring", "legrad", words="matches")
    assert found.interactions == (None,) and "not known of this model by matches" in found.notes[0]


def test_warnings_are_notes(encoder: DualEncoder, picture: Path):
    found = ask(encoder, picture, "a zzz", "legrad", words="gradients")
    assert found.notes == (
        "captions: the model's tokenizer does not know every word of 'a zzz'; unknown words all look the same to the "
        "model.",
    )


def test_captions_are_lines():
    assert check_captions("\n a cat \r\n\na dog\na cat\n") == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("captions", "says"),
    [
        ("", "captions: there is none"),
        (" \n\t", "captions: there is none"),
        ("x" * 10_000, "captions: “x{30}…” has 10,000 characters, more than the 1,000"),
        ("\n".join(map(str, range(9))), "captions: expected at most 8, got 9"),
    ],
)
def test_captions_that_cannot_be(captions: str, says: str, encoder: DualEncoder, picture: Path):
    with pytest.raises(ValueError, match=f"^{says}"):
        ask(encoder, picture, captions)


def test_pictures_that_cannot_be(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^picture: there is none"):
        check_picture(None)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"^picture: cannot read broken.jpg as a picture \(no known format\)"):
        check_picture(broken)
    large = tmp_path / "large.png"
    Image.new("1", (8000, 5000)).save(large)
    with pytest.raises(ValueError, match=r"^picture: large.png has 8000 x 5000 pixels, more than the 32,000,000"):
        check_picture(large)
    assert check_picture(_of_pixels(tmp_path, MOST_PIXELS)).width == 8000


def _of_pixels(folder: Path, count: int) -> Path:
    path = folder / "full.png"
    Image.new("1", (8000, count // 8000)).save(path)
    return path


@pytest.mark.parametrize("quality", QUALITIES)
def test_qualities_are_settings_that_their_methods_take(quality: str):
    for name, settings in QUALITIES[quality].items():
        assert settings_of(name, settings) == settings


def test_a_quality_is_how_often_the_model_runs(encoder: DualEncoder, picture: Path):
    found = ask(encoder, picture, "a ring", "nib", "quick").explanations[0]
    assert found.settings["n_steps"] == QUALITIES["quick"]["nib"]["n_steps"]


def test_names_that_are_none(encoder: DualEncoder, picture: Path):
    with pytest.raises(ValueError, match=r"^method: expected one of m2ib, .*, got 'legard'"):
        ask(encoder, picture, "a ring", "legard")
    with pytest.raises(ValueError, match=r"^quality: expected one of quick, default, fine, got 'best'"):
        ask(encoder, picture, "a ring", quality="best")
    with pytest.raises(ValueError, match=r"^words: expected one of gradients.*, got 'luck'"):
        ask(encoder, picture, "a ring", words="luck")


def test_methods_that_fit_are_offered(encoder: DualEncoder):
    assert fitting(encoder) == [name for name, method in METHODS.items() if not method.late_only]


def test_ports(monkeypatch: pytest.MonkeyPatch):
    port = free_port("127.0.0.1", 0)
    assert port > 0 and free_port("127.0.0.1", port) == port
    with pytest.raises(ValueError, match=r"^--port: expected a number from 0 to 65535, got 70000"):
        free_port("127.0.0.1", 70_000)
    with pytest.raises(ValueError, match=r"^--port: cannot listen at 192.0.2.1, port 7860 \("):
        free_port("192.0.2.1", 7860)


@pytest.mark.parametrize(
    ("host", "status"), [("127.0.0.1:7860", 200), ("127.0.0.1", 200), ("evil.example:7860", 421), ("", 421)]
)
def test_only_who_calls_the_server_by_its_name_is_heard(host: str, status: int):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"secret"})

    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "headers": [(b"host", host.encode())]}
    coroutine = Guarded(app, ("127.0.0.1",))(scope, None, send)
    with pytest.raises(StopIteration):
        coroutine.send(None)
    assert sent[0]["status"] == status and (sent[1]["body"] == b"secret") == (status == 200)
    assert dict(sent[0]["headers"])[b"content-security-policy"].startswith(b"default-src 'self'")
