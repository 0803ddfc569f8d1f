"""The last layer only where it is read: a pass that reads the end of its rows needs no more of that layer.

The last layer's keys and values are needed of all positions; its queries, its attention's output and its feed-forward
part only of those that are read, since nothing after them mixes positions. Inside of `only_last_positions` these parts
are computed for the last positions alone and padded with zeros in front; the backbone's own code runs as it is. What
stands at other positions after such a pass is meaningless.
"""

from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .mixed_in_fwd2bot import RUNNING, MixedIn, during, mix_in

PARTS = ("self_attn.q_proj", "self_attn.o_proj", "mlp")  # each position by itself; a family may lack some of them


def only_last_positions(count: int | None) -> AbstractContextManager[None]:
    """Run a block's passes of the calling thread for the last `count` positions of each row; `None` for all.

    Without gradients only: the recomputation of gradient checkpointing would run outside of the block. Not in training
    mode either: dropout would draw other masks than in a pass with gradients that repeats this one. A compiler sees
    the plain pass.
    """
    return during(last=None if torch.is_grad_enabled() or torch.compiler.is_compiling() else count)


def install_last_positions(decoder: nn.Module) -> None:
    """Change these parts of the last layer of a language model; one that is built otherwise stays as it is."""
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        return
    for name, module in layers[-1].named_modules():
        if name in PARTS:
            with suppress(TypeError):  # a layer of quanto cannot change class, and computes all positions
                mix_in(LastPositions, module)


class LastPositions(MixedIn):
    """Mixed into a part of the last layer, which maps each position by itself."""

    prefix = "Last"

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        count = RUNNING.last
        if count is None or self.training or len(inputs) != 1 or inputs[0].ndim != 3 or inputs[0].shape[1] <= count:
            return super().forward(*inputs, **kwargs)
        num_rows, length = inputs[0].shape[:2]
        rows = inputs[0][:, -count:].contiguous()  # (N, count, d); a mixture of experts takes a view of it
        return _pad_in_front(super().forward(rows, **kwargs), num_rows, length - count)


def _pad_in_front(output: Any, num_rows: int, left_out: int) -> Any:
    if isinstance(output, tuple):  # of a mixture of experts, which also tells where it sent each position
        return (_pad_in_front(output[0], num_rows, left_out), *output[1:])
    if output.ndim == 2:  # rows of all positions, one below the other
        return _pad_in_front(output.unflatten(0, (num_rows, -1)), num_rows, left_out).flatten(0, 1)
    behind = (0, 0) * (output.ndim - 2)
    return F.pad(output, (*behind, left_out, 0))  # (N, count, ...) -> (N, L, ...)
