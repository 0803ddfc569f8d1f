"""The last layer only where it is read: a pass that reads the end of its rows needs no more of that layer.

The last layer's keys and values are needed of all positions; its queries, its attention's output and its feed-forward
part only of those that are read, since nothing after them mixes positions. These parts are computed for the last
positions alone and padded with zeros in front, by hooks that do nothing outside of `only_last_positions`. So the
backbone's own code runs as it is. What stands at other positions after such a pass is meaningless.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp")  # each position by itself; a family may lack some of them

_reading = threading.local()


@contextmanager
def only_last_positions(count: int | None) -> Iterator[None]:
    """Run the block's passes of the calling thread for the last `count` positions of each row; `None` for all.

    Without gradients only: the recomputation of gradient checkpointing would run outside of the block. Not in training
    mode either: dropout would draw other masks than in a pass with gradients that repeats this one. A compiler sees
    the plain pass.
    """
    previous = getattr(_reading, "count", None)
    _reading.count = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else count
    try:
        yield
    finally:
        _reading.count = previous


def install_last_positions(decoder: nn.Module) -> None:
    """Put the hooks into the last layer of a language model; one that is built otherwise stays as it is."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return
    for name, module in layers[-1].named_modules():
        if name in PARTS:
            module.register_forward_pre_hook(_take_last)
            module.register_forward_hook(_pad_in_front)


def _take_last(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    count = getattr(_reading, "count", None)
    if count is None:
        return None
    _reading.left_out = 0
    if module.training or len(inputs) != 1 or inputs[0].ndim != 3 or inputs[0].shape[1] <= count:
        return None
    _reading.left_out = inputs[0].shape[1] - count
    return (inputs[0][:, -count:].contiguous(),)  # (N, L, d) -> (N, count, d); a mixture of experts takes a view of it


def _pad_in_front(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    if getattr(_reading, "count", None) is None or _reading.left_out == 0:
        return None
    if isinstance(output, tuple):  # of a mixture of experts, which also tells where it sent each position
        return (_pad_in_front(module, inputs, output[0]), *output[1:])
    if output.ndim == 2:  # rows of all positions, one below the other
        return _pad_in_front(module, inputs, output.unflatten(0, inputs[0].shape[:2])).flatten(0, 1)
    behind = (0, 0) * (output.ndim - 2)
    return F.pad(output, (*behind, _reading.left_out, 0))  # (N, count, ...) -> (N, L, ...)
