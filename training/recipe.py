"""Recipes: a YAML file and `key=value` overrides, checked as a whole before anything runs."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from fwd2bot.configuration_fwd2bot import CONTRASTIVE_LOSSES

from .scenes import SEVERAL_KINDS
from .source_recipe import SourceRecipe, SourcesData, check_trainable, for_backbone
from .yaml_loader import read_yaml

KINDS = ("backbone", "fwd2bot")
RECIPES = Path(__file__).parent / "recipes"


@dataclass
class BackboneModel:
    """Sizes of the small LLaVA."""

    image_size: int = 96
    patch_size: int = 12
    vision_hidden_size: int = 128
    vision_layers: int = 4
    vision_heads: int = 4
    vision_intermediate_size: int = 512
    hidden_size: int = 192
    layers: int = 6
    heads: int = 6
    intermediate_size: int = 512
    vocab_size: int = 1024
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = True
    attn_implementation: str = "sdpa"
    init_from: str | None = None  # a folder whose weights to start from; of the sizes its own hold
    resample_patches: int | None = None  # pixels of a patch instead of that of init_from: other image tokens

    def __post_init__(self):
        if self.resample_patches is not None and not self.init_from:
            raise ValueError("model.resample_patches changes a trained model; name it in model.init_from")


TRAINED_STAGES = ("both", "generate")
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("4bit", "8bit")
ROLES = ("adapters", "queries", "projector", "logit_scale", "connector")  # that have a learning rate of their own


def check_dtype(name: str) -> str:
    """`name`, if it is one of DTYPES; else ValueError."""
    if name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    return name


@dataclass
class Fwd2BotModel:
    """The backbone to wrap, and what is put around it."""

    backbone: str = "runs/backbone/final"
    backbone_revision: str | None = None  # branch, tag or commit of a backbone from the Hub
    dtype: str = "float32"  # of the frozen weights, one of DTYPES; what trains is in float32
    quantization: str | None = None  # "4bit" or "8bit": the frozen weights by bitsandbytes (QLoRA)
    lora_rank: int = 48
    # Instead: arguments of peft.LoraConfig (r, lora_alpha, ...), for both stages or as {compress: ..., generate: ...}.
    adapters: dict[str, Any] = field(default_factory=dict)
    train_connector: bool = False  # the backbone's own projector trains as well
    num_summary_tokens: int = 16
    summary_lengths: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    attn_implementation: str = "sdpa"
    config: dict[str, Any] = field(default_factory=dict)  # further fields of Fwd2BotConfig
    # A Fwd2Bot to go on from, with a new optimizer; then its own backbone, rank and number of summary tokens hold.
    init_from: str | None = None
    # "both" stages; or "generate": its adapter alone, so that summaries and embeddings stay as they are.
    trained_stage: str = "both"
    # Of what would train, what stays as it is: regular expressions that are searched for in names of parameters.
    freeze: list[str] = field(default_factory=list)
    compile_layers: bool = False  # torch.compile on each layer of the language model, by itself, at any shape

    def __post_init__(self):
        for pattern in self.freeze:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise ValueError(f"model.freeze has {pattern!r}, which is no regular expression: {error}") from error
        quantizations = (*QUANTIZATIONS, None)
        for name, allowed in (
            ("trained_stage", TRAINED_STAGES),
            ("dtype", DTYPES),
            ("quantization", quantizations),
        ):
            if getattr(self, name) not in allowed:
                listed = ", ".join("null" if value is None else value for value in allowed)
                raise ValueError(f"model.{name} is {getattr(self, name)!r}; choose one of {listed}")
        if self.quantization and self.compile_layers:
            raise ValueError(
                f"model.compile_layers cannot be with model.quantization={self.quantization}: it was not tried on "
                "quantised layers. Leave one of them out"
            )
        if self.quantization and self.train_connector:
            raise ValueError(
                f"model.train_connector cannot be with model.quantization={self.quantization}: checkpoints of a "
                "quantised backbone hold adapters alone, and would lose the connector. Leave one of them out"
            )
        if self.train_connector and self.trained_stage != "both":
            raise ValueError("model.train_connector changes every summary; train both stages with it")
        if self.trained_stage == "generate" and not self.init_from:
            raise ValueError(
                "model.trained_stage is generate, which learns from summaries that are good already; name the trained "
                "Fwd2Bot in model.init_from, or train both stages"
            )


@dataclass
class BackboneData:
    """What a row of training holds: a picture, its description, and questions on it until the row is full."""

    seed: int = 0
    pictures: int = 50_000  # of the train split; the texts about one are new in every round
    rounds: int = 16
    row_length: int = 288
    questions: dict[str, float] = field(  # how many of each kind; 1.5: one or two
        default_factory=lambda: {"presence": 4.0, "size": 2.0}
    )
    descriptions: float = 1.0  # share of the rows that begin with a description
    tokenizer_scenes: int = 4_000
    shapes_only: bool = False  # plain shapes: no font is needed


@dataclass
class SeveralData:
    """Rows whose conversations are about several pictures at once."""

    share: float = 0.0  # of all rows
    pictures: list[int] = field(default_factory=lambda: [2, 3, 4, 5])  # how many a row shows: one of these
    questions: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SEVERAL_KINDS, 2.0))

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"data.several.share is {self.share}; it must be in 0..1")
        if not self.pictures or not all(type(count) is int and count >= 2 for count in self.pictures):
            raise ValueError(f"data.several.pictures is {self.pictures}; list whole numbers of 2 or more")
        unknown = sorted(set(self.questions) - set(SEVERAL_KINDS))
        if unknown:
            raise ValueError(
                f"unknown kind {', '.join(unknown)} in data.several.questions; choose from {', '.join(SEVERAL_KINDS)}"
            )


@dataclass
class Fwd2BotData(BackboneData):
    """The same rows, and texts for the contrastive side."""

    full_share: float = 0.25  # share of the steps whose texts are full descriptions; the others have short captions
    short_captions: int = 2  # per picture
    full_negatives: int = 1  # per picture, in steps with full descriptions
    hard_negatives: int = 2  # per picture, in steps with short captions
    several: SeveralData = field(default_factory=SeveralData)

    def __post_init__(self):
        if self.several.share and max(self.several.pictures) > self.pictures:
            raise ValueError(
                f"data.several.pictures asks for {max(self.several.pictures)} pictures in a row, but data.pictures is "
                f"{self.pictures}; raise it"
            )


@dataclass
class ContrastiveRecipe:
    """The contrastive side of a Fwd2Bot's training."""

    loss: str | None = None  # "infonce" or "sigmoid"; null: that of model.init_from, and infonce for a new model
    gather: bool = True  # over the batches of all processes, with gradients; false: each process over its own
    # Samples in one forward and backward pass; the batch of the loss stays per_device_train_batch_size (gradient
    # caching, which runs every chunk twice). null: the whole batch at once.
    chunk_size: int | None = None
    # The weight of the loss in the last step, neared in a line from contrastive_loss_weight of the model's config;
    # null: the weight stays.
    final_weight: float | None = None

    def __post_init__(self):
        if self.final_weight is not None and not 0 <= self.final_weight < math.inf:
            raise ValueError(f"contrastive.final_weight is {self.final_weight}; give 0 or more, or null")
        if self.loss not in (None, *CONTRASTIVE_LOSSES):
            raise ValueError(f"contrastive.loss is {self.loss!r}; choose one of {', '.join(CONTRASTIVE_LOSSES)}")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"contrastive.chunk_size is {self.chunk_size}; give 1 or more samples, or null for all")


@dataclass
class ValidationRecipe:
    """Samples on which a run is judged by generation: eval_accuracy of answers, eval_recall@1 (5, 10) of captions."""

    sources: list[SourceRecipe] = field(default_factory=list)  # as in data.sources; none: no validation
    samples: int = 256  # at most
    num_summary_tokens: int | None = None  # null: model.num_summary_tokens
    max_new_tokens: int = 32
    patience: int | None = None  # evaluations without a better training.metric_for_best_model, then the run stops
    show_steps: int | None = None  # every so many steps: answers and a retrieval sheet under samples/

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "num_summary_tokens", "patience", "show_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"validation.{name} is {value}; give 1 or more")


@dataclass
class OptimizerRecipe:
    name: str = "muon"  # muon: Muon on the hidden matrices and AdamW on the rest; adamw: AdamW on all
    learning_rate: float = 0.002
    matrix_learning_rate: float | None = None  # of the hidden matrices, LoRA's among them; null: learning_rate
    weight_decay: float = 0.0
    momentum: float = 0.95
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    # Instead, of some of ROLES: {queries: 0.001}; null: none of its own.
    learning_rates: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self):
        unknown = sorted(set(self.learning_rates) - set(ROLES))
        if unknown:
            raise ValueError(
                f"unknown key {', '.join(unknown)} in optimizer.learning_rates; allowed are {', '.join(ROLES)}"
            )
        self.learning_rates = {role: rate for role, rate in self.learning_rates.items() if rate is not None}
        if self.matrix_learning_rate is None:  # Muon's updates are scaled to bear AdamW's rates, so for both
            self.matrix_learning_rate = self.learning_rate


@dataclass
class Recipe:
    """One training run."""

    kind: str
    model: BackboneModel | Fwd2BotModel
    data: BackboneData | Fwd2BotData | SourcesData
    optimizer: OptimizerRecipe
    training: dict[str, Any]  # fields of transformers' TrainingArguments
    # Go on from the newest complete checkpoint of training.output_dir, if there is one; "anyway": though the recipe is
    # not the one that it was made with.
    resume: bool | str = True
    contrastive: ContrastiveRecipe = field(default_factory=ContrastiveRecipe)
    validation: ValidationRecipe = field(default_factory=ValidationRecipe)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides with dotted keys, such as `training.max_steps=100`.

    Args:
        path: a YAML file, or the name of a recipe of the package ("backbone.yaml"). Its `base` names another one,
            beside it or of the package, whose values hold where it has none; a list is replaced as a whole.
        overrides: values are YAML: `data.questions={presence: 4}`, `model.summary_lengths=[1,8]`.

    Raises:
        FileNotFoundError: there is no such recipe.
        ValueError: a key is unknown (the message lists the allowed ones), a value has another type than its field, an
            override is not `key=value`, or recipes name each other as their `base`.
    """
    values = _with_base(path)
    for override in overrides:
        _override(values, override)
    if "base" in values:
        raise ValueError("base cannot be set on the command line; write it into the recipe")
    kind = values.pop("kind", None)
    if kind not in KINDS:
        raise ValueError(f"{path}: kind is {kind!r}; choose one of {', '.join(KINDS)}")
    drawn = BackboneData if kind == "backbone" else Fwd2BotData
    from_sources = isinstance(values.get("data"), dict) and "sources" in values["data"]
    parts = {
        "model": BackboneModel if kind == "backbone" else Fwd2BotModel,
        "data": SourcesData if from_sources else drawn,
        "optimizer": OptimizerRecipe,
    }
    if kind == "fwd2bot":
        parts |= {"contrastive": ContrastiveRecipe, "validation": ValidationRecipe}
    resume = values.pop("resume", True)
    if resume not in (True, False, "anyway"):
        raise ValueError(f"resume is {resume!r}; use true, false or anyway")
    training = values.pop("training", None) or {}
    _check_training(training)
    built = {name: _build(name, part, values.pop(name, None) or {}) for name, part in parts.items()}
    _check_keys("the recipe", values, ["base", "kind", "resume", "training", *parts])
    if from_sources:
        check_trainable("data", built["data"].sources)
    if "validation" in built:
        check_trainable("validation", built["validation"].sources)
    if from_sources and kind == "backbone":
        built["data"] = for_backbone(built["data"])
    return Recipe(kind=kind, training=training, resume=resume, **built)


def load_sources(path: str | Path) -> SourcesData:
    """The sources that a model is judged by: those of `validation` in a recipe, or of a file with `sources` itself.

    Args:
        path: a recipe, the `recipe.json` of a run, or a YAML file that holds the keys of a `data` section alone.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it names no sources, or something in it is wrong.
    """
    values = _with_base(path)
    if "kind" in values:
        judged = (values.get("validation") or {}).get("sources")
        if not judged:
            raise ValueError(
                f"{path} has no validation.sources, and figures on what was learnt say little; add them, or give a "
                "YAML file with the key sources"
            )
        data = values.get("data") or {}
        values = (data if "sources" in data else {}) | {"sources": judged}
    return _build("data", SourcesData, values)


def _with_base(path: str | Path, beside: Path | None = None, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The values of a recipe, upon those of the one that its `base` names."""
    found = _find(path, beside)
    if found in seen:
        chain = " -> ".join(one.name for one in (*seen, found))
        raise ValueError(f"the recipes name each other as their base: {chain}; let one of them stand alone")
    values = _read(found)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ValueError(f"{found}: base is {base!r}; give the file name of one other recipe")
    return _merged(_with_base(base, found.parent, (*seen, found)), values)


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _find(path: str | Path, beside: Path | None = None) -> Path:
    places = [*([beside / path] if beside else []), Path(path), RECIPES / path]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        shipped = ", ".join(sorted(p.name for p in RECIPES.glob("*.yaml")))
        raise FileNotFoundError(f"there is no recipe {str(path)!r}; pass a YAML file or a name from {shipped}")
    return found.resolve()


def _read(found: Path) -> dict[str, Any]:
    try:
        text = found.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{found} is no text: {error}") from error
    values = read_yaml(text, str(found))
    if not isinstance(values, dict):
        raise ValueError(f"{found} holds {type(values).__name__}; a recipe is a mapping of keys to values")
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ValueError(f"cannot read the override {override!r}; write key=value, such as training.max_steps=100")
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"the override {override!r} looks for keys inside {section!r}, which is a single value")
    values[name] = read_yaml(value, f"the override {override!r}")


def _build(section: str, part: type, values: dict[str, Any]) -> Any:
    _check_keys(section, values, [f.name for f in dataclasses.fields(part)])
    unset = (dataclasses.MISSING, dataclasses.MISSING)
    needed = [f.name for f in dataclasses.fields(part) if (f.default, f.default_factory) == unset]
    missing = [name for name in needed if name not in values]
    if missing:
        raise ValueError(f"{section} has no {' and no '.join(missing)}; give {', '.join(needed)}")
    hints = typing.get_type_hints(part)
    return part(**{name: _checked(f"{section}.{name}", value, hints[name]) for name, value in values.items()})


def _check_keys(section: str, values: Any, allowed: Sequence[str]) -> None:
    if not isinstance(values, dict):
        raise ValueError(f"{section} is {values!r}; give keys and values, from {', '.join(sorted(allowed))}")
    unknown = sorted(set(values) - set(allowed))
    if unknown:
        listed = ", ".join(sorted(allowed))
        raise ValueError(f"unknown key {', '.join(unknown)} in {section}; the allowed ones are {listed}")


def _checked(key: str, value: Any, hint: Any) -> Any:
    """The value as its field's type: an int where a float is wanted becomes one, anything else must match."""
    if dataclasses.is_dataclass(hint):
        return _build(key, hint, value)
    if typing.get_origin(hint) is list and isinstance(value, list):
        [item] = typing.get_args(hint)
        if dataclasses.is_dataclass(item):
            return [_build(f"{key}[{index}]", item, one) for index, one in enumerate(value)]
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    options = [bool if option == typing.Literal[False] else option for option in options]
    kinds = tuple(typing.get_origin(option) or option for option in options)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and bool not in kinds or not isinstance(value, kinds):
        named = [kind for kind in kinds if not issubclass(kind, Enum)]  # whose values are written as strings
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in named)
        raise ValueError(f"{key} is {value!r}, of type {type(value).__name__}; it must be {wanted}")
    return value


# Fields of TrainingArguments that our optimizers do not read, and what is set instead; the others have no counterpart.
OF_THE_OPTIMIZER = {
    "learning_rate": "optimizer.learning_rate",
    "optim": "optimizer.name",
    "weight_decay": "optimizer.weight_decay",
    "adam_beta1": "optimizer.betas",
    "adam_beta2": "optimizer.betas",
    "adam_epsilon": None,
    "optim_args": None,
    "optim_target_modules": None,
}


def _check_training(training: Any) -> None:
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    _check_keys("training", training, [f.name for f in dataclasses.fields(TrainingArguments) if f.init])
    for name, value in training.items():
        if name in OF_THE_OPTIMIZER:
            instead = OF_THE_OPTIMIZER[name]
            remedy = f"set {instead} instead" if instead else "leave it out; the section optimizer has what can be set"
            raise ValueError(f"training.{name} would have no effect: {remedy}")
        _checked(f"training.{name}", value, hints[name])  # a whole number may stay one: the Trainer reads both
