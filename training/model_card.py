"""The model card of an exported checkpoint: templates in `cards/`, filled with its recipe and its figures."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from fwd2bot.adapters_fwd2bot import left_out_pattern
from fwd2bot.configuration_fwd2bot import STAGES

from .commands import without_folders
from .drawn_figures import drawn_eval_results, drawn_figures
from .fwd2bot_model import mark_trained
from .optimizers import role_of
from .source_evaluation import counted, figure_rows, flatten, settings_of, shown
from .sources.tables import BUILDERS, has_splits
from .tables import table

CARDS = Path(__file__).parent / "cards"
TAGS = ["fwd2bot", "token-compression", "image-retrieval", "visual-question-answering", "sentence-transformers"]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PARTS = (
    *(f"{stage} adapter" for stage in STAGES),
    "summary queries",
    "summary projector",
    "temperature",
    "backbone's own projector",
)
# Of a data set's figures, those that the Hub shows beside the model: our name, the Hub's, and what it is called.
METRICS = {
    "exact_match": ("visual-question-answering", "exact_match", "Exact match"),
    "vqa_accuracy": ("visual-question-answering", "accuracy", "VQA accuracy"),
    "yes_no f1": ("visual-question-answering", "f1", "F1 of yes"),
    "captions cider": ("image-to-text", "cider", "CIDEr-D"),
    "captions bleu": ("image-to-text", "bleu", "BLEU"),
    "captions rouge_l": ("image-to-text", "rouge", "ROUGE-L"),
    "text_to_image recall@1": ("image-text-retrieval", "recall", "Text to image, recall@1"),
    "image_to_text recall@1": ("image-text-retrieval", "recall", "Image to text, recall@1"),
}


@dataclass
class CardOptions:
    """What the card says that neither checkpoint nor recipe knows.

    Args:
        name: of the model. license: an identifier of the Hub, such as "apache-2.0".
        languages: two-letter codes. base_model: Hub id of the backbone. repo: where the folder goes on the Hub.
    """

    name: str
    license: str | None = None
    languages: list[str] = field(default_factory=list)
    base_model: str | None = None
    repo: str | None = None


def model_card(
    model: Any, options: CardOptions, results: dict[str, Any] | None = None, run: dict[str, Any] | None = None
) -> str:
    """The card as Markdown, with its metadata.

    Args:
        model: the Fwd2Bot.
        results: of `fwd2bot.training.evaluate`, on drawn scenes or on data sets; None: the card says that nothing was
            measured.
        run: `recipe.json` of the training, with `command` if that is known; None: the card says so.

    Raises:
        ValueError: a figure of the card is not among the results; the message names it.
    """
    config = model.config
    drawn = "sources" not in results if results is not None else _is_drawn(run)
    context: dict[str, Any] = {
        "name": options.name,
        "k": max([k for k in config.summary_lengths if k <= 8], default=min(config.summary_lengths)),
        "k_max": config.num_summary_tokens,
        "width": config.get_text_config().hidden_size,
        "parameters": f"{model.num_parameters() / 1e6:.1f}",
        "rank": config.adapters["compress"]["r"],
        "lengths": _listed(config.summary_lengths, "and"),
        "one_of_lengths": _listed(config.summary_lengths, "or"),
        **_trained(model, run or {}),
    }
    metadata: dict[str, Any] = {"license": options.license, "language": options.languages or None}
    if drawn:
        metadata = {"license": options.license or "apache-2.0", "language": options.languages or ["en"]}
        context |= {
            "path": options.repo or "path/to/this/folder",
            "picture": "scene.png",
            "question": "How many things are there?",
            "sentence": "two snowmen on a blue field",
            "answer_tokens": 12,
            "image_tokens": config.backbone_config.image_seq_length,
            "figures": drawn_figures(results) if results is not None else None,
        }
        eval_results = drawn_eval_results(results) if results is not None else []
    else:
        context |= {
            "path": options.repo or "path/to/this/folder",
            "picture": "photo.jpg",
            "question": "What is in the picture?",
            "sentence": "a dog on a beach",
            "answer_tokens": 64,
            "backbone": _backbone_words(config, options),
            "revision": config.backbone_revision if options.base_model else None,
            "adapter_only": config.adapter_only,
            "base": options.base_model,
            "figures": _figures(results) if results is not None else None,
            "training": _training(run) if run is not None else None,
            "licence": _licence_words(options),
            "language": _language_words(options),
        }
        eval_results = _eval_results(results) if results is not None else []
        metadata["datasets"] = _hub_data_sets(run) or None
        if options.base_model:
            relation = "adapter" if config.adapter_only else "finetune"
            metadata |= {"base_model": options.base_model, "base_model_relation": relation}
    context["card_data"] = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(TAGS),
        model_name=options.name,
        eval_results=eval_results or None,
        **metadata,
    ).to_yaml()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(CARDS), undefined=jinja2.StrictUndefined, trim_blocks=False, autoescape=False
    )
    text = environment.get_template("drawn.md" if drawn else "data_sets.md").render(context)
    return str(ModelCard(re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"))


def _is_drawn(run: dict[str, Any] | None) -> bool:
    return run is not None and "sources" not in run["data"]


def _figures(results: dict[str, Any]) -> dict[str, Any]:
    """What the card says of an evaluation on data sets."""
    sources = []
    for name, figures in results["sources"].items():
        rows = [
            [figure.replace("_", " "), *(shown(figure, value) for value in values)]
            for figure, values in figure_rows(figures)
        ]
        split = figures["split"] and f"split `{figures['split']}`"
        where = [figures["format"], *filter(None, [split, figures.get("path") and f"`{figures['path']}`"])]
        columns = table(["", *settings_of(figures)], rows)
        sources.append({"name": name, "table": columns, "where": ", ".join(where), "counted": counted(figures)})
    kept = {key: results[key] for key in ("max_new_tokens", "dtype")}
    command = results.get("command", "python -m fwd2bot.training.evaluate")
    return kept | results["versions"] | {"command": command, "sources": sources}


def _eval_results(results: dict[str, Any]) -> list[EvalResult]:
    """The `model-index`: of each source the figures in METRICS, at every length and uncompressed."""
    found = []
    for name, figures in results["sources"].items():
        for setting in settings_of(figures):
            values = flatten(figures[setting])
            for figure, (task, metric, words) in METRICS.items():
                if figure in values:
                    found.append(
                        EvalResult(
                            task_type=task,
                            dataset_type=name,
                            dataset_name=name,
                            dataset_split=figures["split"],
                            metric_type=metric,
                            metric_name=f"{words}, {setting}",
                            metric_value=round(100 * values[figure], 2),
                        )
                    )
    return found


def _trained(model: Any, run: dict[str, Any]) -> dict[str, Any]:
    """What the card says of what learnt: by the recipe, or all that a Fwd2Bot trains where there is none."""
    chosen = run.get("model", {})
    alone = chosen.get("trained_stage") == "generate"
    mark_trained(model, chosen.get("trained_stage", "both"), chosen.get("freeze", ()))
    own, trained = set(model.trained_parameters()), {n: v for n, v in model.named_parameters() if v.requires_grad}
    counts: dict[str, list[bool]] = {}
    for name in dict.fromkeys([*own, *trained]):
        counts.setdefault(_part_of(name), []).append(name in trained)
    learnt = [part if all(counts[part]) else f"{part} in part" for part in PARTS if any(counts.get(part, ()))]
    return {
        "trained": f"{sum(value.numel() for value in trained.values()) / 1e6:.1f}",
        "learnt": _listed(learnt, "and"),
        "fixed": ", ".join(part for part in PARTS if part in counts and not any(counts[part])),
        "connector": any(counts.get("backbone's own projector", ())),
        "as_usual": trained.keys() == own,
        "goes_on": bool(chosen.get("init_from")),
        "losses": "an autoregressive loss" if alone else "an autoregressive and a contrastive loss",
    }


def _part_of(name: str) -> str:
    """Which of PARTS a parameter belongs to."""
    role = role_of(name)
    if role == "adapters":
        return next(f"{stage} adapter" for stage in STAGES if re.search(left_out_pattern(stage), name))
    return {
        "queries": "summary queries",
        "projector": "summary projector",
        "logit_scale": "temperature",
        "connector": "backbone's own projector",
    }[role]


def _training(run: dict[str, Any]) -> dict[str, Any]:
    """What the card says of a run on data sets."""
    header = ["source", "format", "split", "where", "use", "weight", "licence"]
    rows = [
        [
            source["name"],
            source["format"],
            source["split"] if has_splits(source["path"]) else "",
            f"`{without_folders(source['path'])}`",
            source["use"],
            f"{source['weight']:g}",
            source.get("license") or "not stated",
        ]
        for source in run["data"]["sources"]
    ]
    training, optimizer = run["training"], run["optimizer"]
    steps = f"{training['max_steps']:,} steps" if training.get("max_steps") else "epochs of the data"
    best = ""
    if "steps" in run:
        steps = f"{run['steps']:,} steps"
        if run["weights_of_step"] != run["steps"]:
            best = f" The weights are those after step {run['weights_of_step']:,}, the best by the validation."
    batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    recipe = {name: value for name, value in run.items() if name not in ("command", "steps", "weights_of_step")}
    if recipe.get("model", {}).get("adapters"):  # which hold instead
        recipe["model"] = {name: value for name, value in recipe["model"].items() if name != "lora_rank"}
    return {
        "command": run.get("command"),
        "steps": f"{steps} of {batch} samples for each process, {optimizer['name']}, learning rate "
        f"{optimizer['learning_rate']:g}.{best}",
        "data": table(header, rows),
        "contrastive_max_tokens": run["data"]["contrastive_max_tokens"],
        "recipe": yaml.safe_dump(without_folders(recipe), sort_keys=False, allow_unicode=True).rstrip(),
    }


def _listed(numbers: Sequence[Any], word: str) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} {word} {last}" if first else last


def _hub_data_sets(run: dict[str, Any] | None) -> list[str]:
    paths = [source["path"] for source in run["data"]["sources"]] if run is not None else []
    return [path for path in dict.fromkeys(paths) if is_hub_id(path) and Path(path).suffix not in BUILDERS]


def is_hub_id(name: str | None) -> bool:
    """Whether a backbone or data set is named by its id on the Hub, not by a place on this machine."""
    return bool(name and HUB_ID.fullmatch(name)) and not os.path.exists(name) and not name.startswith(".")


def _backbone_words(config: Any, options: CardOptions) -> str:
    kind = config.backbone_config.model_type
    if options.base_model:
        return f"[{options.base_model}](https://huggingface.co/{options.base_model}) (`{kind}`)"
    return f"a `{kind}` backbone"


def _licence_words(options: CardOptions) -> str:
    if options.license:
        return f"Licence: {options.license}; the backbone's own terms hold for its weights."
    return "No licence was stated for these weights: those of the backbone hold; see there before you use them."


def _language_words(options: CardOptions) -> str:
    if options.languages:
        return f"Languages of the training: {', '.join(options.languages)}."
    return "The languages of the training were not stated; assume those of the data sets alone."


def languages_of(text: str | None) -> list[str]:
    """Two-letter codes out of "en,de"; an error names what is none."""
    codes = [code.strip() for code in (text or "").split(",") if code.strip()]
    wrong: Sequence[str] = [code for code in codes if not re.fullmatch(r"[a-z]{2,3}", code)]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} is no language code; give ISO 639 codes, such as en or en,de")
    return codes
