"""The frozen weights of the backbone divided among the processes (FSDP2), what trains whole on each of them.

Adapters, queries and projector are small: every process keeps them, their gradients and their optimiser state, as with
DDP. So any optimiser will do, and checkpoints hold the adapters alone, as those of a quantised backbone.

`accelerate launch` asks for it, with a configuration of FSDP2. accelerate's own wrapper is not used: it divides every
parameter, scalars among them, which FSDP2 does not take, and works for `forward` alone, where a step here also calls
`contrastive_loss` and `generate`. On a CPU accelerate passes over such a configuration without a word.
"""

import os
from collections.abc import Iterator

import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from fwd2bot import Fwd2BotForConditionalGeneration
from fwd2bot.pickling_fwd2bot import allow_recording

from .gathering import world_size

_taken_over: FullyShardedDataParallelPlugin | None = None  # for every run that this process builds


def take_over_sharding() -> FullyShardedDataParallelPlugin | None:
    """What `accelerate launch` asks of FSDP, which accelerate then leaves to `shard_frozen`; None: nothing.

    accelerate and transformers go by an entry of the environment, which is taken out; what it asked is kept for every
    later call in the process.

    Raises:
        ValueError: for DeepSpeed, FSDP1, and a setting that would have no effect.
    """
    global _taken_over
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ValueError(
            "the accelerate configuration asks for DeepSpeed, which this trainer cannot save, resume or step with. "
            "accelerate/fsdp2.yaml of this package divides the frozen weights among the processes"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return _taken_over
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
    del os.environ["ACCELERATE_USE_FSDP"]
    _taken_over = asked
    return asked


def shard_frozen(
    model: Fwd2BotForConditionalGeneration, device: torch.device, reshard_after_forward: bool = True
) -> None:
    """Leave each process its part of the frozen weights of `divided_modules`, on this kind of device.

    The weights of such a module are gathered when it runs, forward or backward. So all processes must run the model
    equally often, with pictures and without: see `ChunkedStep`.

    Args:
        reshard_after_forward: whether a decoder layer's weights are given up between its forward and its backward
            pass. Those of the vision tower always are: it has no backward pass.

    Raises:
        ValueError: in a run of one process, or for a language model without a list of layers.
    """
    if world_size() == 1:
        raise ValueError(
            "FSDP2 divides the backbone among processes, and this run has one. Start several: accelerate launch "
            "--config_file fsdp2.yaml --num_processes N"
        )
    divided = divided_parameters(model)
    model.mark_trainable()
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
    # DDP, with which accelerate wraps the model, leaves these alone
    model._ddp_params_and_buffers_to_ignore = [
        name for name, value in model.named_parameters() if isinstance(value, DTensor)
    ]


def divided_parameters(model: Fwd2BotForConditionalGeneration) -> dict[nn.Module, list[nn.Parameter]]:
    """What is divided of each of `divided_modules`: all but what Fwd2Bot adds, and scalars, which FSDP2 refuses."""
    own = {id(value) for value in model.trained_parameters().values()}
    return {
        module: [value for value in module.parameters() if id(value) not in own and value.ndim]
        for module in divided_modules(model)
    }


def divided_modules(model: Fwd2BotForConditionalGeneration) -> list[nn.Module]:
    """The modules whose frozen weights FSDP2 divides, each of which is whole while it runs.

    The layers of the language model and of the vision tower, the token embeddings and the head; but for these two
    where they share their weight, since either may run without the other.

    Raises:
        ValueError: for a language model without a list of layers.
    """
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        name = type(model.get_decoder()).__name__
        raise ValueError(f"{name} has no list of layers to shard; start the run with ddp.yaml")
    words, head = model.get_input_embeddings(), model.get_output_embeddings()
    apart = [] if head.weight is words.weight else [words, head]
    return [*vision_layers(model), *layers, *apart]


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
    return any(isinstance(value, DTensor) for value in model.parameters())
