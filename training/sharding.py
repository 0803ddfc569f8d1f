"""The frozen weights of the language model's layers over the processes (FSDP2), what trains whole on each of them.

Adapters, queries and projector are small: every process keeps them, their gradients and their optimiser state, as with
DDP. So any optimiser will do, and checkpoints hold the adapters alone, as those of a quantised backbone.
"""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fwd2bot import Fwd2BotForConditionalGeneration

from .gathering import world_size


def shard_frozen(model: Fwd2BotForConditionalGeneration, device: torch.device) -> None:
    """Leave each process its part of the frozen weights of every decoder layer, on this kind of device.

    A layer's weights are gathered when it runs, forward or backward. So all processes must run the model equally
    often: see `ChunkedStep`.

    Raises:
        ValueError: in a run of one process, or for a language model without a list of layers.
    """
    if world_size() == 1:
        raise ValueError(
            "model.shard divides the backbone among processes, and this run has one. Start several with accelerate "
            "launch, or leave it out"
        )
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        raise ValueError(f"{type(model.get_decoder()).__name__} has no list of layers to shard; leave model.shard out")
    model.mark_trainable()
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params={value for value in layer.parameters() if value.requires_grad})
    # DDP, with which accelerate wraps the model, leaves these alone
    model._ddp_params_and_buffers_to_ignore = [
        name for name, value in model.named_parameters() if isinstance(value, DTensor)
    ]


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether weights of a model are divided among processes."""
    return any(isinstance(value, DTensor) for value in model.parameters())
