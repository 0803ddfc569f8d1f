"""The frozen weights of the backbone divided among the processes, what trains whole on each of them.

Adapters, queries and projector are small: every process keeps them, their gradients and their optimiser state, as with
DDP. So any optimiser will do, and checkpoints hold the adapters alone, as those of a quantised backbone.

`accelerate launch` asks for it, with a configuration of FSDP2 or of DeepSpeed's ZeRO-3 (see `zero3`). accelerate's own
wrappers are not used: they divide every parameter, scalars among them, which neither takes, and work for `forward`
alone, where a step here also calls `contrastive_loss` and `generate`. On a CPU accelerate passes over a configuration
of FSDP without a word.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.pickling_fwd2bot import allow_recording

from . import zero3
from .gathering import world_size

FSDP2, ZERO3 = "FSDP2", "ZeRO-3"
_CONFIGURATIONS = {FSDP2: "fsdp2.yaml", ZERO3: "zero3.yaml"}  # of the package, under accelerate/


@dataclass(frozen=True)
class Sharding:
    """How the frozen weights are divided.

    Args:
        method: `FSDP2` or `ZERO3`.
        reshard_after_forward: of FSDP2: whether a decoder layer's weights are given up between its forward and its
            backward pass. Those of the vision tower always are: it has no backward pass.
    """

    method: str = FSDP2
    reshard_after_forward: bool = True

    @property
    def configuration(self) -> str:
        """The file of the package that asks for it."""
        return _CONFIGURATIONS[self.method]


_taken_over: Sharding | None = None  # for every run that this process builds


def take_over_sharding() -> Sharding | None:
    """What `accelerate launch` asks of FSDP or DeepSpeed, which then leave it to `shard_frozen`; None: nothing.

    accelerate and transformers go by an entry of the environment, which is taken out; what it asked is kept for every
    later call in the process.

    Raises:
        ValueError: for FSDP1, another stage of ZeRO, and a setting that would have no effect.
        ImportError: for ZeRO-3 without DeepSpeed.
    """
    global _taken_over
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        zero3.check_launched()
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
        _taken_over = Sharding(ZERO3)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        _taken_over = Sharding(FSDP2, _launched_fsdp().reshard_after_forward)
        del os.environ["ACCELERATE_USE_FSDP"]
    return _taken_over


def _launched_fsdp() -> FullyShardedDataParallelPlugin:
    asked = FullyShardedDataParallelPlugin()  # reads what the launcher has put into the environment
    if asked.fsdp_version != 2:
        raise ValueError(
            f"the accelerate configuration has fsdp_version {asked.fsdp_version}; choose 2, as accelerate/fsdp2.yaml "
            "of this package does"
        )
    offload = isinstance(asked.cpu_offload, CPUOffloadPolicy)
    for name, is_set, remedy in (
        ("fsdp_offload_params", offload, "for less memory start with ddp.yaml and model.quantization=4bit"),
        ("fsdp_activation_checkpointing", asked.activation_checkpointing, "set it in the recipe, under training"),
    ):
        if is_set:
            raise ValueError(f"the accelerate configuration has {name}, which is not supported: {remedy}")
    return asked


def shard_frozen(
    model: Fwd2BotForConditionalGeneration, device: torch.device, sharding: Sharding = Sharding()
) -> None:
    """Leave each process its part of the frozen weights of `divided_parameters`, on this kind of device.

    The weights of such a module are gathered when it runs, forward or backward. So all processes must run the model
    equally often, with pictures and without: see `ChunkedStep`.

    Raises:
        ValueError: in a run of one process, for a language model without a list of layers, or for adapters that
            ZeRO-3 cannot run.
    """
    if world_size() == 1:
        raise ValueError(
            f"{sharding.method} divides the backbone among processes, and this run has one. Start several: accelerate "
            f"launch --config_file {sharding.configuration} --num_processes N"
        )
    divided = divided_parameters(model, sharding)
    model.mark_trainable()
    if sharding.method == ZERO3:
        zero3.divide(model, list(divided), device)
    else:
        divide_by_fsdp2(model, divided, device, sharding.reshard_after_forward)
    # DDP, with which accelerate wraps the model, leaves these alone
    model._ddp_params_and_buffers_to_ignore = [name for name, value in model.named_parameters() if is_divided(value)]


def divide_by_fsdp2(
    model: Fwd2BotForConditionalGeneration,
    divided: dict[nn.Module, list[nn.Parameter]],
    device: torch.device,
    reshard_after_forward: bool,
) -> None:
    """`shard_frozen` by FSDP2, of modules and what is divided of each."""
    mesh = init_device_mesh(device.type, (world_size(),))
    of_tower = set(vision_layers(model))
    for module, parameters in divided.items():
        whole = set(module.parameters()) - set(parameters)
        reshard = reshard_after_forward or module in of_tower
        fully_shard(module, mesh=mesh, reshard_after_forward=reshard, ignored_params=whole)
    # Both passes run the base model. As the root of what is in it, it lets a module's weights come in while the one
    # before it still computes; it has no part of its own.
    base_model = model.backbone.base_model
    fully_shard(base_model, mesh=mesh, ignored_params=set(base_model.parameters()))
    allow_recording(base_model)  # whose class is another now
    fully_shard.state(base_model)._lazy_init()  # else whatever runs first would be the root, the embedding say


def divided_parameters(
    model: Fwd2BotForConditionalGeneration, sharding: Sharding = Sharding()
) -> dict[nn.Module, list[nn.Parameter]]:
    """What is divided of each of `divided_modules`: all but what Fwd2Bot adds, and scalars, which are refused.

    ZeRO-3 gathers by modules within these: of those that hold nothing else.
    """
    own = {id(value) for value in model.trained_parameters().values()}
    modules = divided_modules(model)
    if sharding.method == ZERO3:
        modules = [part for module in modules for part in zero3.frozen_parts(module, own)]
    return {
        module: [value for value in module.parameters() if id(value) not in own and value.ndim] for module in modules
    }


def divided_modules(model: Fwd2BotForConditionalGeneration) -> list[nn.Module]:
    """The modules whose frozen weights are divided, each of which is whole while it runs.

    The layers of the language model and of the vision tower, the token embeddings and the head; but for these two
    where they share their weight, since either may run without the other.

    Raises:
        ValueError: for a language model without a list of layers.
    """
    layers = language_layers(model, "start the run with ddp.yaml")
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = [] if head.weight is words.weight else [words, head]
    return [*vision_layers(model), *layers, *apart]


def language_layers(model: Fwd2BotForConditionalGeneration, remedy: str) -> nn.ModuleList:
    """The layers of the language model; ValueError with the remedy where it has no list of them."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise ValueError(f"{type(model.get_decoder()).__name__} has no list of layers; {remedy}")
    return layers


def vision_layers(model: Fwd2BotForConditionalGeneration) -> list[nn.Module]:
    """The layers outside of the language model: what stands in lists of modules there."""
    return list(_listed(model.backbone.base_model, model.get_decoder()))


def _listed(module: nn.Module, without: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if child is without:
            continue
        if isinstance(module, nn.ModuleList) and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _listed(child, without)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether weights of a model are divided among processes."""
    return any(is_divided(value) for value in model.parameters())


def is_divided(value: torch.Tensor) -> bool:
    """Whether a parameter is divided among processes."""
    return isinstance(value, DTensor) or zero3.is_divided(value)


def held_part(value: torch.Tensor) -> torch.Tensor:
    """What this process holds of a parameter."""
    if isinstance(value, DTensor):
        return value.to_local()
    return zero3.held_part(value) if zero3.is_divided(value) else value
