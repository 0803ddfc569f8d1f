"""`python -m fwd2bot.training.train RECIPE --check`: a look at a sample of everything; nothing is trained."""

import dataclasses
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoProcessor, TrainingArguments

from fwd2bot import Fwd2BotConfig, Fwd2BotForConditionalGeneration, Fwd2BotProcessor
from fwd2bot.backbone_fwd2bot import check_processor

from .data import IGNORED
from .estimates import counted_table, fits, measured_table
from .fwd2bot_model import check_compiler, outline_fwd2bot
from .gathering import all_agree
from .recipe import Recipe
from .run_checks import check_folder, check_recipe, check_same_run, check_summary_length
from .sharding import Sharding, take_over_sharding
from .source_recipe import SourcesData
from .sources import (
    MalformedRowError,
    SamplePreparer,
    Source,
    SourceCollator,
    SourceMixture,
    open_sources,
    run_mixture,
)
from .trainer import newest_checkpoint
from .validation_data import validation_of

SAMPLED = 64  # rows of each source that are read
EXAMPLE_TOKENS = 400  # of a decoded example
FILE_WIDTH = 140  # columns, where the output goes into a file or a pipe


@dataclasses.dataclass
class SourceReport:
    """What a sample of one source's rows holds."""

    name: str
    rows: int | None  # None: a stream
    read: int = 0
    left_out: int = 0  # have nothing for the source's use
    broken: list[str] = dataclasses.field(default_factory=list)  # key and reason
    tokens: list[int] = dataclasses.field(default_factory=list)  # of each conversation, images as one
    learnt: list[int] = dataclasses.field(default_factory=list)  # labels of each conversation
    images: list[int] = dataclasses.field(default_factory=list)  # of each sample
    captions: int = 0  # for the contrastive side
    negatives: int = 0
    example: dict[str, Any] | None = None


def check(recipe: Recipe, console: Console | None = None, processes: int | None = None) -> None:
    """Print what a run of this recipe would read, and an estimate of its memory and time; train nothing.

    The model is built as for the run, in a folder that is removed again, and goes once forward and backward on the
    first batch, so that what cannot work fails here. Where its weights do not fit into the memory, the model is built
    without them, for what its config can tell, and the estimate is made by counts. The folder of the run is looked at
    and left as it is.

    Started by `accelerate launch`, all processes take part, and the first one prints.

    Args:
        processes: tell what each of so many would hold, if they were started with `accelerate/fsdp2.yaml`.

    Raises:
        ValueError: the recipe has no `data.sources`, one of them cannot be used (see `Source`), or
            `training.output_dir` has a run that was begun with another recipe.
        OSError: `training.output_dir` cannot be written.
    """
    from .train import build_trainer, training_arguments

    console = console or Console(width=None if sys.stdout.isatty() else FILE_WIDTH)
    if not isinstance(recipe.data, SourcesData):
        raise ValueError("--check reads data sets, but the recipe has no data.sources; the drawn world needs none")
    sharding = take_over_sharding()
    args = training_arguments(recipe.training)
    console.quiet = args.process_index > 0
    check_recipe(recipe, args, sharding)
    if processes is not None:
        check_processes(processes, recipe, args)
    output_dir = Path(args.output_dir)
    check_folder(output_dir, make=False)
    checkpoint = newest_checkpoint(output_dir, clean=False) if recipe.resume else None
    # one process may look for a run of many
    check_same_run(recipe, output_dir, checkpoint, args.world_size if args.world_size > 1 else None, sharding)
    outline = outline_fwd2bot(recipe, args, sharding) if recipe.kind == "fwd2bot" else None
    if outline is not None and recipe.model.compile_layers:  # one step would be timed with the minute of compiling
        check_compiler(args.device)
        recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, compile_layers=False))
        console.print(
            "model.compile_layers is left out here: a run takes less time than the estimate", highlight=False
        )
    with tempfile.TemporaryDirectory(prefix="fwd2bot-check-") as folder:
        recipe = dataclasses.replace(recipe, training=recipe.training | {"output_dir": folder, "report_to": "none"})
        args = training_arguments(recipe.training)
        if outline is not None and not all_agree(fits(outline, recipe, args, sharding), args.device):
            processes = args.world_size if sharding else processes
            check_without_weights(recipe, args, outline, console, processes, sharding)
            return
        trainer = build_trainer(recipe)
        print_sources(trainer.train_dataset, console)
        batch, reading = first_batch(trainer.train_dataset, trainer.data_collator, trainer.args)
        trainer.train_dataset.close()
        config = trainer.model.config
        console.print(batch_table(batch, config.backbone_config.image_token_id if "chunks" in batch else None))
        if hasattr(config, "summary_lengths"):
            print_lengths(config, console)
        console.print(measured_table(trainer, batch, reading, processes, sharding))


def check_processes(processes: int, recipe: Recipe, args: TrainingArguments) -> None:
    """Raise `ValueError` for a number of processes to ask about that FSDP2 would not start with."""
    if processes < 2:
        raise ValueError(f"--processes is {processes}; FSDP2 divides weights among 2 or more")
    if args.world_size not in (1, processes):
        raise ValueError(f"--processes is {processes}, but {args.world_size} were started; leave it out")
    check_recipe(recipe, args, Sharding())


def check_without_weights(
    recipe: Recipe,
    args: TrainingArguments,
    outline: Fwd2BotForConditionalGeneration,
    console: Console,
    processes: int | None,
    sharding: Sharding | None,
) -> None:
    """What `check` does where the weights do not fit into the memory."""
    processor = backbone_processor_of(recipe)
    check_processor(outline.backbone, processor.backbone_processor)
    check_summary_length(recipe, outline.config.num_summary_tokens)
    validation_of(recipe, processor, args)
    mixture = run_mixture(open_sources(recipe.data), recipe.data, processor, args)
    print_sources(mixture, console)
    batch, reading = first_batch(mixture, SourceCollator(processor, recipe.contrastive.chunk_size), args)
    mixture.close()
    console.print(batch_table(batch, processor.image_token_id))
    print_lengths(outline.config, console)
    console.print(counted_table(outline, recipe, args, batch, reading, processes, sharding))


def print_lengths(config: Fwd2BotConfig, console: Console) -> None:
    said = f"k is one of {config.summary_lengths} for each image, at most {config.num_summary_tokens}"
    console.print(said, markup=False, highlight=False)


def print_sources(mixture: SourceMixture, console: Console) -> None:
    """What a sample of each source's rows holds, broken ones, and an example of each."""
    data, prepare = mixture.data, mixture.prepare
    reports = [inspect_source(source, prepare, data.seed) for source in mixture.sources]
    console.print(sources_table(reports, data))
    for report in reports:
        for line in report.broken[:5]:
            console.print(f"  broken in {report.name}: {line}", style="red", markup=False)
        if report.example is not None:
            console.print(f"\nan example of {report.name}; ⟦learnt⟧", style="bold", markup=False)
            console.print(marked(report.example, prepare.encoder.tokenizer), soft_wrap=True)


def backbone_processor_of(recipe: Recipe) -> Fwd2BotProcessor:
    """The processor of a recipe's Fwd2Bot, without its model."""
    chosen = recipe.model
    if chosen.init_from:
        return Fwd2BotProcessor.from_pretrained(chosen.init_from)
    revision = chosen.backbone_revision or "main"
    return Fwd2BotProcessor(AutoProcessor.from_pretrained(chosen.backbone, revision=revision))


def inspect_source(source: Source, prepare: SamplePreparer, seed: int, count: int = SAMPLED) -> SourceReport:
    """Read some rows of a source, spread over a table or the first of a stream."""
    report = SourceReport(source.recipe.name, None if source.streamed else len(source))
    if source.streamed:
        numbered = source.rows(seed)
        rows = (next(numbered) for _ in range(count))
    else:
        numbers = random.Random(seed).sample(range(len(source)), min(count, len(source)))
        rows = ((number, source.table[number]) for number in sorted(numbers))
    for number, row in rows:
        report.read += 1
        try:
            sample = prepare(source.read(row, number), random.Random(f"{seed}/{number}"))
        except (MalformedRowError, ValueError, OSError) as error:
            report.broken.append(f"{source.read.key(row, number)}: {error}")
            continue
        if sample is None:
            report.left_out += 1
            continue
        report.images.append(len(sample["images"]))
        report.captions += len(sample["captions"])
        report.negatives += len(sample["negatives"])
        if sample["labels"] is not None:
            report.tokens.append(len(sample["labels"]))
            report.learnt.append(sum(label != IGNORED for label in sample["labels"]))
        if report.example is None:
            report.example = sample
    rows.close()
    return report


def sources_table(reports: Sequence[SourceReport], data: SourcesData) -> Table:
    table = Table(title="sources, by a sample of their rows", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("source", overflow="fold")
    for name in ("share", "rows", "read", "broken", "left out", "images", "tokens", "learnt", "captions"):
        table.add_column(name, justify="right", overflow="fold")  # a narrow terminal breaks figures, and cuts none
    weights = {source.name: source.weight for source in data.sources}
    for report in reports:
        table.add_row(
            report.name,
            f"{weights[report.name] / sum(weights.values()):.1%}",
            "stream" if report.rows is None else f"{report.rows:,}",
            str(report.read),
            str(len(report.broken)),
            str(report.left_out),
            spread(report.images),
            spread(report.tokens),
            spread(report.learnt),
            f"{report.captions}+{report.negatives}" if report.negatives else str(report.captions),
        )
    table.caption = (
        "images, tokens (an image is one) and learnt tokens of a sample: median/largest; captions for the contrastive "
        "side + hard negatives"
    )
    return table


def spread(values: Sequence[int]) -> str:
    return f"{statistics.median(values):.0f}/{max(values)}" if values else "-"


def marked(sample: dict[str, Any], tokenizer: Any) -> Text:
    """The sample as its tokens read, what is learnt within ⟦ ⟧, and the captions of the contrastive side."""
    text = Text()
    ids, labels = sample["input_ids"] or [], sample["labels"] or []
    start = 0
    while start < min(len(ids), EXAMPLE_TOKENS):
        end = start
        while end < len(ids) and (labels[end] != IGNORED) == (labels[start] != IGNORED):
            end += 1
        words = tokenizer.decode(ids[start:end], skip_special_tokens=False)
        if labels[start] != IGNORED:
            text.append(f"⟦{words}⟧", style="bold green")
        else:
            text.append(words)
        start = end
    for caption in sample["captions"]:
        text.append(f"\ncontrastive: {caption}", style="cyan")
    for negative in sample["negatives"]:
        text.append(f"\nhard negative: {negative}", style="magenta")
    sizes = ", ".join(f"{image.width} x {image.height}" for image in sample["images"])
    text.append(f"\nkey {sample['key']}, pictures {sizes or 'none'}", style="dim")
    return text


def first_batch(mixture: SourceMixture, collator: Any, args: TrainingArguments) -> tuple[dict[str, Any], float]:
    """The first batch of this process, and the seconds that reading it took in one worker."""
    started = time.perf_counter()
    batch = collator([mixture[position] for position in range(args.train_batch_size)])
    return batch, time.perf_counter() - started


def batch_table(batch: dict[str, Any], image_token_id: int | None = None) -> Table:
    table = Table("tensor", "shape", "of it padding", title="the first batch", box=SIMPLE, pad_edge=False)
    for prefix, tensors in parts_of(batch):
        for name, value in tensors.items():
            mask = tensors.get(name.replace("input_ids", "attention_mask"))
            padding = f"{1 - mask.float().mean().item():.1%}" if name.endswith("input_ids") else ""
            table.add_row(f"{prefix}{name}", str(tuple(value.shape)), padding)
    if "text_image_mask" in batch and batch["text_image_mask"].numel():
        shut = int((~batch["text_image_mask"]).sum() - (batch["text_image"] >= 0).sum())  # own texts are shut, too
        table.add_row("text_image_mask", str(tuple(batch["text_image_mask"].shape)), f"{shut} pairs are no negatives")
    if image_token_id is not None:
        read = [chunk["compress_input_ids"] for chunk in batch["chunks"] if "compress_input_ids" in chunk]
        tokens = sum(int((ids == image_token_id).sum()) for ids in read)
        images = len(batch["image_group"])
        table.caption = (
            f"{len(batch['chunks'])} chunk(s) and {len(batch['text_chunks'])} of texts; {images} images of "
            f"{tokens / max(images, 1):.0f} image tokens"
        )
    return table


def parts_of(batch: dict[str, Any]) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """The tensors of a batch under the names of its parts; of many chunks the first and the last.

    They are in the order of their conversations' lengths, so the first may have none, and the last has the longest.
    """
    if "chunks" not in batch:
        return [("", {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)})]
    parts = []
    for name in ("chunks", "text_chunks"):
        ends = sorted({0, len(batch[name]) - 1}) if batch[name] else []
        parts += [(f"{name}[{index}].", batch[name][index]) for index in ends]
    return parts
