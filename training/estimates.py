"""Estimates of a run's memory and time: by one step on the real model, or by counts where it does not fit here."""

import dataclasses
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import psutil
import torch
from rich.box import SIMPLE
from rich.table import Table
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from fwd2bot import Fwd2BotForConditionalGeneration

from .recipe import Recipe
from .sharding import divided_modules, divided_parameters, is_sharded

GB = 1024**3
REACHED = 0.4  # share of a plain matrix product's speed that a training step may reach
PRODUCT = 2048  # rows and columns of the matrices whose product is timed


@dataclasses.dataclass
class DividedWeights:
    """Bytes of weights that one process holds where N processes divide the frozen ones (`accelerate/fsdp2.yaml`).

    Args:
        part: its N-th part of what is divided, which FSDP2 cuts by rows.
        whole: what every process holds: the rest of what is frozen, and what trains.
        gathered: of the largest divided module, which is whole while it runs.
    """

    part: int
    whole: int
    gathered: int

    @property
    def most(self) -> int:
        """At once: one module runs while the next one comes in."""
        return self.part + self.whole + 2 * self.gathered


def divided_weights(model: Fwd2BotForConditionalGeneration, processes: int) -> DividedWeights:
    """What each of so many processes would hold of a model, which may be without its weights (on the device meta)."""
    modules = list(divided_parameters(model).values())
    part = sum(
        -(-len(parameter) // processes) * (parameter.numel() // len(parameter)) * parameter.element_size()
        for parameters in modules
        for parameter in parameters
    )
    sizes = [memory(parameters) for parameters in modules]
    return DividedWeights(part, memory(model.parameters()) - sum(sizes), max(sizes))


def divided_rows(table: Table, divided: DividedWeights, processes: int) -> None:
    """The rows of a table that say so."""
    whole = f"{size(divided.whole)} of it whole on each"
    table.add_row(
        f"weights on each of {processes} processes of fsdp2.yaml", f"{size(divided.part + divided.whole)}, {whole}"
    )
    table.add_row("and two modules that run, whole, at most", size(2 * divided.gathered))


def measured_table(trainer: Any, batch: dict[str, Any], reading: float, processes: int | None = None) -> Table:
    """Memory by counts, and time by one step on the real model; both are estimates.

    Args:
        processes: what each of so many would hold with FSDP2 is told, too.
    """
    model, args = trainer.model, trainer.args
    trainer.create_optimizer()
    everything = list(model.parameters())
    trained = [parameter for parameter in everything if parameter.requires_grad]
    weights, gradients = memory(everything), memory(trained)
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds, kept = one_step(trainer, batch)
    table = Table("estimate", "", title="memory and time", box=SIMPLE, pad_edge=False)
    table.add_row("parameters", f"{sum(p.numel() for p in everything):,}, of them trained {count(trained):,}")
    if is_sharded(model):
        divided = divided_weights(model, args.world_size)
        divided_rows(table, divided, args.world_size)
        weights = divided.most
    else:
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
    if processes is not None and not is_sharded(model):
        divided = divided_weights(model, processes)
        divided_rows(table, divided, processes)
        kept = max(0, peak - before - gradients) if cuda else kept
        table.add_row(f"in all, on each of these {processes}", size(divided.most + 3 * gradients + kept))
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
    kept = _Kept(storages_of(model))
    hooks = []
    if is_sharded(model):  # FSDP2's own hooks come first
        hooks = [module.register_forward_pre_hook(kept.own) for module in divided_modules(model)]
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as in train()
    started = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, lambda held: held.tensor):
        trainer.training_step(model, batch)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    for hook in hooks:
        hook.remove()
    model.zero_grad(set_to_none=True)
    return seconds, kept.peak


class _Kept:
    """Bytes of the storages that autograd holds on to, weights not counted."""

    def __init__(self, owned: set[int]):
        self.owned, self.users = owned, Counter()
        self.bytes = self.peak = 0

    def own(self, module: nn.Module, inputs: Any) -> None:
        """Count the weights of a module no more, which have just been gathered."""
        self.owned |= storages_of(module)

    def keep(self, tensor: torch.Tensor) -> "_Held":
        return _Held(self, tensor)

    def add(self, key: int, amount: int, users: int) -> None:
        before = self.users[key]
        self.users[key] += users
        if not before or not self.users[key]:
            self.bytes += amount if users > 0 else -amount
            self.peak = max(self.peak, self.bytes)


class _Held:
    """A tensor that autograd keeps; when the graph lets go of it, it no longer counts."""

    def __init__(self, kept: _Kept, tensor: torch.Tensor):
        self.kept, self.tensor = kept, tensor
        storage = tensor.untyped_storage()
        self.counted = None if storage.data_ptr() in kept.owned else (storage.data_ptr(), storage.nbytes())
        if self.counted is not None:
            kept.add(*self.counted, 1)

    def __del__(self):
        if self.counted is not None:
            self.kept.add(*self.counted, -1)


def storages_of(module: nn.Module) -> set[int]:
    """Where the weights of a module are that this process holds."""
    own = (value.to_local() if isinstance(value, DTensor) else value for value in module.parameters())
    return {value.untyped_storage().data_ptr() for value in own}


def size(amount: float) -> str:
    return f"{amount / GB:.2f} GB" if amount >= GB / 10 else f"{amount / 1024**2:.1f} MB"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds:.0f} s"


def weights_of(model: Fwd2BotForConditionalGeneration, quantization: str | None) -> int:
    """Bytes of all weights of a model, which may be without them (on the device meta)."""
    if quantization is None:
        return memory(model.parameters())
    head, bits = model.get_output_embeddings(), {"4bit": 4, "8bit": 8}[quantization]
    packed = {  # bitsandbytes leaves the head alone, and what is no linear layer
        id(module.weight): module.weight.numel()
        for module in model.backbone.modules()
        if isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    }
    rest = memory(parameter for parameter in model.parameters() if id(parameter) not in packed)
    return rest + sum(packed.values()) * bits // 8


def fits(model: Fwd2BotForConditionalGeneration, recipe: Recipe, args: TrainingArguments, sharded: bool) -> bool:
    """Whether a model, given without its weights, can be loaded here, on this process's device."""
    weights, device = weights_of(model, recipe.model.quantization), args.device
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if sharded:  # each loads it whole, and keeps its part
        part = divided_weights(model, args.world_size).most
        on_device = device.type == "cpu" or part <= free_memory(device)
        return on_device and weights * on_machine <= free_memory(torch.device("cpu"))
    return weights * (on_machine if device.type == "cpu" else 1) <= free_memory(device)


def free_memory(device: torch.device) -> int:
    """Bytes that a model could take on a device now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def counted_table(
    model: Fwd2BotForConditionalGeneration,
    recipe: Recipe,
    args: TrainingArguments,
    batch: dict[str, Any],
    reading: float,
    processes: int | None = None,
) -> Table:
    """Memory of the weights, and time from the number of tokens, where the weights do not fit into the memory.

    Args:
        model: without its weights.
        processes: what each of so many would hold with FSDP2 is told, too.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
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
    table.add_row("frozen parameters", f"{parameters:,}")
    table.add_row("parameters that train", f"{count(trained):,}")
    table.add_row("weights", size(weights_of(model, recipe.model.quantization)))
    table.add_row("gradients and optimizer state, two moments at most", size(3 * memory(trained)))
    if processes is not None:
        divided_rows(table, divided_weights(model, processes), processes)
    table.add_row(f"free on {args.device}", size(free_memory(args.device)))
    table.add_row("tokens of a batch, over both passes", f"{tokens:,}")
    table.add_row(f"matrix product on {args.device} (measured)", f"{speed / 1e12:.2f} TFLOP/s")
    table.add_row(f"one step at {REACHED:.0%} of it", f"{seconds:.2f} s")
    table.add_row("reading a step's batches in one worker", f"{reading * args.gradient_accumulation_steps:.2f} s")
    table.add_row(f"{args.max_steps:,} steps", hours(args.max_steps * seconds))
    table.caption = "rough; activations come on top"
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


def memory(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Bytes of whole parameters."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def count(parameters: Sequence[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
