"""From a recipe's `data.sources` to what a Trainer takes: the mixture of a whole run, the texts of a tokenizer."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

from transformers import TrainingArguments

from fwd2bot import Fwd2BotProcessor

from ..source_recipe import SourcesData
from .conversations import ConversationEncoder
from .mixture import Source, SourceMixture
from .rows import MalformedRowError
from .samples import SamplePreparer


def open_sources(data: SourcesData) -> list[Source]:
    """All sources of a recipe; see `Source` for the errors."""
    return [Source(recipe) for recipe in data.sources]


def run_mixture(
    sources: list[Source], data: SourcesData, processor: Fwd2BotProcessor, args: TrainingArguments
) -> SourceMixture:
    """The samples of a whole run, as one epoch of the Trainer; sets `args.max_steps` where the recipe has epochs.

    An epoch of the recipe (`training.num_train_epochs`) is as many samples as all sources have rows together.

    Raises:
        ValueError: for epochs of streamed sources, whose number of rows is not known.
        UnusableRowsError: for a source that begins with more broken rows than may be.
    """
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.max_steps <= 0:
        streamed = [source.recipe.name for source in sources if source.streamed]
        if streamed:
            raise ValueError(
                f"data.sources[{streamed[0]!r}] is streamed, so that an epoch has no known length; give "
                "training.max_steps"
            )
        rows = sum(len(source) for source in sources)
        args.max_steps = max(1, int(-(-args.num_train_epochs * rows // per_step)))
    prepare = SamplePreparer(data, ConversationEncoder(processor))
    length = args.max_steps * per_step
    mixture = SourceMixture(sources, data, prepare, length, args.train_batch_size, args.world_size)
    mixture.check_sources()
    return mixture


def texts_of(sources: list[Source], data: SourcesData) -> Iterator[str]:
    """Texts that a tokenizer is trained on: the caption prompts, and about `data.tokenizer_texts` rows of all sources.

    Each source gives as many rows as its share of the samples, but none twice. Malformed ones are left out.
    """
    yield from data.caption_prompts
    weights = sum(source.recipe.weight for source in sources)
    for source in sources:
        count = math.ceil(data.tokenizer_texts * source.recipe.weight / weights)
        for number, row in itertools.islice(source.epoch(data.seed), count):
            try:
                yield from _texts_in(source.read(row, number))
            except MalformedRowError:
                continue


def _texts_in(sample: dict[str, Any]) -> Iterator[str]:
    yield from sample["captions"]
    for message in sample["messages"] or ():
        yield from (part["text"] for part in message["content"] if part["type"] == "text")
