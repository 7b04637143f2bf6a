"""The page itself, of Gradio: what is asked on the left, and the answer as the page that an explanation is saved as."""

from __future__ import annotations

import html
import os
import re
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captum_m2ib.app.asking import MOST_CAPTIONS, QUALITIES, Answer, ask, fitting, ways
from captum_m2ib.attr.registry import METHODS
from captum_m2ib.encoders.dual_encoder import DualEncoder
from captum_m2ib.explanations.page import to_html

if TYPE_CHECKING:
    import gradio

_KINDS = ("png", "html", "json")
_OFF = "off"
_EMPTY = '<p id="empty">Drop a picture, type a caption, and press “Explain”. Or start from an example.</p>'
# An answer is forgotten after an hour, a file after it has been shown for as long.
_KEPT_SECONDS = 3600


def import_gradio() -> Any:
    r"""Gradio, told to send nothing about its use.

    Returns:
        module: gradio.

    Raises:
        ImportError: if it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(f"the app needs Gradio ({error}): pip install 'captum_m2ib[app]'") from error
    return gradio


def make_blocks(encoder: DualEncoder, name: str, examples: Sequence[tuple[Path, str]], folder: Path) -> gradio.Blocks:
    r"""The page for one model.

    Args:

        encoder (DualEncoder): With a processor.
        name (str): What the page calls the model.
        examples (sequence of (path, str)): Pictures with captions, to start from.
        folder (Path): Where files to download are written.

    Returns:
        gradio.Blocks: not launched yet.

    Raises:
        ImportError: if Gradio is not installed.
        ValueError: if no method can be made of the encoder.
    """
    gr = import_gradio()
    methods = fitting(encoder)
    if not methods:
        raise ValueError("model: no method can be made of it; captum-m2ib explain says of each why.")
    with gr.Blocks(
        title="captum_m2ib", analytics_enabled=False, delete_cache=(600, _KEPT_SECONDS), fill_width=True
    ) as blocks:
        gr.HTML(
            f"<h1>What does the model see in a picture and read in its caption?</h1><p>{html.escape(name)}</p>",
            elem_id="head",
        )
        answer = gr.State(time_to_live=_KEPT_SECONDS)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                picture = gr.Image(
                    label="picture",
                    type="filepath",
                    sources=["upload", "clipboard"],
                    buttons=[],
                    height=260,
                    elem_id="picture",
                )
                picture.preprocess = _as_file
                captions = gr.Textbox(
                    label="captions",
                    info=f"one per line, up to {MOST_CAPTIONS}",
                    placeholder="a photo of a cat",
                    lines=3,
                    max_lines=8,
                    elem_id="captions",
                )
                method = gr.Dropdown(
                    methods,
                    value=methods[0],
                    label="method",
                    info=METHODS[methods[0]].about,
                    filterable=False,
                    elem_id="method",
                )
                quality = gr.Radio(list(QUALITIES), value="default", label="quality", elem_id="quality")
                words = gr.Radio(
                    [_OFF, *ways(encoder)],
                    value=ways(encoder)[0],
                    label="words",
                    info="which patches each one goes with, by",
                    elem_id="words",
                )
                go = gr.Button("Explain", variant="primary", elem_id="go")
                gr.Examples([[str(path), text] for path, text in examples], [picture, captions], label="examples")
            with gr.Column(scale=5, min_width=320):
                problem = gr.HTML(visible=False, elem_id="answer-problem")
                chosen = gr.Radio([], label="caption", visible=False, elem_id="chosen")
                shown = gr.HTML(_EMPTY, elem_id="shown", min_height=300)
                notes = gr.HTML(visible=False, elem_id="answer-notes")
                with gr.Row():
                    downloads = [
                        gr.DownloadButton(f"download {kind}", size="sm", visible=False, elem_id=f"download-{kind}")
                        for kind in _KINDS
                    ]
        show = _shower(gr, folder)
        hidden = [gr.update(visible=False)] * (1 + len(_KINDS))

        def explain_now(
            picture: str | None,
            captions: str,
            method: str,
            quality: str,
            words: str,
            progress: Any = gr.Progress(track_tqdm=True),  # noqa: B008 - where Gradio looks for it
        ) -> Iterator[list[Any]]:
            progress(0, desc="explaining")
            try:
                way = None if words == _OFF else words
                found = ask(encoder, picture, captions, method, quality, words=way, show_progress=True)
                labels = [one.caption for one in found.explanations]
                choice = gr.update(choices=labels, value=labels[0], visible=len(labels) > 1)
                for parts in show(found, labels[0]):
                    yield [found, choice, gr.update(visible=False), *parts]
            except Exception as error:
                # The page outlives whatever one question does to the model.
                if not isinstance(error, ValueError):
                    traceback.print_exception(error)
                yield [None, gr.update(visible=False), gr.update(value=_told(error), visible=True), "", *hidden]

        gr.on(
            [go.click, captions.submit],
            explain_now,
            [picture, captions, method, quality, words],
            [answer, chosen, problem, shown, notes, *downloads],
            show_progress_on=[shown],
            concurrency_limit=1,
            api_visibility="private",
        )
        method.input(_about(gr), method, method, show_progress="hidden", api_visibility="private")
        chosen.input(show, [answer, chosen], [shown, notes, *downloads], api_visibility="private")
    return blocks


def _as_file(payload: Any) -> str | None:
    """A picture as the file that was handed in: Gradio would open it before its size is known."""
    return None if payload is None else payload.path


def _about(gr: Any) -> Callable[[str], Any]:
    def about(method: str) -> Any:
        """What a method is, below its name."""
        return gr.update(info=METHODS[method].about)

    return about


def _shower(gr: Any, folder: Path) -> Callable[[Answer | None, str], Iterator[list[Any]]]:
    def show(answer: Answer | None, caption: str) -> Iterator[list[Any]]:
        """The explanation of one caption and what has to be said beside, and then its files, which take longer."""
        hidden = [gr.update(visible=False)] * len(_KINDS)
        if answer is None:
            yield [_told(ValueError("That answer has been forgotten; press “Explain” again.")), hidden[0], *hidden]
            return
        index = [one.caption for one in answer.explanations].index(caption)
        explanation = answer.explanations[index]
        page = to_html(explanation, interactions=answer.interactions[index])
        lines = [f"{answer.method}, {answer.seconds:.1f} s", *answer.notes]
        notes = f'<div id="notes">{"<br>".join(map(html.escape, lines))}</div>'
        shown = [_frame(page.decode("utf-8"), caption), gr.update(value=notes, visible=True)]
        yield [*shown, *hidden]
        # Gradio copies them, and each answer's lie apart, for two people may ask the same.
        with tempfile.TemporaryDirectory(dir=folder) as made:
            stem = os.path.join(made, _file_name(caption, answer.method))
            paths = [Path(f"{stem}.{kind}") for kind in _KINDS]
            for path in paths:
                if path.suffix == ".html":
                    path.write_bytes(page)
                else:
                    explanation.save(path)
            yield [gr.skip(), gr.skip(), *(gr.update(value=str(path), visible=True) for path in paths)]

    return show


def _frame(page: str, caption: str) -> str:
    """The page in a frame that may run its script and do nothing else."""
    title = html.escape(f"explanation of {caption}")
    return f'<iframe class="explanation" sandbox="allow-scripts" title="{title}" srcdoc="{html.escape(page)}"></iframe>'


def _told(error: Exception) -> str:
    sentence = " ".join(str(error).split()) or type(error).__name__
    return f'<div id="problem" role="alert">{html.escape(sentence)}</div>'


def _file_name(caption: str, method: str) -> str:
    words = re.sub(r"\W+", "_", caption).strip("_")[:40] or "caption"
    return f"{words}-{method}"
