"""What is checked before the first step: the folder, impossible combinations, whether a run goes on as it began."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from transformers import TrainingArguments

from .recipe import Recipe

# What a run that goes on may have changed: how long it is, what it shows, saves and evaluates, and how it is computed.
MAY_DIFFER = (
    "resume",
    "validation",
    "contrastive.chunk_size",
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

# Sections that hold what the user writes, and no more.
FREE = ("training.", "model.config.", "model.adapters.", "optimizer.learning_rates.", "data.questions.")


def check_recipe(recipe: Recipe, args: TrainingArguments) -> None:
    """Raise `ValueError` for settings that cannot be together, before anything is loaded."""
    if recipe.kind != "fwd2bot":
        return
    chunk, batch = recipe.contrastive.chunk_size, args.per_device_train_batch_size
    if chunk is not None and chunk > batch:
        raise ValueError(
            f"contrastive.chunk_size is {chunk}, but a batch has training.per_device_train_batch_size={batch} "
            "samples. Give at most that, or null for the whole batch at once"
        )
    if recipe.contrastive.loss is not None and recipe.model.trained_stage == "generate":
        raise ValueError(
            "contrastive.loss has no effect with model.trained_stage=generate, which leaves embeddings as they are. "
            "Leave it out, or train both stages"
        )
    for key in ("contrastive_loss", "train_connector"):
        if key in recipe.model.config:
            place = "contrastive.loss" if key == "contrastive_loss" else "model.train_connector"
            raise ValueError(f"model.config has {key}; set {place} instead")
    if recipe.model.train_connector and recipe.model.dtype != "float32" and not args.bf16:
        raise ValueError(
            f"model.train_connector trains it in float32 inside a backbone in {recipe.model.dtype}, which needs "
            "training.bf16=true. Set that, or model.dtype=float32"
        )
    if recipe.model.adapters and recipe.model.init_from:
        raise ValueError("model.adapters are those of model.init_from, which has them already; leave one of them out")


def check_folder(folder: Path) -> None:
    """Make the folder of a run, and raise `OSError` unless it can be written in."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"training.output_dir is {str(folder)!r}, which cannot be written ({error.strerror}). Choose another "
            "folder, or change its rights"
        ) from error


def check_same_run(recipe: Recipe, folder: Path, checkpoint: Path | None) -> None:
    """Raise `ValueError`, naming what differs, if the run of a checkpoint was begun with another recipe."""
    stored = folder / "recipe.json"
    if checkpoint is None or recipe.resume == "anyway" or not stored.is_file():
        return
    began, now = (dict(_flat(values)) for values in (json.loads(stored.read_text()), recipe.to_dict()))
    keys = [key for key in {**began, **now} if not key.startswith(MAY_DIFFER)]
    differ = [
        f"{key} was {_shown(began, key)} and is {_shown(now, key)}"
        for key in keys
        # a field that the run's own version did not have yet has its default
        if began.get(key) != now.get(key) and (key in began or key.startswith(FREE))
    ]
    if differ:
        raise ValueError(
            f"{checkpoint} belongs to a run with another recipe: {'; '.join(differ)}. Give that recipe again, "
            "choose another training.output_dir, or go on all the same with resume=anyway"
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(values: Mapping[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "not set"
