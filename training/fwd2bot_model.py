"""The Fwd2Bot that a recipe describes: on a backbone from a folder or the Hub, whole or quantised, new or trained."""

import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    ProcessorMixin,
    TrainingArguments,
)

from fwd2bot import Fwd2BotConfig, Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.adapters_fwd2bot import is_adapter_parameter, left_out_pattern, lora_arguments
from fwd2bot.backbone_fwd2bot import load_backbone
from fwd2bot.configuration_fwd2bot import STAGES
from fwd2bot.folder_fwd2bot import check_name

from .optimizers import check_roles
from .recipe import Fwd2BotModel, Recipe
from .run_checks import check_connector
from .sharding import Sharding, language_layers

COMPILED_VARIANTS = 32  # of one layer; more than any run has had


def build_fwd2bot(
    recipe: Recipe, args: TrainingArguments, sharding: Sharding | None = None
) -> tuple[Fwd2BotForConditionalGeneration, ProcessorMixin]:
    """The model, what trains of it in float32, and the backbone's processor.

    Args:
        args: a quantised backbone is loaded to their device; any other is moved there by the Trainer.
        sharding: how the processes of the run divide the backbone, if they do.

    Raises:
        ValueError: for a setting that does not fit `model.init_from`.
        FileNotFoundError: for a folder that is not there.
        ImportError: for a quantised backbone without bitsandbytes.
    """
    chosen = recipe.model
    check_name(chosen.init_from or chosen.backbone, "Fwd2Bot" if chosen.init_from else "backbone")
    settings = settings_of(recipe)
    loading: dict[str, Any] = {"dtype": getattr(torch, chosen.dtype)}
    if chosen.quantization:
        loading |= {"quantization_config": quantization(chosen), "device_map": {"": args.device}}
    if chosen.init_from:
        config = stored_config(recipe, args, sharding)
        model = Fwd2BotForConditionalGeneration.from_pretrained(chosen.init_from, config=config, **loading)
        processor = Fwd2BotProcessor.from_pretrained(chosen.init_from).backbone_processor
    else:
        revision = chosen.backbone_revision
        processor = AutoProcessor.from_pretrained(chosen.backbone, revision=revision or "main")
        try:
            backbone = load_backbone(chosen.backbone, revision=revision or "main", **loading)
        except TypeError as error:
            raise ValueError(f"model.backbone: {error}") from error
        model = Fwd2BotForConditionalGeneration.from_backbone(
            backbone,
            processor=processor,
            revision=revision,
            lora_rank=chosen.lora_rank,
            adapters=adapter_arguments(chosen),
            num_summary_tokens=chosen.num_summary_tokens,
            **settings,
        )
    model.set_attn_implementation(chosen.attn_implementation)
    for parameter in model.mark_trainable().values():
        parameter.data = parameter.data.float()
    mark_trained(model, chosen.trained_stage, chosen.freeze)
    check_roles(model, recipe.optimizer.learning_rates)
    if chosen.compile_layers:
        check_compiler(args.device)
        compile_layers(model)
    return model, processor


def outline_fwd2bot(
    recipe: Recipe, args: TrainingArguments, sharding: Sharding | None = None
) -> Fwd2BotForConditionalGeneration:
    """The model of `build_fwd2bot` without its weights (on the device meta), made of the config alone.

    Its parameters have the sizes and dtypes of a run, but for `model.quantization`, which is not looked at.

    Raises:
        As `build_fwd2bot`, as far as no weights are needed for it.
    """
    chosen = recipe.model
    check_name(chosen.init_from or chosen.backbone, "Fwd2Bot" if chosen.init_from else "backbone")
    config = None
    if chosen.init_from:
        config = stored_config(recipe, args, sharding)
        backbone_config = config.backbone_config
    else:
        backbone_config = AutoConfig.from_pretrained(chosen.backbone, revision=chosen.backbone_revision or "main")
    with torch.device("meta"):
        backbone = AutoModelForImageTextToText.from_config(backbone_config, dtype=getattr(torch, chosen.dtype))
        if config is None:
            default = {"r": chosen.lora_rank, "lora_alpha": chosen.lora_rank}
            config = Fwd2BotConfig(
                backbone_config=backbone_config,
                num_summary_tokens=chosen.num_summary_tokens,
                adapters=lora_arguments(adapter_arguments(chosen), default, backbone.get_decoder()),
                **settings_of(recipe),
            )
        model = Fwd2BotForConditionalGeneration(config, backbone=backbone)
    for parameter in model.mark_trainable().values():
        parameter.data = parameter.data.float()
    mark_trained(model, chosen.trained_stage, chosen.freeze)
    check_roles(model, recipe.optimizer.learning_rates)
    return model


def compile_layers(model: Fwd2BotForConditionalGeneration, backend: str = "inductor") -> None:
    """Compile each layer of the language model by itself, in place, so that names and checkpoints stay as they are.

    All layers have one piece of code, which is compiled anew for each adapter, with and without gradients, for every
    other thing that a pass has or lacks, and for each layer where there is a cache: so more often than torch's limit
    for one function, beyond which it would compile no more and say it in a warning alone.

    Raises:
        ValueError: for a language model without a list of layers.
    """
    layers = language_layers(model, "set model.compile_layers=false")
    for layer in layers:
        layer.compile(dynamic=True, backend=backend, recompile_limit=COMPILED_VARIANTS + 4 * len(layers))


def check_compiler(device: torch.device) -> None:
    """Raise ValueError where `compile_layers` would find no compiler for its code, in the first step."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch has it
    if device.type == "cpu" and not shutil.which(compiler):
        raise ValueError(
            f"model.compile_layers needs a C++ compiler on a CPU, and {compiler} is not here. Install one (apt-get "
            "install g++ python3-dev), name another by the variable CXX, or set model.compile_layers=false: the same "
            "training, in more time"
        )


def mark_trained(
    model: Fwd2BotForConditionalGeneration, trained_stage: str = "both", freeze: Sequence[str] = ()
) -> None:
    """Set `requires_grad` on what a recipe trains of a model, by `model.trained_stage` and `model.freeze`.

    Raises:
        ValueError: a pattern fits nothing that would train, or all of them leave nothing.
        TypeError: `freeze` is one pattern, not a list of them.
    """
    if isinstance(freeze, str):
        raise TypeError(f"freeze is {freeze!r}; give a list of patterns, such as [{freeze!r}]")
    names = list(model.mark_trainable())
    if trained_stage != "both":
        names = [name for name in names if re.search(left_out_pattern(trained_stage), name)]
    fixed: set[str] = set()
    for pattern in freeze:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            adapters, rest = ([name for name in names if is_adapter_parameter(name) == own] for own in (True, False))
            raise ValueError(
                f"model.freeze has {pattern!r}, which fits nothing that trains. That is {', '.join(rest)}"
                f"{' and ' if rest else ''}{len(adapters)} weights of adapters, such as {adapters[0]}"
            )
        fixed.update(found)
    if fixed.issuperset(names):
        raise ValueError(f"model.freeze is {list(freeze)}, which leaves nothing to train; leave something out of it")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names and name not in fixed)


def trains_summaries(model: Fwd2BotForConditionalGeneration) -> bool:
    """Whether anything trains beside the adapter of the generate stage, so that summaries or embeddings change."""
    alone = re.compile(left_out_pattern("generate"))
    return any(value.requires_grad and not alone.search(name) for name, value in model.named_parameters())


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The fields of `Fwd2BotConfig` that a recipe sets, but for the number of summary tokens and the adapters."""
    settings: dict[str, Any] = {"summary_lengths": recipe.model.summary_lengths, **recipe.model.config}
    if recipe.contrastive.loss is not None:
        settings["contrastive_loss"] = recipe.contrastive.loss
    if recipe.model.train_connector:
        settings["train_connector"] = True
    return settings


def stored_config(recipe: Recipe, args: TrainingArguments, sharding: Sharding | None) -> Fwd2BotConfig:
    """The config of `model.init_from` with what the recipe sets.

    Raises:
        ValueError: for a setting that does not fit that model.
    """
    source, settings = recipe.model.init_from, settings_of(recipe)
    stored = Fwd2BotConfig.from_pretrained(source).to_dict()
    asked = settings.get("contrastive_loss", stored["contrastive_loss"])
    if asked != stored["contrastive_loss"]:
        raise ValueError(
            f"contrastive.loss is {asked}, but {source} was trained with {stored['contrastive_loss']}, "
            "and the two have different weights. Leave it out, or begin with a new model"
        )
    if settings.get("summary_norm", stored["summary_norm"]) != stored["summary_norm"]:
        raise ValueError(
            f"model.config.summary_norm is {settings['summary_norm']}, but {source} was trained with "
            f"{stored['summary_norm']}. Leave it out, or begin with a new model"
        )
    config = Fwd2BotConfig.from_dict(stored | settings)
    check_connector(recipe, args, config.train_connector, sharding)
    if sharding and not config.backbone_name_or_path:
        raise ValueError(
            f"{source} does not say which backbone is in it, and a run that divides the backbone saves the adapters "
            "alone, which nobody could load then. Name it, model.config.backbone_name_or_path=FOLDER or a Hub id, or "
            "start with ddp.yaml"
        )
    return config


def adapter_arguments(chosen: Fwd2BotModel) -> dict[str, dict[str, Any]] | None:
    """`model.adapters` for each stage; None where the recipe has none, so that `lora_rank` holds."""
    if not chosen.adapters:
        return None
    if set(chosen.adapters) <= set(STAGES):
        return chosen.adapters
    return dict.fromkeys(STAGES, chosen.adapters)


def quantization(chosen: Fwd2BotModel) -> BitsAndBytesConfig:
    """4 bit as QLoRA has it (arXiv 2305.14314): NF4, the constants quantised as well; or 8 bit."""
    if chosen.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.float32 if chosen.dtype == "float32" else torch.bfloat16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
