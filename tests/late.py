"""Processors of late-interaction models, made of their own classes with a small vocabulary and small pages."""

from __future__ import annotations

from typing import Any

import transformers
from tiny_parts import LEGACY, reader_of
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers

WORDS = ("a", "red", "blue", "circle", "revenue", "2024", "2025", "chart", "of", "Question", "Query", "Describe", "the")
SPECIAL = {1: "<pad>", 62: "<s>", 60: "<fake_token_around_image>", 59: "<end_of_utterance>"}
IMAGE = 61


def tokenizer(
    image: str = "<image>", others: dict[int, str] | None = None, kind: str = "PreTrainedTokenizerFast", **named: Any
) -> Any:
    """Words, and what processors write around them; the ids of special tokens are those of the zoo's models.

    Processors of transformers 4 take no other kind than their own.
    """
    names = [f"<unused_{index}>" for index in range(64)]
    for place, word in enumerate((*WORDS, "<unk>", "\n", ":", ".", "image", "User", "Assistant")):
        names[place + 5] = word
    special = {**SPECIAL, IMAGE: image, **(others or {})}
    for place, name in special.items():
        names[place] = name
    made = Tokenizer(models.WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|\w+|[^\w\s]"), "removed", invert=True)
    made.add_special_tokens([AddedToken(name, special=True) for name in special.values()])
    make = getattr(transformers, kind if LEGACY else "PreTrainedTokenizerFast")
    own = {"eos_token": None, "add_bos_token": False} if make is not transformers.PreTrainedTokenizerFast else {}
    return make(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        model_max_length=64,
        **own,
        **named,
    )


def colpali() -> Any:
    reader = reader_of("siglip", "SiglipImageProcessor")(size={"height": 32, "width": 32})
    reader.image_seq_length = 16
    return transformers.ColPaliProcessor(reader, tokenizer(kind="GemmaTokenizerFast"))


def colqwen2() -> Any:
    size = {"shortest_edge": 16 * 16, "longest_edge": 40 * 32}
    reader = reader_of("qwen2_vl", "Qwen2VLImageProcessor")(size=size, patch_size=8)
    return transformers.ColQwen2Processor(
        reader,
        tokenizer("<|image_pad|>", kind="Qwen2TokenizerFast"),
        visual_prompt_prefix="<s><|image_pad|>Describe the image.",
    )


# A document is a page alone; a query ends in tokens that it may be read at.
NEOMME_TEMPLATE = """\
{% for message in messages %}{% for part in message.content %}\
{% if task == 'document' %}<doc><image>{% else %}<query>{{ part.text }}<mask><mask>{% endif %}\
{% endfor %}{% endfor %}"""


def neomme(chat_template: str | None = NEOMME_TEMPLATE) -> Any:
    reader = transformers.NeoMMEImageProcessor(patch_size=8, max_side=32)
    others = {60: "<doc>", 58: "<row>", 57: "<query>"}
    named = {f"{name}_token": token for name, token in zip(("document", "row", "query"), others.values(), strict=True)}
    words = tokenizer(
        others={**others, 56: "<mask>"}, mask_token="<mask>", extra_special_tokens={**named, "image_token": "<image>"}
    )
    return transformers.NeoMMEProcessor(reader, words, chat_template=chat_template)


def colmodernvbert() -> Any:
    """Pages as tiles of 32 pixels, and a thumbnail."""
    reader = reader_of("idefics3", "Idefics3ImageProcessor")(
        size={"longest_edge": 64}, max_image_size={"longest_edge": 32}
    )
    return transformers.ColModernVBertProcessor(
        reader, tokenizer(), image_seq_len=4, visual_prompt_prefix="<s>User:<image>Describe the image."
    )
