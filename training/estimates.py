"""Estimates of a run's memory and time: by one step on the real model, or by counts where it does not fit here."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from rich.box import SIMPLE
from rich.table import Table
from transformers import AutoConfig, AutoModelForImageTextToText, TrainingArguments

from fwd2bot import Fwd2BotConfig
from fwd2bot.folder_fwd2bot import check_name

from .recipe import Recipe

GB = 1024**3
REACHED = 0.4  # share of a plain matrix product's speed that a training step may reach
PRODUCT = 2048  # rows and columns of the matrices whose product is timed


def measured_table(trainer: Any, batch: dict[str, Any], reading: float) -> Table:
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
    table = Table("estimate", "", title="memory and time", box=SIMPLE, pad_edge=False)
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


def frozen_weights(recipe: Recipe) -> tuple[int, int]:
    """Number of parameters of a Fwd2Bot's backbone, from its config alone, and the bytes that they will take."""
    chosen = recipe.model
    check_name(chosen.init_from or chosen.backbone, "Fwd2Bot" if chosen.init_from else "backbone")
    if chosen.init_from:
        config = Fwd2BotConfig.from_pretrained(chosen.init_from).backbone_config
    else:
        config = AutoConfig.from_pretrained(chosen.backbone, revision=chosen.backbone_revision or "main")
    with torch.device("meta"):
        parameters = count(list(AutoModelForImageTextToText.from_config(config).parameters()))
    bits = {"4bit": 4, "8bit": 8, None: 8 * getattr(torch, chosen.dtype).itemsize}[chosen.quantization]
    return parameters, parameters * bits // 8


def free_memory(device: torch.device) -> int:
    """Bytes that a model could take on a device now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def counted_table(
    recipe: Recipe, args: TrainingArguments, batch: dict[str, Any], frozen: tuple[int, int], reading: float
) -> Table:
    """Memory of the weights, and time from the number of tokens, where the weights do not fit into the memory."""
    parameters, weights = frozen
    tokens = sum(
        int(mask.sum())
        for part in (*batch["chunks"], *batch["text_chunks"])
        for name, mask in part.items()
        if name.endswith("attention_mask")
    )
    passes = (
        6 if recipe.contrastive.chunk_size else 4
    )  # forward and backward, weights frozen; chunks run forward twice
    speed = matrix_speed(args.device, getattr(torch, recipe.model.dtype))
    seconds = passes * parameters * tokens / (REACHED * speed) * args.gradient_accumulation_steps
    title = "memory and time, by counts: the weights do not fit into the memory here"
    table = Table("estimate", "", title=title, box=SIMPLE, pad_edge=False)
    table.add_row("parameters of the backbone", f"{parameters:,}")
    table.add_row("weights of the backbone", size(weights))
    table.add_row(f"free on {args.device}", size(free_memory(args.device)))
    table.add_row("tokens of a batch, over both passes", f"{tokens:,}")
    table.add_row(f"matrix product on {args.device} (measured)", f"{speed / 1e12:.2f} TFLOP/s")
    table.add_row(f"one step at {REACHED:.0%} of it", f"{seconds:.2f} s")
    table.add_row("reading a step's batches in one worker", f"{reading * args.gradient_accumulation_steps:.2f} s")
    table.add_row(f"{args.max_steps:,} steps", hours(args.max_steps * seconds))
    table.caption = "rough; adapters, optimizer state and activations come on top of the weights"
    return table


def matrix_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product."""
    matrix = torch.ones(PRODUCT, PRODUCT, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * PRODUCT**3 / best


def count(parameters: Sequence[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
