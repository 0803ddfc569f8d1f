"""The validation samples of a recipe, read once, and what is judged by them."""

import dataclasses

from transformers import TrainingArguments

from fwd2bot import Fwd2BotProcessor

from .recipe import Recipe
from .source_recipe import SourcesData
from .sources import SourceMixture, open_sources
from .sources.conversations import ConversationEncoder
from .sources.samples import SamplePreparer
from .validation import Validation, figure_names


def validation_of(recipe: Recipe, processor: Fwd2BotProcessor, args: TrainingArguments) -> Validation | None:
    """What evaluates a run of this recipe; None without validation sources.

    The samples are read here, so that every evaluation sees the same ones, in the same order, on all processes; no row
    is among them twice.

    Raises:
        ValueError: when `training.metric_for_best_model` is not among the figures of these samples, or a setting needs
            validation sources and there are none.
    """
    asked = recipe.validation
    best = args.metric_for_best_model
    if not asked.sources:
        named = [name for name in ("patience", "show_steps") if getattr(asked, name) is not None]
        if named or best is not None or args.eval_strategy != "no":
            reason = f"validation.{named[0]}" if named else "training.eval_strategy or metric_for_best_model"
            raise ValueError(f"{reason} needs samples to judge by; give validation.sources, or leave it out")
        return None
    drawn = recipe.data if isinstance(recipe.data, SourcesData) else SourcesData(sources=asked.sources)
    data = dataclasses.replace(drawn, sources=asked.sources, seed=0)
    prepare = SamplePreparer(data, ConversationEncoder(processor))
    samples = SourceMixture(open_sources(data), data, prepare, length=0).each_row_once(asked.samples)
    if best is not None:
        names = ["eval_loss", *(f"eval_{name}" for name in figure_names(samples))]
        if f"eval_{best.removeprefix('eval_')}" not in names:
            raise ValueError(
                f"training.metric_for_best_model is {best}, but the validation sources give {', '.join(names)}; "
                "choose one of these, or other sources"
            )
        if best.removeprefix("eval_") != "loss" and args.greater_is_better is not True:
            raise ValueError(f"{best} is better when it is greater; set training.greater_is_better=true")
    if asked.patience is not None and not (args.load_best_model_at_end and best is not None):
        raise ValueError(
            "validation.patience needs training.load_best_model_at_end=true and training.metric_for_best_model"
        )
    return Validation(
        processor, samples, args.per_device_eval_batch_size, asked.num_summary_tokens, asked.max_new_tokens
    )
