"""`python -m fwd2bot.training.baselines.run OUTPUT`: train and judge the rows of the comparison, one JSON file each.

A row whose file is there is passed over, so the same command goes on after an interruption, row by row; a row itself
begins anew. Rows run in the order of what they decide. All have one frozen backbone, one data set and one number of
steps. A recipe trains on drawn scenes, or on data sets (`data.sources`), and is then judged by `validation.sources`.
"""

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..commands import command_of, without_folders
from ..provenance import versions, weights_hash
from ..recipe import Fwd2BotModel, Recipe, load_recipe
from ..run_checks import MAY_DIFFER, differences, flat, write_whole
from ..source_recipe import SourcesData
from ..sources import open_sources
from ..train import training_arguments
from .grid import METHODS, Row, chosen_rows
from .judging import judge
from .row_training import UNWATCHED, bare_backbone, build, build_trainer

BUDGET = (
    "backbone_sha256",
    "steps",
    "batch_size",
    "row_length",
    "lora_rank",
    "pictures",
    "shapes_only",
    "test_pictures",
    "split",
    "sources",  # of data sets, instead of row_length, pictures, shapes_only and split
    "judged",
)
# Of a recipe, besides; and what of that may be another from row to row.
COUNTS = (
    "data.",
    "model.config.",
    "contrastive.",
    "optimizer.",
    "training.",
    "validation.sources.",
    "validation.max_new_tokens",
)
MAY_VARY = (
    *(name for name in MAY_DIFFER if name != "validation"),
    "training.seed",
    "training.dataloader_",
    "training.use_cpu",
)
# Of a recipe's model, what the rows do not do; their lengths are their own.
UNUSED = (
    "init_from",
    "trained_stage",
    "adapters",
    "train_connector",
    "quantization",
    "dtype",
    "freeze",
    "compile_layers",
)
SPLITS = ("validation", "test")


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    chosen = chosen_rows(args.rows, args.seeds)
    if args.list:
        if not args.output.is_dir():
            print(f"{args.output} is not there yet, so no row is done", file=sys.stderr)
        done = {file.name for file in args.output.glob("*-seed*.json")}
        for row in chosen:
            print(f"{'done' if row.file in done else 'open':<6}{row.file.removesuffix('.json')}")
        if args.rows is None and args.seeds is None:  # of further seeds
            for name in sorted(done - {row.file for row in chosen}):
                print(f"done  {name.removesuffix('.json')}")
        return
    options = {name: getattr(args, name) for name in ("steps", "minutes", "test_pictures")}
    try:  # what makes the rows impossible is told before any trains
        recipe = load_recipe(args.recipe, [f"training.output_dir={args.output / 'work'}", *args.overrides])
        check_data(recipe, args.split)
        backbone = bare_backbone(args.backbone, args.output / "backbone")
        options["split"] = None if isinstance(recipe.data, SourcesData) else args.split or SPLITS[0]
        budget = budget_of(recipe, backbone, options)
        for file in sorted(args.output.glob("*-seed*.json")):  # of all rows: the report compares them with each other
            check_same_budget(file, budget)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.steps <= recipe.training.get("warmup_steps", 0):
        print(
            f"warning: training.warmup_steps of the recipe, {recipe.training['warmup_steps']}, is not over after "
            f"{args.steps} steps; the rows learn little",
            file=sys.stderr,
        )
    command = command_of("baselines.run", sys.argv[1:] if arguments is None else arguments)
    print(f"{len(chosen)} row(s): {', '.join(row.file.removesuffix('.json') for row in chosen)}", flush=True)
    for row in chosen:
        file = args.output / row.file
        if file.exists():
            check_same_budget(file, budget)  # again: it may have come from another process meanwhile
            print(f"{row.file}: done before", flush=True)
            continue
        result = run_row(row, recipe, backbone, options) | {"command": command}
        write_whole(file, json.dumps(budget | result, indent=2) + "\n")
        print(f"{row.file}: {result['seconds']:.0f} s, loss {result['loss']}", flush=True)


def run_row(row: Row, recipe: Recipe, backbone: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train a row and judge it.

    Args:
        backbone: folder of the frozen backbone.
        options: `steps`, `minutes` (after which training stops; None: never), `test_pictures` (on data sets: rows of
            each) and `split` (of the drawn scenes).
    """
    model, processor = build(row, recipe, backbone)
    method = METHODS[row.method]
    result: dict[str, Any] = {"name": row.name, "method": row.method, "seed": row.seed, "lengths": row.lengths}
    result |= {"config": row.config, "rank": row.rank, "rate": row.rate, "about": method.about, "versions": versions()}
    begin = time.monotonic()
    if method.model is None:
        model.to(training_arguments({**recipe.training, **UNWATCHED}).device)
        result |= {"steps_done": 0, "loss": None, "trained_parameters": 0, "seconds": 0.0}
    else:
        trainer = build_trainer(row, recipe, model, processor, options)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        result |= {"steps_done": trainer.state.global_step, "loss": [losses[0], losses[-1]] if losses else None}
        result |= {"trained_parameters": trained, "seconds": round(time.monotonic() - begin, 1)}
        result["fingerprint"] = model.fingerprint
    figures = judge(row, recipe, model.eval(), processor, options)
    return result | {"figures": figures}


def budget_of(recipe: Recipe, backbone: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What all rows of one comparison have in common."""
    data, batch_size = recipe.data, TrainingArguments.per_device_train_batch_size  # where the recipe has none
    values = {
        "backbone_sha256": weights_hash(backbone),
        "batch_size": recipe.training.get("per_device_train_batch_size", batch_size),
        "lora_rank": recipe.model.lora_rank,
        **options,
    }
    if isinstance(data, SourcesData):
        values["sources"] = {source.name: source.weight for source in data.sources}
        values["judged"] = [source.name for source in recipe.validation.sources]
    else:
        values |= {"row_length": data.row_length, "pictures": data.pictures, "shapes_only": data.shapes_only}
    return {name: values.get(name) for name in BUDGET} | {"recipe": what_counts(recipe)}


def what_counts(recipe: Recipe) -> dict[str, Any]:
    """What else of a recipe decides the figures of a row, as one level; of absolute paths the last name."""
    values = without_folders(recipe.to_dict())
    for section in ("data", "validation"):
        if "sources" in values[section]:
            values[section]["sources"] = {source["name"]: source for source in values[section]["sources"]}
    return {key: value for key, value in flat(values) if key.startswith(COUNTS) and not key.startswith(MAY_VARY)}


def check_data(recipe: Recipe, split: str | None) -> None:
    """Raise ValueError or OSError for a recipe that the rows cannot train on, or be judged by."""
    if recipe.kind != "fwd2bot":
        raise ValueError(f"the rows train on one backbone, with a recipe of kind fwd2bot, not {recipe.kind}")
    usual = Fwd2BotModel()
    unused = [f"model.{name}" for name in UNUSED if getattr(recipe.model, name) != getattr(usual, name)]
    unused += [
        f"contrastive.{name}" for name in ("loss", "final_weight") if getattr(recipe.contrastive, name) is not None
    ]
    unused += ["model.config.summary_norm"] if "summary_norm" in recipe.model.config else []  # of `before_norm` alone
    if unused:
        raise ValueError(f"the rows of the comparison have no {', '.join(unused)}; leave it out of the recipe")
    if not isinstance(recipe.data, SourcesData):
        return
    if not recipe.validation.sources:
        raise ValueError("the recipe trains on data sets and has none to be judged by; give validation.sources")
    if split is not None:
        raise ValueError("--split is of the drawn scenes; data sets are judged by the recipe's validation.sources")
    open_sources(recipe.data)  # what cannot be read is told before anything trains
    open_sources(dataclasses.replace(recipe.data, sources=recipe.validation.sources))


def check_same_budget(file: Path, budget: dict[str, Any]) -> None:
    """Raise ValueError where a result was made under another budget or by another recipe, naming what differs."""
    try:
        stored = json.loads(file.read_text())
        if not isinstance(stored, dict):
            raise TypeError(f"a {type(stored).__name__}, not an object")
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{file} is no result of a row ({error}); remove it, and the row is trained again") from error
    differing = [
        f"{name} was {stored.get(name)!r} and is {budget[name]!r}"
        for name in BUDGET
        if stored.get(name) != budget[name]
    ]
    before, now = stored.get("recipe", budget["recipe"]), budget["recipe"]  # earlier versions kept none
    differing += differences(before, now, {**before, **now})
    if differing:
        raise ValueError(f"{file} does not compare with this run: {'; '.join(differing)}. Name another output folder.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fwd2bot.training.baselines.run", description=__doc__)
    default = "(default: %(default)s)"
    parser.add_argument("output", type=Path, help="folder of the results, and of what the rows share")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as data.pictures=5000")
    parser.add_argument(
        "--backbone", default="runs/backbone/final", help=f"a LLaVA, or a Fwd2Bot whose backbone to take {default}"
    )
    parser.add_argument(
        "--recipe", default="comparison.yaml", help=f"its data, judges, optimizer and rank hold for all rows {default}"
    )
    parser.add_argument("--steps", type=int, default=800, help=f"of every row {default}")
    parser.add_argument("--minutes", type=float, help="stop the training of a row after so many")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these; --list shows all")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="only these, of named rows any; default: those planned, which are three of some rows",
    )
    parser.add_argument(
        "--test-pictures",
        type=int,
        default=400,
        help=f"five questions about each; of data sets: rows of each {default}",
    )
    parser.add_argument("--split", choices=SPLITS, help=f"of the drawn scenes, default {SPLITS[0]}")
    parser.add_argument("--list", action="store_true", help="show which rows are done and which are open")
    args = parser.parse_intermixed_args(arguments)
    try:
        chosen_rows(args.rows, args.seeds)
        if args.seeds and min(args.seeds) < 0:
            raise ValueError(f"--seeds must be 0 or more, got {min(args.seeds)}")
    except ValueError as error:
        parser.error(str(error))
    for name in ("steps", "test_pictures"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.minutes is not None and not args.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes:g}")
    return args


if __name__ == "__main__":
    main()
