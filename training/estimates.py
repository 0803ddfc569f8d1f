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
from transformers import TrainingArguments

from fwd2bot import Fwd2BotForConditionalGeneration

from .recipe import Recipe
from .sharding import ZERO3, Sharding, divided_parameters, held_part, is_divided, is_sharded, vision_layers
from .zero3 import whole_size

GB = 1024**3
REACHED = 0.4  # share of a plain matrix product's speed that a training step may reach
PRODUCT = 2048  # rows and columns of the matrices whose product is timed


@dataclasses.dataclass
class DividedWeights:
    """Bytes of weights that one process holds where N processes divide the frozen ones (see `sharding`).

    Args:
        part: its N-th part of what is divided: FSDP2 cuts by rows, ZeRO-3 by elements.
        whole: what every process holds: the rest of what is frozen, and what trains.
        gathered: of the modules that are whole at once, at most.
    """

    part: int
    whole: int
    gathered: int

    @property
    def most(self) -> int:
        """At once."""
        return self.part + self.whole + self.gathered


def divided_weights(
    model: Fwd2BotForConditionalGeneration, processes: int, sharding: Sharding | None = None
) -> DividedWeights:
    """What each of so many processes would hold of a model, which may be without its weights (on the device meta).

    Args:
        sharding: None: FSDP2 with its defaults.
    """
    sharding = sharding or Sharding()
    divided = divided_parameters(model, sharding)
    sizes = {module: memory(parameters) for module, parameters in divided.items()}
    everything = [parameter for parameters in divided.values() for parameter in parameters]
    part = sum(_part(parameter, processes, sharding) * parameter.element_size() for parameter in everything)
    whole = memory(model.parameters()) - sum(sizes.values())
    if sharding.method == ZERO3:  # until the backward pass of a layer is over, all of it may have come in
        of_layers = [sum(sizes.get(part, 0) for part in layer.modules()) for layer in model.get_decoder().layers]
        return DividedWeights(part, whole, max([*of_layers, *sizes.values()]))
    if sharding.reshard_after_forward:  # one module runs while the next one comes in
        return DividedWeights(part, whole, 2 * max(sizes.values()))
    of_tower = [sizes.pop(module) for module in vision_layers(model)]
    return DividedWeights(part, whole, sum(sizes.values()) + 2 * max(of_tower, default=0))


def _part(parameter: torch.Tensor, processes: int, sharding: Sharding) -> int:
    """Elements of the first process's part, to which the others are padded."""
    if sharding.method == ZERO3:
        return -(-whole_size(parameter) // processes)
    return -(-len(parameter) // processes) * (parameter.numel() // len(parameter))


def divided_rows(table: Table, divided: DividedWeights, processes: int, sharding: Sharding) -> None:
    """The rows of a table that say so."""
    held = f"{size(divided.part + divided.whole)}, {size(divided.whole)} of it whole on each"
    table.add_row(f"weights on each of {processes} processes of {sharding.configuration}", held)
    table.add_row("and of modules that are whole at once, at most", size(divided.gathered))


def measured_table(
    trainer: Any,
    batch: dict[str, Any],
    reading: float,
    processes: int | None = None,
    sharding: Sharding | None = None,
) -> Table:
    """Memory by counts, and time by one step on the real model; both are estimates.

    Args:
        processes: what each of so many would hold with FSDP2 is told, too.
        sharding: how the model is divided.
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
    table.add_row("parameters", f"{count(everything):,}, of them trained {count(trained):,}")
    if sharding is not None:
        divided = divided_weights(model, args.world_size, sharding)
        divided_rows(table, divided, args.world_size, sharding)
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
        again = "; those of one layer, computed again, come on top" if trainer.checkpoints_layers else ""
        table.add_row(f"activations kept for the backward pass{again}", size(kept))
        table.add_row("in all", size(weights + 3 * gradients + kept))
    if processes is not None and sharding is None:
        divided = divided_weights(model, processes)
        divided_rows(table, divided, processes, Sharding())
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
    for module in model.modules() if is_sharded(model) else ():
        if any(is_divided(value) for value in module.parameters(recurse=False)):
            hooks += [module.register_forward_pre_hook(kept.begin), module.register_forward_hook(kept.end)]
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps  # as in train()
    trainer.checkpoint_layers()
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
        self.gathered: set[int] = set()  # of the module that runs; later others stand in their place
        self.bytes = self.peak = 0

    def begin(self, module: nn.Module, inputs: Any) -> None:
        """The weights of a module are here, which runs now."""
        self.gathered = {value.untyped_storage().data_ptr() for value in module.parameters(recurse=False)}

    def end(self, module: nn.Module, inputs: Any, outputs: Any) -> None:
        self.gathered = set()

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
        is_weight = storage.data_ptr() in kept.owned or storage.data_ptr() in kept.gathered
        self.counted = None if is_weight else (storage.data_ptr(), storage.nbytes())
        if self.counted is not None:
            kept.add(*self.counted, 1)

    def __del__(self):
        if self.counted is not None:
            self.kept.add(*self.counted, -1)


def storages_of(module: nn.Module) -> set[int]:
    """Where the weights of a module are that this process holds."""
    return {held_part(value).untyped_storage().data_ptr() for value in module.parameters()}


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


def fits(
    model: Fwd2BotForConditionalGeneration, recipe: Recipe, args: TrainingArguments, sharding: Sharding | None
) -> bool:
    """Whether a model, given without its weights, can be loaded here, on this process's device."""
    weights, device = weights_of(model, recipe.model.quantization), args.device
    on_machine = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if sharding is not None:  # each loads it whole, and keeps its part
        part = divided_weights(model, args.world_size, sharding).most
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
    sharding: Sharding | None = None,
) -> Table:
    """Memory of the weights, and time from the number of tokens, where the weights do not fit into the memory.

    Args:
        model: without its weights.
        processes: what each of so many would hold is told, too.
        sharding: how they divide it; None: with FSDP2.
    """
    sharding = sharding or Sharding()
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
        divided_rows(table, divided_weights(model, processes, sharding), processes, sharding)
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
    return sum(whole_size(parameter) * parameter.element_size() for parameter in parameters)


def count(parameters: Sequence[torch.nn.Parameter]) -> int:
    return sum(map(whole_size, parameters))
