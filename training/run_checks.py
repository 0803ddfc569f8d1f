"""What is checked before the first step: the folder, impossible combinations, whether a run goes on as it began."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from transformers import TrainingArguments

from fwd2bot.adapter_checkpoint_fwd2bot import OWN_WEIGHTS

from .recipe import Recipe
from .sharding import Sharding
from .source_recipe import SourcesData

# What a run that goes on may have changed: how long it is, what it shows, saves and evaluates, and how it is computed.
MAY_DIFFER = (
    "resume",
    "validation",
    "contrastive.chunk_size",
    "model.compile_layers",
    "training.max_steps",
    "training.num_train_epochs",
    "training.output_dir",
    *(
        f"training.{name}"
        for name in (
            "logging_",
            "save_",
            "eval_",
            "report_to",
            "run_name",
            "disable_tqdm",
            "project",
            "trackio_",
            "push_to_hub",
            "hub_",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "per_device_eval_batch_size",
            "dataloader_pin_memory",
            "dataloader_prefetch_factor",
            "dataloader_persistent_workers",
            "activation_checkpointing",
            "gradient_checkpointing",
            "torch_compile",
            "enable_jit_checkpoint",
        )
    ),
)

RECIPE, PROCESSES = "recipe.json", "processes.json"  # in the folder of a run

# Sections that hold what the user writes, and no more.
FREE = ("training.", "model.config.", "model.adapters.", "optimizer.learning_rates.", "data.questions.")


def check_recipe(recipe: Recipe, args: TrainingArguments, sharding: Sharding | None = None) -> None:
    """Raise `ValueError` for settings that cannot be together, before anything is loaded.

    Args:
        sharding: how the processes of the run divide the backbone, if they do.
    """
    if isinstance(recipe.data, SourcesData) and args.train_sampling_strategy != "random":
        raise ValueError(
            f"training.train_sampling_strategy is {args.train_sampling_strategy}, but the order of samples is that of "
            "the mixture, and each batch is put in the order of its lengths. Leave it out"
        )
    if recipe.kind != "fwd2bot":
        if sharding:
            raise ValueError(
                f"{sharding.method} divides the frozen weights of a Fwd2Bot's backbone, and kind: backbone trains all "
                "it has. Start it with ddp.yaml"
            )
        return
    for name in ("quantization", "train_connector", "compile_layers") if sharding else ():
        if getattr(recipe.model, name):
            method = sharding.method
            raise ValueError(f"model.{name} cannot be with {method}; start the run with ddp.yaml, or leave it out")
    if args.label_smoothing_factor:
        raise ValueError(
            f"training.label_smoothing_factor is {args.label_smoothing_factor}, which the losses of a Fwd2Bot do not "
            "have. Leave it out"
        )
    chunk, batch = recipe.contrastive.chunk_size, args.per_device_train_batch_size
    if chunk is not None and chunk > batch:
        raise ValueError(
            f"contrastive.chunk_size is {chunk}, but a batch has training.per_device_train_batch_size={batch} "
            "samples. Give at most that, or null for the whole batch at once"
        )
    for name in ("loss", "final_weight") if recipe.model.trained_stage == "generate" else ():
        if getattr(recipe.contrastive, name) is not None:
            raise ValueError(
                f"contrastive.{name} has no effect with model.trained_stage=generate, which leaves embeddings as they "
                "are. Leave it out, or train both stages"
            )
    for key in ("contrastive_loss", "train_connector"):
        if key in recipe.model.config:
            place = "contrastive.loss" if key == "contrastive_loss" else "model.train_connector"
            raise ValueError(f"model.config has {key}; set {place} instead")
    if recipe.model.train_connector:
        _check_connector_precision(recipe, args)
    asked = recipe.validation
    if asked.sources and args.eval_strategy == "no" and asked.show_steps is None:
        raise ValueError(
            "validation.sources are never read: set training.eval_strategy=steps (and training.eval_steps) to judge "
            "the run by them or validation.show_steps to look at samples, or leave them out"
        )
    if recipe.model.adapters and recipe.model.init_from:
        raise ValueError("model.adapters are those of model.init_from, which has them already; leave one of them out")


def check_connector(recipe: Recipe, args: TrainingArguments, trained: bool, sharding: Sharding | None = None) -> None:
    """Raise `ValueError` if the connector of `model.init_from` trains, and the run could not save it.

    Args:
        trained: `train_connector` of that model, which the recipe cannot undo.
        sharding: how the processes of the run divide the backbone, if they do.
    """
    if not trained:
        return
    source = recipe.model.init_from
    for name, is_set, remedy in (
        (sharding and sharding.method, sharding, "start the run with ddp.yaml"),
        ("model.quantization", recipe.model.quantization, "leave that out"),
    ):
        if is_set:
            raise ValueError(
                f"{source} was trained with train_connector, which cannot be with {name}: its checkpoints hold the "
                f"adapters alone, and would lose the connector. To go on from it {remedy}; or begin with another model"
            )
    _check_connector_precision(recipe, args)


def _check_connector_precision(recipe: Recipe, args: TrainingArguments) -> None:
    if recipe.model.dtype != "float32" and not args.bf16:
        raise ValueError(
            f"model.train_connector, of the recipe or of model.init_from, trains the connector in float32 inside a "
            f"backbone in {recipe.model.dtype}, which needs training.bf16=true. Set that, or model.dtype=float32"
        )


def check_launched_precision(training: Mapping[str, Any]) -> None:
    """Raise `ValueError` if `accelerate launch` asks for another precision than the recipe's section `training`.

    The Trainer would compute in the launcher's where the recipe has none, and what looks at the recipe's not know it.
    """
    own = next((name for name in ("fp16", "bf16") if training.get(name)), "no")
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if launched not in ("no", own):
        raise ValueError(
            f"the accelerate configuration has mixed_precision {launched} (ACCELERATE_MIXED_PRECISION), and the "
            f"recipe has {own}. Leave it out there: precision is the recipe's, training.bf16=true or fp16=true"
        )


def check_summary_length(recipe: Recipe, most: int) -> None:
    """Raise `ValueError` if the recipe is judged at a length that its model does not have.

    Args:
        most: `num_summary_tokens` of the model, which is that of `model.init_from` if the recipe names one.
    """
    asked = recipe.validation.num_summary_tokens
    if asked is not None and asked > most:
        raise ValueError(
            f"validation.num_summary_tokens is {asked}, but the model has {most} summary tokens. Give at most that, "
            "or null for all of them"
        )


def check_folder(folder: Path, make: bool = True) -> None:
    """Make the folder of a run, and raise `OSError` unless it can be written in.

    Args:
        make: false: only look whether it could be made where there is none.
    """
    place = folder
    try:
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        while not place.exists() and place != place.parent:
            place = place.parent
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OSError(
            f"training.output_dir is {str(folder)!r}, which cannot be written ({error.strerror}). Choose another "
            "folder, or change its rights"
        ) from error


def write_whole(path: Path, text: str) -> None:
    """Write a text file, which a reader and a kill find as it was or as it will be."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def check_same_run(
    recipe: Recipe, folder: Path, checkpoint: Path | None, world_size: int | None, sharding: Sharding | None = None
) -> None:
    """Raise `ValueError`, naming what differs, if the run of a checkpoint was begun otherwise.

    Args:
        world_size: processes of this start. With another number the samples that come next are others: some rows would
            be skipped and some learnt twice. None: not looked at.
        sharding: how this start divides the backbone; then a checkpoint holds the adapters alone.
    """
    if checkpoint is None:
        return
    if sharding and not (checkpoint / OWN_WEIGHTS).is_file():
        raise ValueError(
            f"{checkpoint} has the whole backbone, and a run with {sharding.method} saves and loads the adapters "
            "alone. Go on with it as it was begun (ddp.yaml), or choose another training.output_dir"
        )
    stored = folder / RECIPE
    before = _completed(json.loads(stored.read_text()), recipe) if stored.is_file() else None
    if before is not None and before["kind"] == recipe.kind == "fwd2bot":
        _check_same_parts(before["model"], recipe, folder, checkpoint)
    if recipe.resume == "anyway":
        return
    processes = folder / PROCESSES
    count = json.loads(processes.read_text())["world_size"] if processes.is_file() else None
    if None not in (count, world_size) and count != world_size:
        raise ValueError(
            f"{checkpoint} belongs to a run of {count} process(es), and this start has {world_size}. Start {count} "
            "again, choose another training.output_dir, or go on all the same, with other batches and rows, with "
            "resume=anyway"
        )
    if before is None:
        return
    began, now = (dict(flat(values)) for values in (before, recipe.to_dict()))
    keys = [key for key in {**began, **now} if not key.startswith(MAY_DIFFER)]
    differ = differences(began, now, keys)
    if differ:
        raise ValueError(
            f"{checkpoint} belongs to a run with another recipe: {'; '.join(differ)}. Give that recipe again, "
            "choose another training.output_dir, or go on all the same with resume=anyway"
        )


def _check_same_parts(began: Mapping[str, Any], recipe: Recipe, folder: Path, checkpoint: Path) -> None:
    """Raise `ValueError` if other parameters trained; the state of an optimiser tells them by their order alone."""
    for name in ("freeze", "trained_stage", "train_connector"):
        now = getattr(recipe.model, name)
        if began[name] != now:
            trained = folder / "final" if (folder / "final").is_dir() else checkpoint
            raise ValueError(
                f"model.{name} was {began[name]!r} and is {now!r}, but {checkpoint} has the state of an optimizer of "
                "what trained before; resume=anyway does not change that. Give what was, or go on with these weights "
                f"in another training.output_dir, with model.init_from={trained}"
            )


def _completed(began: Mapping[str, Any], section: Any) -> dict[str, Any]:
    """What a run was begun with, with the defaults of fields that its own version did not have yet.

    Args:
        section: a recipe of now, or a part of it.
    """
    values = dict(began)
    for each in dataclasses.fields(section):
        now = getattr(section, each.name)
        if dataclasses.is_dataclass(now) and isinstance(values.get(each.name, {}), Mapping):
            values[each.name] = _completed(values.get(each.name, {}), now)
        elif each.name not in values and each.default is not dataclasses.MISSING:
            values[each.name] = each.default
        elif each.name not in values and each.default_factory is not dataclasses.MISSING:
            values[each.name] = each.default_factory()
    return values


def differences(began: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """In words, which of some keys of a flat recipe were otherwise when it was begun."""
    return [
        f"{key} was {_shown(began, key)} and is {_shown(now, key)}"
        for key in keys
        # a field that the run's own version did not have yet has its default
        if began.get(key) != now.get(key) and (key in began or key.startswith(FREE))
    ]


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested sections as one level, their names joined by dots."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"
