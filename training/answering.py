"""Prompts through a model: greedy answers to questions about pictures, from the pictures or from their summaries."""

import random
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from fwd2bot.backbone_fwd2bot import merged_token_id
from fwd2bot.processing_fwd2bot import adds_special_tokens

from .metrics import exact_match
from .scenes import DESCRIBE, Question, Scene

ANSWER_TOKENS = 12  # more than any answer of the drawn world has
CAPTION_TOKENS = 96  # more than any full description has

Asked = tuple[tuple[int, ...], Question]  # the numbers of the pictures that a prompt shows, and its question


def answer(asked: list[Asked], processor: Any, batch_size: int, generate: Callable) -> list[str]:
    """An answer per question.

    Args:
        processor: of the backbone; its chat template and tokenizer are used.
        generate: called with the picture numbers of each prompt and the prompts, returns the new ids alone.
    """

    @cache
    def prompt(text: str, pictures: int) -> str:
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": text}]
        return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)

    answers = []
    for part in tqdm(list(slices(len(asked), batch_size)), desc="answer", leave=False):
        shown = [pictures for pictures, _ in asked[part]]
        new_ids = generate(shown, [prompt(question.text, len(pictures)) for pictures, question in asked[part]])
        answers += [text.strip() for text in processor.tokenizer.batch_decode(new_ids, skip_special_tokens=True)]
    return answers


def ask_for_captions(pictures: int) -> list[Asked]:
    """The prompt for a full description of each picture, for `answer`; `generate` needs `CAPTION_TOKENS`."""
    return [((index,), Question("describe", DESCRIBE, "")) for index in range(pictures)]


def answer_uncompressed(
    model: Any, processor: Any, images: list[list], prompts: list[str], max_new_tokens: int = ANSWER_TOKENS
) -> torch.Tensor:
    """New ids `(N, T)` from the pictures themselves, `images` being those of each prompt."""
    inputs = uncompressed_inputs(model, processor, images, prompts)
    generate = getattr(model, "generate_uncompressed", model.generate)
    new_ids = generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return new_ids[:, inputs["input_ids"].shape[1] :]


def uncompressed_inputs(model: Any, processor: Any, images: list[list], prompts: list[str]) -> Any:
    """What the bare backbone reads of pictures and prompts."""
    inputs = processor(
        images=images,
        text=prompts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=adds_special_tokens(processor.tokenizer, prompts),
    ).to(model.device)
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return inputs


def answer_from_summary(
    model: Any, processor: Any, summary: Any, prompts: list[str], max_new_tokens: int = ANSWER_TOKENS
) -> torch.Tensor:
    """New ids `(N, T)` from the summaries of all pictures of the prompts, in order."""
    inputs = processor(text=prompts).to(model.device)
    new_ids = model.generate_from_summary(summary, **inputs, max_new_tokens=max_new_tokens, do_sample=False)
    return new_ids[:, inputs["input_ids"].shape[1] :]


def image_tokens(processor: Any) -> int:
    """Number of image tokens that the backbone reads for one picture."""
    turn = {"role": "user", "content": [{"type": "image"}]}
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    inputs = processor(images=[[Image.new("RGB", (96, 96))]], text=[prompt], return_tensors="pt")
    return int((inputs["input_ids"] == merged_token_id(processor)).sum())


def right_by_kind(asked: list[Asked], answers: list[str]) -> dict[str, float]:
    """Share of right answers per kind of question, and of all under "all"."""
    return exact_match(answers, [question.answer for _, question in asked], [question.kind for _, question in asked])


def right_by_pictures(asked: list[Asked], answers: list[str]) -> dict[str, float]:
    """Share of right answers per number of pictures in the prompt."""
    figures = exact_match(answers, [question.answer for _, question in asked], [str(len(shown)) for shown, _ in asked])
    return {name: figure for name, figure in figures.items() if name != "all"}


def scene_rng(purpose: str, one: Scene) -> random.Random:
    """The source of chance for the texts of a scene in an evaluation; the same each time."""
    return random.Random(f"evaluate/{purpose}/{one.split}/{one.index}")


def slices(total: int, size: int) -> Iterator[slice]:
    """0..total in parts of `size`."""
    return (slice(start, min(start + size, total)) for start in range(0, total, size))
