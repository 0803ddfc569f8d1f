"""What a trained row of the comparison can do, on held-out drawn scenes or on the data sets of a recipe."""

import dataclasses
from typing import Any

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor

from ..evaluate import evaluate_model
from ..figures import source_figures
from ..recipe import Recipe
from ..source_evaluation import cost_of, settings_of
from ..source_reader import SourceReader
from ..source_recipe import SourcesData
from ..sources import open_sources
from .grid import METHODS, Row

PRESENCE = 100  # pictures that are asked about what they do not show, twelve to eighteen questions each


def judge(row: Row, recipe: Recipe, model: Any, processor: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row, for each setting ("uncompressed" or "k=..."), and under "cost" what each costs.

    Args:
        model, processor: of the row, in evaluation mode; the bare backbone and its own for the row without training.
        options: see `run.run_row`.
    """
    method = METHODS[row.method]
    lengths = row.lengths or ([model.config.num_summary_tokens] if method.model else [])
    if isinstance(recipe.data, SourcesData):
        return _judge_on_sources(recipe, model, processor, lengths, options, method.embeds)
    return evaluate_model(
        model,
        processor,
        split=options["split"],
        pictures=options["test_pictures"],
        questions=5,
        retrieval=options["test_pictures"] if method.embeds else 0,
        several=0,
        presence=min(PRESENCE, options["test_pictures"]),
        lengths=lengths or None,
        shapes_only=recipe.data.shapes_only,
        uncompressed=method.model is None,
    )


def _judge_on_sources(
    recipe: Recipe, model: Any, processor: Any, lengths: list[int], options: dict[str, Any], embeds: bool
) -> dict[str, Any]:
    """For each setting the figures of every source under its name."""
    if not lengths:  # a Fwd2Bot whose bare backbone is asked
        model = Fwd2BotForConditionalGeneration.from_backbone(model, processor=processor, num_summary_tokens=1).eval()
        processor = Fwd2BotProcessor(processor)
    data = dataclasses.replace(recipe.data, sources=recipe.validation.sources)
    figures: dict[str, Any] = {"judged": {}}
    for source in open_sources(data):
        reader = SourceReader(source, data, processor)
        found = source_figures(
            model,
            processor,
            reader,
            lengths,
            limit=options["test_pictures"],
            batch_size=50,
            max_new_tokens=recipe.validation.max_new_tokens,
            uncompressed=not lengths,
            retrieval=embeds,
        )
        name = source.recipe.name
        figures["judged"][name] = {what: found[what] for what in ("rows", "pictures", "captions") if what in found}
        for setting in settings_of(found):
            figures.setdefault(setting, {})[name] = found[setting]
        if "cost" not in figures:
            first = next(SourceReader(source, data, processor)(1))
            figures["cost"] = cost_of(model, processor, first, lengths, uncompressed=not lengths)
    return figures
