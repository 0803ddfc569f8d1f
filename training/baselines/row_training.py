"""A row of the comparison as a model to train, and its trainer: that of Fwd2Bot itself, without checkpoints."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, TrainerCallback, set_seed

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.backbone_fwd2bot import load_backbone

from ..collator import Fwd2BotCollator
from ..data import CaptionedRows, Packer, draw_pictures
from ..provenance import weights_hash
from ..recipe import OptimizerRecipe, Recipe
from ..source_recipe import SourcesData
from ..sources import SourceCollator, open_sources, run_mixture
from ..train import training_arguments
from ..trainer import Fwd2BotTrainer
from .grid import METHODS, Row

UNWATCHED = {
    "save_strategy": "no",
    "eval_strategy": "no",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "report_to": "none",
    "enable_jit_checkpoint": False,  # a signal ends the row; it is not judged as if it were whole
}


def build(row: Row, recipe: Recipe, backbone: Path) -> tuple[Any, Any]:
    """The untrained model of a row and its processor."""
    set_seed(row.seed)
    method, rank = METHODS[row.method], round(recipe.model.lora_rank * row.rank)
    processor = AutoProcessor.from_pretrained(backbone)
    if method.model is None:
        model = LlavaForConditionalGeneration.from_pretrained(backbone, dtype=torch.float32)
        return model, processor
    loaded = load_backbone(backbone, dtype=torch.float32)
    longest = max(row.lengths) if row.lengths else loaded.config.image_seq_length
    ranks = {"compress": 1, "generate": 2 * rank} if method.shares else {"compress": rank, "generate": rank}
    model = method.model.from_backbone(
        loaded,
        processor=processor,
        adapters={stage: {"r": r, "lora_alpha": r} for stage, r in ranks.items()},
        num_summary_tokens=longest,
        summary_lengths=row.lengths or [longest],
        **{**recipe.model.config, **row.config},
    )
    model.set_attn_implementation("eager")
    for parameter in model.mark_trainable().values():
        parameter.data = parameter.data.float()
    prompts = {name: getattr(model.config, name) for name in ("image_prompt", "text_prompt")}
    return model, method.processor(processor, **prompts)


def build_trainer(row: Row, recipe: Recipe, model: Any, processor: Any, options: dict[str, Any]) -> Fwd2BotTrainer:
    """The trainer, on drawn scenes or on the recipe's data sets; nothing is saved or evaluated on the way."""
    values = {**recipe.training, **UNWATCHED, "max_steps": options["steps"], "seed": row.seed}
    args = training_arguments({**values, "logging_steps": max(1, options["steps"] // 20)})
    with_texts = METHODS[row.method].embeds
    if isinstance(recipe.data, SourcesData):
        dataset = run_mixture(open_sources(recipe.data), recipe.data, processor, args)
        collator = SourceCollator(processor, recipe.contrastive.chunk_size, with_texts)
    else:
        pictures = draw_pictures(recipe.data, Path(args.output_dir).parent / "pictures")
        dataset = CaptionedRows(recipe.data, pictures, Packer(processor.tokenizer, 1))
        collator = Fwd2BotCollator(processor, recipe.data, recipe.data.row_length, with_texts)
    trainer = Fwd2BotTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=processor,
        optimizer_recipe=slowed(recipe.optimizer, row.rate),
    )
    if options["minutes"] is not None:
        trainer.add_callback(_StopAfter(60 * options["minutes"]))
    return trainer


def slowed(optimizer: OptimizerRecipe, rate: float) -> OptimizerRecipe:
    """The recipe's optimizer with all its learning rates times `rate`."""
    return dataclasses.replace(
        optimizer,
        learning_rate=rate * optimizer.learning_rate,
        matrix_learning_rate=rate * optimizer.matrix_learning_rate,
        learning_rates={role: rate * value for role, value in optimizer.learning_rates.items()},
    )


class _StopAfter(TrainerCallback):
    """Ends the training of a row after so many seconds; `steps_done` says where."""

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() > self.end:
            control.should_training_stop = True


def bare_backbone(source: str, folder: Path) -> Path:
    """The folder of a plain backbone: `source` itself, or the one inside a Fwd2Bot, taken out into `folder`.

    Raises:
        ValueError: `source` is no LLaVA and no Fwd2Bot on one, or `folder` has the backbone of another Fwd2Bot.
    """
    if not Path(source).is_dir() and (Path(source).is_absolute() or source.count("/") != 1):
        raise ValueError(
            f"{source} is no folder, and no name on the Hub (owner/name). Name a LLaVA, or a Fwd2Bot on one."
        )
    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:  # transformers says it in several lines, about the Hub first
        raise ValueError(f"{source} has no config.json here, nor on the Hub; name a LLaVA, or a Fwd2Bot") from error
    kind = getattr(config, "backbone_config", config).model_type
    if kind != "llava":
        raise ValueError(f"{source} is a {kind}; the comparison is written for LLaVA. Name one, or a Fwd2Bot on one.")
    if config.model_type == "llava":
        return Path(source)
    taken_from, name = folder / "taken_from.txt", weights_hash(Path(source)) if Path(source).is_dir() else source
    if taken_from.exists() and taken_from.read_text() != name:
        raise ValueError(f"{folder} has the backbone of another Fwd2Bot than {source}. Name another output folder.")
    if not (folder / "config.json").exists():
        model = Fwd2BotForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
        taken = model.backbone.state_dict().items()
        state = {
            name.replace(".base_layer.", "."): value
            for name, value in taken
            if ".lora_" not in name and not name.endswith(".summary_queries")
        }
        backbone = LlavaForConditionalGeneration(model.config.backbone_config)
        backbone.load_state_dict(state)
        backbone.generation_config = model.generation_config
        Fwd2BotProcessor.from_pretrained(source).backbone_processor.save_pretrained(folder)
        backbone.save_pretrained(folder)
        taken_from.write_text(name)
    return folder
