"""`python -m fwd2bot.training.baselines.run OUTPUT`: train and judge the rows of the comparison, one JSON file each.

A row whose file is there is passed over, so the same command goes on after an interruption, row by row; a row itself
begins anew. Rows run in the order of what they decide. All have one frozen backbone, one data set and one number of
steps.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, LlavaForConditionalGeneration, TrainerCallback, set_seed

from fwd2bot import Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.backbone_fwd2bot import load_backbone

from ..collator import Fwd2BotCollator
from ..commands import command_of
from ..data import CaptionedRows, Packer, draw_pictures
from ..evaluate import evaluate_model
from ..provenance import versions, weights_hash
from ..recipe import Recipe, load_recipe
from ..run_checks import write_whole
from ..train import training_arguments
from ..trainer import Fwd2BotTrainer
from .grid import METHODS, Row, rows

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
)


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    chosen = [
        row for row in rows() if row.name in (args.rows or [row.name]) and row.seed in (args.seeds or [row.seed])
    ]
    if args.list:
        for row in chosen:
            print(f"{'done' if (args.output / row.file).exists() else 'open':<6}{row.file.removesuffix('.json')}")
        return
    recipe = load_recipe(args.recipe, [f"training.output_dir={args.output / 'work'}", *args.overrides])
    args.output.mkdir(parents=True, exist_ok=True)
    backbone = bare_backbone(args.backbone, args.output / "backbone")
    command = command_of("baselines.run", sys.argv[1:] if arguments is None else arguments)
    options = {name: getattr(args, name) for name in ("steps", "minutes", "test_pictures", "split")}
    for row in chosen:
        file = args.output / row.file
        budget = budget_of(recipe, backbone, options)
        if file.exists():
            check_same_budget(file, budget)
            print(f"{row.file}: done before", flush=True)
            continue
        result = run_row(row, recipe, backbone, options) | {"command": command}
        write_whole(file, json.dumps(budget | result, indent=2) + "\n")
        print(f"{row.file}: {result['seconds']:.0f} s, loss {result['loss']}", flush=True)


def run_row(row: Row, recipe: Recipe, backbone: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Train a row and judge it.

    Args:
        backbone: folder of the frozen backbone.
        options: `steps`, `minutes` (after which training stops; None: never), `test_pictures` and `split`.
    """
    model, processor = build(row, recipe, backbone)
    method = METHODS[row.method]
    result: dict[str, Any] = {"name": row.name, "method": row.method, "seed": row.seed, "lengths": row.lengths}
    result |= {"config": row.config, "rank": row.rank, "about": method.about, "versions": versions()}
    begin = time.monotonic()
    if method.model is None:
        result |= {"steps_done": 0, "loss": None, "trained_parameters": 0, "seconds": 0.0}
    else:
        trainer = build_trainer(row, recipe, model, processor, options)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        result |= {"steps_done": trainer.state.global_step, "loss": [losses[0], losses[-1]]}
        result |= {"trained_parameters": trained, "seconds": round(time.monotonic() - begin, 1)}
        result["fingerprint"] = model.fingerprint
    figures = evaluate_model(
        model.eval(),
        processor,
        split=options["split"],
        pictures=options["test_pictures"],
        questions=5,
        retrieval=options["test_pictures"] if method.embeds else 0,
        several=0,
        presence=min(100, options["test_pictures"]),
        lengths=row.lengths or ([model.config.num_summary_tokens] if method.model else None),
        shapes_only=recipe.data.shapes_only,
        uncompressed=method.model is None,
    )
    return result | {"figures": figures}


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
    """The trainer of Fwd2Bot itself, without checkpoints."""
    values = {**recipe.training, "max_steps": options["steps"], "seed": row.seed, "save_strategy": "no"}
    args = training_arguments({**values, "report_to": "none", "logging_steps": max(1, options["steps"] // 20)})
    pictures = draw_pictures(recipe.data, Path(args.output_dir).parent / "pictures")
    trainer = Fwd2BotTrainer(
        model=model,
        args=args,
        train_dataset=CaptionedRows(recipe.data, pictures, Packer(processor.tokenizer, 1)),
        data_collator=Fwd2BotCollator(processor, recipe.data, recipe.data.row_length, METHODS[row.method].embeds),
        processing_class=processor,
        optimizer_recipe=recipe.optimizer,
    )
    if options["minutes"] is not None:
        trainer.add_callback(_StopAfter(60 * options["minutes"]))
    return trainer


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
        TypeError: `source` is no LLaVA and no Fwd2Bot on one.
    """
    config = AutoConfig.from_pretrained(source)
    kind = getattr(config, "backbone_config", config).model_type
    if kind != "llava":
        raise TypeError(f"{source} is a {kind}; the comparison is written for LLaVA. Name one, or a Fwd2Bot on one.")
    if config.model_type == "llava":
        return Path(source)
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
    return folder


def budget_of(recipe: Recipe, backbone: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What all rows of one comparison have in common."""
    values = {
        "backbone_sha256": weights_hash(backbone),
        "batch_size": recipe.training["per_device_train_batch_size"],
        "row_length": recipe.data.row_length,
        "lora_rank": recipe.model.lora_rank,
        "pictures": recipe.data.pictures,
        "shapes_only": recipe.data.shapes_only,
        **options,
    }
    return {name: values[name] for name in BUDGET}


def check_same_budget(file: Path, budget: dict[str, Any]) -> None:
    """Raise ValueError where a result was made under another budget, naming what differs."""
    stored = json.loads(file.read_text())
    differing = [
        f"{name} was {stored.get(name)!r} and is {budget[name]!r}"
        for name in BUDGET
        if stored.get(name) != budget[name]
    ]
    if differing:
        raise ValueError(f"{file} does not compare with this run: {'; '.join(differing)}. Name another output folder.")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fwd2bot.training.baselines.run", description=__doc__)
    parser.add_argument("output", type=Path, help="folder of the results, and of what the rows share")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe, such as data.pictures=5000")
    parser.add_argument(
        "--backbone", default="runs/backbone/final", help="a LLaVA, or a Fwd2Bot whose backbone to take"
    )
    parser.add_argument(
        "--recipe", default="fwd2bot.yaml", help="on drawn scenes; data, optimizer and rank are its own"
    )
    parser.add_argument("--steps", type=int, default=800, help="of every row")
    parser.add_argument("--minutes", type=float, help="stop the training of a row after so many")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these; --list shows all")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="only these")
    parser.add_argument("--test-pictures", type=int, default=400, help="five questions about each")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--list", action="store_true", help="show which rows are done and which are open")
    args = parser.parse_intermixed_args(arguments)
    known = {row.name for row in rows()}
    unknown = sorted(set(args.rows or ()) - known)
    if unknown:
        parser.error(f"unknown row {', '.join(unknown)}; choose from {', '.join(sorted(known))}")
    for name in ("steps", "test_pictures"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


if __name__ == "__main__":
    main()
