"""`python -m fwd2bot.training.train RECIPE --check`: a look at a sample of everything; nothing is trained."""

import dataclasses
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers.utils import logging

from .data import IGNORED
from .recipe import Recipe
from .source_recipe import SourcesData
from .sources import MalformedRowError, SamplePreparer, Source, SourceMixture

logger = logging.get_logger(__name__)

SAMPLED = 64  # rows of each source that are read
EXAMPLE_TOKENS = 400  # of a decoded example
GB = 1024**3


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


def check(recipe: Recipe, console: Console | None = None) -> None:
    """Print what a run of this recipe would read, and an estimate of its memory and time; train nothing.

    The model is built as for the run, in a folder that is removed again, and goes once forward and backward on the
    first batch, so that what cannot work fails here.

    Raises:
        ValueError: the recipe has no `data.sources`, or one of them cannot be used; see `Source`.
    """
    from .train import build_trainer

    console = console or Console()
    if not isinstance(recipe.data, SourcesData):
        raise ValueError("--check reads data sets, but the recipe has no data.sources; the drawn world needs none")
    with tempfile.TemporaryDirectory(prefix="fwd2bot-check-") as folder:
        training = recipe.training | {"output_dir": folder, "report_to": "none"}
        trainer = build_trainer(dataclasses.replace(recipe, training=training))
        mixture = trainer.train_dataset
        tokenizer = mixture.prepare.encoder.tokenizer
        reports = [inspect_source(source, mixture.prepare, recipe.data.seed) for source in mixture.sources]
        console.print(sources_table(reports, recipe.data))
        for report in reports:
            for line in report.broken[:5]:
                console.print(f"  broken in {report.name}: {line}", style="red", markup=False)
            if report.example is not None:
                console.print(f"\nan example of {report.name}; ⟦learnt⟧", style="bold", markup=False)
                console.print(marked(report.example, tokenizer), soft_wrap=True)
        batch, seconds = first_batch(mixture, trainer)
        console.print(batch_table(batch, trainer.model))
        console.print(estimate_table(trainer, batch, seconds))


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
    return report


def sources_table(reports: Sequence[SourceReport], data: SourcesData) -> Table:
    table = Table(title="sources, by a sample of their rows")
    for name in ("source", "share", "rows", "read", "broken", "left out", "images", "tokens", "learnt", "captions"):
        table.add_column(name, justify="left" if name == "source" else "right")
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
            f"{report.captions} + {report.negatives} hard negatives" if report.negatives else str(report.captions),
        )
    table.caption = "images, tokens (an image is one), learnt tokens: median, largest"
    return table


def spread(values: Sequence[int]) -> str:
    return f"{statistics.median(values):.0f}, {max(values)}" if values else "-"


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


def first_batch(mixture: SourceMixture, trainer: Any) -> tuple[dict[str, Any], float]:
    """The first batch of this process, and the seconds that reading it took in one worker."""
    started = time.perf_counter()
    batch = trainer.data_collator([mixture[position] for position in range(trainer.args.train_batch_size)])
    return batch, time.perf_counter() - started


def batch_table(batch: dict[str, Any], model: Any) -> Table:
    table = Table("tensor", "shape", "of it padding", title="the first batch")
    for prefix, tensors in parts_of(batch):
        for name, value in tensors.items():
            mask = tensors.get(name.replace("input_ids", "attention_mask"))
            padding = f"{1 - mask.float().mean().item():.1%}" if name.endswith("input_ids") else ""
            table.add_row(f"{prefix}{name}", str(tuple(value.shape)), padding)
    if "text_image_mask" in batch and batch["text_image_mask"].numel():
        shut = int((~batch["text_image_mask"]).sum())
        table.add_row("text_image_mask", str(tuple(batch["text_image_mask"].shape)), f"{shut} pairs are no negatives")
    config = model.config
    if hasattr(config, "num_summary_tokens"):
        image_tokens = sum(
            int((chunk["compress_input_ids"] == model.image_token_id).sum())
            for chunk in batch["chunks"]
            if "compress_input_ids" in chunk
        )
        images = len(batch["image_group"])
        table.caption = (
            f"k is one of {config.summary_lengths} for each image, at most {config.num_summary_tokens}; the backbone "
            f"reads {image_tokens / max(images, 1):.0f} image tokens for one"
        )
    return table


def parts_of(batch: dict[str, Any]) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """The tensors of a batch under the names of its parts; chunks after the first three are left out."""
    if "chunks" not in batch:
        return [("", {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)})]
    parts = [(f"chunks[{index}].", chunk) for index, chunk in enumerate(batch["chunks"][:3])]
    return parts + [(f"text_chunks[{index}].", chunk) for index, chunk in enumerate(batch["text_chunks"][:3])]


def estimate_table(trainer: Any, batch: dict[str, Any], reading: float) -> Table:
    """Memory by counts, and time by one step on the real model; both are estimates."""
    model, args = trainer.model, trainer.args
    trainer.create_optimizer()
    everything = list(model.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in everything)
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in trained)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds, kept = one_step(trainer, batch)
    table = Table("estimate", "", title="memory and time")
    table.add_row("parameters", f"{sum(p.numel() for p in everything):,}, of them trained {count(trained):,}")
    table.add_row("weights", size(weights))
    table.add_row("gradients", size(gradients))
    table.add_row("optimizer state, two moments at most", size(2 * gradients))
    if cuda:
        peak = torch.cuda.max_memory_allocated()
        table.add_row("activations (measured)", size(max(0, peak - before - gradients)))
        table.add_row("peak of the step (measured), and the optimizer", size(peak + 2 * gradients))
    else:
        table.add_row("activations kept for the backward pass", size(kept))
        table.add_row("in all", size(weights + 3 * gradients + kept))
    per_step = seconds * args.gradient_accumulation_steps
    workers = max(args.dataloader_num_workers, 1)
    bound = reading / workers * args.gradient_accumulation_steps
    slower = "the model" if per_step >= bound else "reading, so more dataloader_num_workers would help"
    table.add_row(f"one step on {model.device}, without the optimizer", f"{per_step:.2f} s")
    table.add_row(f"reading a step's batches in {workers} worker(s)", f"{bound:.2f} s")
    table.add_row(f"{args.max_steps:,} steps, bound by {slower}", hours(args.max_steps * max(per_step, bound)))
    table.caption = "estimates of one process: the first step is slower than later ones, and batches differ"
    return table


def one_step(trainer: Any, batch: dict[str, Any]) -> tuple[float, int]:
    """Seconds of one forward and backward pass, and the most bytes that were kept for the backward pass at once."""
    model = trainer.model
    kept = _Kept({parameter.untyped_storage().data_ptr() for parameter in model.parameters()})
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as in train()
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda held: held.tensor):
        trainer.training_step(model, batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return seconds, kept.peak


class _Kept:
    """Bytes of the storages that autograd holds on to, weights not counted."""

    def __init__(self, owned: set[int]):
        self.owned, self.users = owned, Counter()
        self.bytes = self.peak = 0

    def keep(self, tensor: torch.Tensor) -> "_Held":
        return _Held(self, tensor)

    def add(self, storage: torch.UntypedStorage, users: int) -> None:
        key = storage.data_ptr()
        if key in self.owned:
            return
        before = self.users[key]
        self.users[key] += users
        if not before or not self.users[key]:
            self.bytes += storage.nbytes() if users > 0 else -storage.nbytes()
            self.peak = max(self.peak, self.bytes)


class _Held:
    """A tensor that autograd keeps; when the graph lets go of it, it no longer counts."""

    def __init__(self, kept: _Kept, tensor: torch.Tensor):
        self.kept, self.tensor = kept, tensor
        kept.add(tensor.untyped_storage(), 1)

    def __del__(self):
        self.kept.add(self.tensor.untyped_storage(), -1)


def size(amount: float) -> str:
    return f"{amount / GB:.2f} GB" if amount >= GB / 10 else f"{amount / 1024**2:.1f} MB"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds:.0f} s"


def count(parameters: Sequence[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
