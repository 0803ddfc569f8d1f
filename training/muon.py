"""Muon that takes matrices of one shape together."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch

TOGETHER = 2**26  # numbers of the matrices that are orthogonalised at once, so that memory stays bounded


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon` with the scale `match_rms_adamw`, on stacks of matrices, and in float32 on the CPU.

    torch's takes one matrix after the other, in bfloat16. LoRA has many small ones: for the 140 of the drawn world's
    recipe that is 4,062 operations a step, here 215, and on a CPU without bfloat16 units ten times as long
    (benchmarks/optimizer_step.py). Options, state and checkpoints are torch's own, and so are the steps, to the
    rounding of bfloat16.

    Muon: https://kellerjordan.github.io/posts/muon/; the scale that lets it share AdamW's learning rates is from
    https://arxiv.org/abs/2502.16982.

    Args:
        params: matrices, or groups of them, as plain tensors.
        options: those of `torch.optim.Muon` but for `adjust_lr_fn`.
    """

    def __init__(self, params: Iterable[Any], **options: Any):
        super().__init__(params, adjust_lr_fn="match_rms_adamw", **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
            if not matrices:
                continue
            gradients = [matrix.grad for matrix in matrices]
            for matrix in matrices:
                if "momentum_buffer" not in self.state[matrix]:
                    self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix.grad)
            moments = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
            torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])
            updates = torch._foreach_lerp(gradients, moments, group["momentum"]) if group["nesterov"] else moments
            if group["weight_decay"]:
                torch._foreach_mul_(matrices, 1 - float(group["lr"]) * group["weight_decay"])
            for part in _of_one_shape(matrices):
                stack = torch.stack([updates[index] for index in part])
                stack = _orthogonal(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
                rate = float(group["lr"]) * 0.2 * max(stack.shape[1:]) ** 0.5
                chosen = [matrices[index] for index in part]
                torch._foreach_add_(chosen, stack.to(chosen[0].dtype).unbind(), alpha=-rate)
        return loss


def _of_one_shape(matrices: list[torch.Tensor]) -> list[list[int]]:
    """Indices of matrices that can be stacked, at most `TOGETHER` numbers in a part (or one matrix)."""
    alike = defaultdict(list)
    for index, matrix in enumerate(matrices):
        alike[matrix.shape, matrix.dtype, matrix.device].append(index)
    parts = []
    for (shape, _, _), indices in alike.items():
        count = max(1, TOGETHER // shape.numel())
        parts += [indices[first : first + count] for first in range(0, len(indices), count)]
    return parts


def _orthogonal(
    stack: torch.Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> torch.Tensor:
    """Each of the matrices (N, rows, columns) with singular values near 1, by the quintic Newton-Schulz iteration."""
    tall = stack.shape[1] > stack.shape[2]
    a, b, c = coefficients
    found = (stack.mT if tall else stack).to(torch.float32 if stack.device.type == "cpu" else torch.bfloat16)
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return (found.mT if tall else found).contiguous()
