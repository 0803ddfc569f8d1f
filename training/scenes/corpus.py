"""Text of every sort that the model meets, to train a tokenizer on."""

import random
from collections.abc import Iterator

from .captions import short_caption
from .descriptions import DESCRIBE, describe
from .questions import TRAINING_KINDS, ask
from .scene import scene

PROMPTS = ("Summarize the image in a few words.", "Summarize the sentence in a few words.", DESCRIBE)


def corpus(count: int, *, shapes_only: bool = False) -> Iterator[str]:
    """Yield the prompts, then the texts of the first `count` scenes of the train split."""
    for index in range(count):
        if index % 100 == 0:
            yield from PROMPTS
        one = scene("train", index, shapes_only=shapes_only)
        rng = random.Random(f"corpus/{index}")
        yield describe(one, rng)
        yield short_caption(one, rng).text
        for question in ask(one, rng, 8, TRAINING_KINDS):
            yield question.text
            yield question.answer
