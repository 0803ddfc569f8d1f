"""Frozen weights divided by DeepSpeed's ZeRO-3, without its engine: its partitions and the hooks that gather them.

What ZeRO-Inference does for a model that has no optimiser. Nothing here imports DeepSpeed before weights are divided;
accelerate may, where it is installed. From then on DeepSpeed replaces `torch.nn.functional.linear`, since torch's own
would keep a gathered weight until the backward pass.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fwd2bot import Fwd2BotForConditionalGeneration

# Arguments of a LoRA by which it reads the weight that it is added to, which is gathered only for that module's run.
READS_ITS_BASE = ("use_dora", "target_parameters")
# Of torch's checkpointing: a weight that a recomputed pass has saved is given up again before shapes are compared, and
# a recomputation that ends within a module would leave that module's weights gathered.
RECOMPUTATION = {"use_reentrant": False, "determinism_check": "none", "early_stop": False}
# In language models with a recurrent state the layer reads their weights, and does not run them.
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def check_launched() -> None:
    """Raise `ValueError` for what `accelerate launch` asks of DeepSpeed and this trainer has not; see `sharding`.

    Raises:
        ImportError: DeepSpeed is not installed.
    """
    asked = {
        name: os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", default)
        for name, default in (
            ("zero_stage", "3"),
            ("config_file", "none"),
            ("offload_param_device", "none"),
            ("offload_optimizer_device", "none"),
        )
    }
    if asked.pop("zero_stage") != "3":
        raise ValueError(
            f"the accelerate configuration has zero_stage {os.environ['ACCELERATE_DEEPSPEED_ZERO_STAGE']}; choose 3, "
            "as accelerate/zero3.yaml of this package does. What stages 1 and 2 divide is small here: adapters train"
        )
    for name, value in asked.items():
        if value.lower() != "none":
            raise ValueError(
                f"the accelerate configuration has {name} {value} for DeepSpeed, which is not supported: leave it "
                "out, as accelerate/zero3.yaml of this package does"
            )
    if find_spec("deepspeed") is None:
        raise ImportError("zero3.yaml needs DeepSpeed: pip install 'fwd2bot[deepspeed]'; or start with fsdp2.yaml")


def frozen_parts(module: nn.Module, trained: set[int]) -> Iterator[nn.Module]:
    """The largest modules within one of which nothing trains; DeepSpeed gathers all that a module has, or nothing.

    Args:
        trained: the `id` of each parameter that trains.
    """
    parameters, is_list = list(module.parameters()), isinstance(module, nn.ModuleList)  # which itself never runs
    if parameters and not is_list and all(value.ndim and id(value) not in trained for value in parameters):
        if not isinstance(module, CONVOLUTIONS):
            yield module
        return
    for child in module.children():
        yield from frozen_parts(child, trained)


def divide(model: Fwd2BotForConditionalGeneration, parts: list[nn.Module], device: torch.device) -> None:
    """Leave each process its part of the weights of some modules, each of which is gathered as one when it runs.

    Args:
        parts: none within another, of none a weight trains.

    Raises:
        ValueError: for adapters that read a weight of the backbone while its module does not run, or a DeepSpeed that
            computes elsewhere.
    """
    for stage, arguments in model.config.adapters.items():
        for name in READS_ITS_BASE:
            if arguments.get(name):
                raise ValueError(f"the adapter {stage} has {name}, which cannot be with ZeRO-3; start with fsdp2.yaml")
    _choose_device(device)
    import deepspeed
    from deepspeed.runtime.zero import DeepSpeedZeRoOffload
    from deepspeed.utils import set_z3_leaf_module

    deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)
    for module in parts:
        set_z3_leaf_module(module, True)
    hooks = DeepSpeedZeRoOffload(
        nn.ModuleList(parts),
        timers=None,
        ds_config={"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}},
        param_persistence_threshold=0,
    )

    def give_up_after(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Once a layer's backward pass is over. DeepSpeed's hooks miss it where two passes share one backward pass."""
        hidden_states = args[0] if args else kwargs["hidden_states"]
        if hidden_states.requires_grad:
            hidden_states.register_hook(lambda gradient: hooks.release_backward_leftovers())

    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(give_up_after, with_kwargs=True)


def _choose_device(device: torch.device) -> None:
    """Have DeepSpeed compute on this kind of device, which it chooses once, when it is first imported."""
    before = os.environ.get("DS_ACCELERATOR")
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    try:
        from deepspeed.accelerator import get_accelerator

        chosen = get_accelerator().device_name()
    finally:
        if before is None:
            del os.environ["DS_ACCELERATOR"]
    if chosen != device.type:
        raise ValueError(
            f"DeepSpeed computes on {chosen}, as {'DS_ACCELERATOR says' if before else 'it chose when imported'}, and "
            f"this run on {device.type}. Start it with DS_ACCELERATOR={device.type} in the environment"
        )


def is_divided(value: torch.Tensor) -> bool:
    """Whether DeepSpeed has divided a parameter."""
    return getattr(value, "ds_tensor", None) is not None


def held_part(value: torch.Tensor) -> torch.Tensor:
    """What this process holds of a divided parameter."""
    return value.ds_tensor


def whole_size(value: torch.Tensor) -> int:
    """Elements of a parameter, whether it is divided or not."""
    return value.ds_numel if is_divided(value) else value.numel()
