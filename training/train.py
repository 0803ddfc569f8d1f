"""`python -m fwd2bot.training.train RECIPE.yaml [key=value ...]`: train a backbone or a Fwd2Bot from a recipe."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaForConditionalGeneration,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from fwd2bot import Fwd2BotProcessor
from fwd2bot.folder_fwd2bot import check_name

from .backbone import build_backbone, build_processor, resample_patches
from .check import check
from .collator import BackboneCollator, Fwd2BotCollator
from .commands import COMMAND, command_of
from .data import CaptionedRows, Packer, TrainingRows, draw_pictures
from .early_stopping import EarlyStopping
from .fwd2bot_model import build_fwd2bot
from .recipe import Recipe, load_recipe
from .run_checks import (
    PROCESSES,
    RECIPE,
    check_folder,
    check_launched_precision,
    check_recipe,
    check_same_run,
    check_summary_length,
    write_whole,
)
from .samples import SampleCallback
from .scenes import corpus
from .sharding import Sharding, shard_frozen, take_over_sharding
from .source_recipe import SourcesData
from .sources import SourceBackboneCollator, SourceCollator, UnusableRowsError, open_sources, run_mixture, texts_of
from .tokenizer import train_tokenizer
from .trainer import BackboneTrainer, Fwd2BotTrainer, StageTrainer, newest_checkpoint
from .validation_data import validation_of

logger = logging.get_logger(__name__)

INTERRUPTED = 130  # exit code


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fwd2bot.training.train", description=__doc__)
    parser.add_argument(
        "recipe", help="a YAML file, or a recipe of the package, such as fwd2bot.yaml or llava15_7b.yaml"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as training.max_steps=100")
    parser.add_argument("--check", action="store_true", help="look at a sample of everything, and train nothing")
    parser.add_argument(
        "--processes", type=int, metavar="N", help="with --check: what each of N processes of fsdp2.yaml would hold"
    )
    options = parser.parse_intermixed_args(arguments)  # overrides may stand behind --check
    if options.processes is not None and not options.check:
        parser.error("--processes belongs to --check; accelerate launch --num_processes N starts N of them")
    try:
        recipe = load_recipe(options.recipe, options.overrides)
        if options.check:
            logging.set_verbosity_warning()  # its tables are what is to be read
            logging.disable_progress_bar()
            return check(recipe, processes=options.processes)
        logging.set_verbosity_info()
        trainer = build_trainer(recipe)
        if trainer.args.process_index == 0:  # for the model card
            command = command_of("train", sys.argv[1:] if arguments is None else arguments)
            write_whole(Path(trainer.args.output_dir) / COMMAND, command + "\n")
    except (ValueError, OSError, ImportError, UnusableRowsError) as error:
        sys.exit(f"error: {error}")
    try:
        folder = run(trainer, recipe)
    except UnusableRowsError as error:  # from a worker it comes with the worker's traceback before its own words
        sys.exit(f"error: {str(error).strip().splitlines()[-1].rpartition('UnusableRowsError: ')[2]}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(INTERRUPTED)
    print(f"saved {folder}" if folder else "stopped before the last step; the same command goes on from there")


def train(recipe: Recipe) -> Path | None:
    """Run a recipe to its end, from its newest complete checkpoint if `recipe.resume`.

    Returns the folder of the trained model and its processor, `final` under `training.output_dir`; None if the run was
    stopped before its last step, so that there is only a checkpoint to go on from.
    """
    return run(build_trainer(recipe), recipe)


def run(trainer: StageTrainer, recipe: Recipe) -> Path | None:
    """Train what `build_trainer` made of the recipe; see `train`."""
    output_dir = Path(trainer.args.output_dir)
    checkpoint = newest_checkpoint(output_dir) if recipe.resume else None
    if checkpoint is not None:
        logger.info(f"resuming from {checkpoint}")
    stopping = next((each for each in trainer.callback_handler.callbacks if isinstance(each, EarlyStopping)), None)
    if stopping is not None and checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        stopping.count_on_from(state)
    if stopping is not None and stopping.stops:
        logger.info(f"the run stopped early at step {state.global_step}; a larger validation.patience goes on with it")
        trainer.end_as(state, checkpoint)
    else:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    stopped_early = stopping is not None and stopping.stops
    if trainer.state.global_step < trainer.state.max_steps and not stopped_early:
        return None  # a signal stopped it, see training.enable_jit_checkpoint
    final = output_dir / "final"
    trainer.save_final(final)
    return final


def build_trainer(recipe: Recipe) -> StageTrainer:
    """Model, data, collator and trainer of a recipe, ready to run.

    Raises:
        ValueError: for settings that cannot be together, or a run in this folder that was begun with another recipe.
        OSError: for a folder that cannot be written.
    """
    sharding = take_over_sharding()
    args = training_arguments(recipe.training)
    check_recipe(recipe, args, sharding)
    output_dir = Path(args.output_dir)
    with args.main_process_first(local=False):
        check_folder(output_dir)
        checkpoint = newest_checkpoint(output_dir) if recipe.resume else None
        check_same_run(recipe, output_dir, checkpoint, args.world_size, sharding)
        if args.process_index == 0:
            write_whole(output_dir / RECIPE, json.dumps(recipe.to_dict(), indent=2) + "\n")
            write_whole(output_dir / PROCESSES, json.dumps({"world_size": args.world_size}) + "\n")
    set_seed(args.seed)
    if recipe.kind == "backbone":
        return _backbone_stage(recipe, args)
    return _fwd2bot_stage(recipe, args, sharding)


def training_arguments(values: dict[str, Any]) -> TrainingArguments:
    """The Trainer's arguments; columns are never dropped, since our batches hold more than forward() names.

    Raises `ValueError` for a precision that the device of the run does not have, or that the launcher contradicts.

    `gradient_checkpointing`, the name before transformers 5.23, goes under the new one where there is one, so that one
    recipe serves all versions.
    """
    check_launched_precision(values)
    named = {"remove_unused_columns": False, **values}
    if hasattr(TrainingArguments, "activation_checkpointing"):
        for old in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            if old in named:
                named.setdefault(old.replace("gradient", "activation"), named.pop(old))
    on_cpu = named.get("use_cpu") or not torch.accelerator.is_available()
    if on_cpu and named.get("fp16"):
        raise ValueError("training.fp16 has no effect on a CPU; leave it out, or use training.bf16")
    if on_cpu and named.get("bf16") and not named.get("use_cpu"):
        raise ValueError(
            "training.bf16 is for an accelerator, and torch finds none on this machine. To train on the CPU set "
            "training.use_cpu=true (and training.bf16=false, unless it has AMX)"
        )
    return TrainingArguments(**named)


def _backbone_stage(recipe: Recipe, args: TrainingArguments) -> StageTrainer:
    sources = open_sources(recipe.data) if isinstance(recipe.data, SourcesData) else None
    if recipe.model.init_from:
        check_name(recipe.model.init_from, "backbone")
        kind = AutoConfig.from_pretrained(recipe.model.init_from).model_type
        if kind != "llava":
            raise ValueError(
                f"model.init_from is {recipe.model.init_from}, a {kind}, and kind: backbone goes on with a LLaVA. "
                "Name the folder of one; to go on with a Fwd2Bot use a recipe of kind fwd2bot"
            )
        processor = AutoProcessor.from_pretrained(recipe.model.init_from)
        model = LlavaForConditionalGeneration.from_pretrained(
            recipe.model.init_from, dtype=torch.float32, attn_implementation=recipe.model.attn_implementation
        )
        if recipe.model.resample_patches is not None:
            model = resample_patches(model, processor, recipe.model.resample_patches)
    else:
        if sources is None:
            texts = corpus(recipe.data.tokenizer_scenes, shapes_only=recipe.data.shapes_only)
        else:
            texts = texts_of(sources, recipe.data)
        tokenizer = train_tokenizer(texts, recipe.model.vocab_size, recipe.model.max_position_embeddings)
        processor = build_processor(recipe.model, tokenizer)
        model = build_backbone(recipe.model, tokenizer)
    if sources is None:
        packer = Packer(processor.tokenizer, model.config.image_seq_length)
        rows = TrainingRows(recipe.data, _pictures(recipe, args), packer)
        collator = BackboneCollator(processor, recipe.data.row_length)
    else:
        prompts = Fwd2BotProcessor(processor)
        rows, collator = run_mixture(sources, recipe.data, prompts, args), SourceBackboneCollator(prompts)
    return BackboneTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=collator,
        processing_class=processor,
        optimizer_recipe=recipe.optimizer,
    )


def _fwd2bot_stage(recipe: Recipe, args: TrainingArguments, sharding: Sharding | None) -> StageTrainer:
    sources = open_sources(recipe.data) if isinstance(recipe.data, SourcesData) else None
    model, backbone_processor = build_fwd2bot(recipe, args, sharding)
    if sharding is not None:
        shard_frozen(model, args.device, sharding)
    processor = Fwd2BotProcessor(
        backbone_processor, image_prompt=model.config.image_prompt, text_prompt=model.config.text_prompt
    )
    with_texts = recipe.model.trained_stage == "both"
    if sources is None:
        several = recipe.data.several
        packer = Packer(processor.tokenizer, 1, (1, *several.pictures) if several.share else (1,))
        rows = CaptionedRows(recipe.data, _pictures(recipe, args), packer)
        chunk_size = recipe.contrastive.chunk_size
        collator = Fwd2BotCollator(processor, recipe.data, recipe.data.row_length, with_texts, chunk_size)
    else:
        rows = run_mixture(sources, recipe.data, processor, args)
        collator = SourceCollator(processor, recipe.contrastive.chunk_size, with_texts)
    check_summary_length(recipe, model.config.num_summary_tokens)
    validation = validation_of(recipe, processor, args)
    trainer = Fwd2BotTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=validation.samples if validation else None,
        data_collator=collator,
        processing_class=processor,
        optimizer_recipe=recipe.optimizer,
        trained_stage=recipe.model.trained_stage,
        freeze=recipe.model.freeze,
        gather=recipe.contrastive.gather,
        final_contrastive_loss_weight=recipe.contrastive.final_weight,
        validation=validation,
    )
    if recipe.validation.patience is not None:
        trainer.add_callback(EarlyStopping(recipe.validation.patience))
    if validation is not None and recipe.validation.show_steps is not None:
        trainer.add_callback(SampleCallback(trainer, validation, recipe.validation.show_steps))
    return trainer


def _pictures(recipe: Recipe, args: TrainingArguments):
    return draw_pictures(recipe.data, Path(args.output_dir) / "pictures")


if __name__ == "__main__":
    main()
