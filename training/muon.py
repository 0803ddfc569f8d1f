"""Muon that takes matrices of one shape together."""

from collections import defaultdict
from collections.abc import Callable

import torch

TOGETHER = 2**24  # numbers in a stack of several matrices; it and what is computed of it are some 350 MB in float32


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon` on stacks of matrices, and in float32 on the CPU.

    torch's takes one matrix after the other, in bfloat16. LoRA has many small ones, which are some thousand operations
    a step, and on a CPU without bfloat16 units ten times the time (`benchmarks/optimizer_step.py`). Options, state and
    checkpoints are torch's own; so are the steps on an accelerator. On the CPU they are more precise: bfloat16 changes
    an update by some percent, and more where the gradient's singular values are far apart.

    Muon: https://kellerjordan.github.io/posts/muon/
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            rate, momentum = float(group["lr"]), group["momentum"]
            for matrices in _of_one_shape(group["params"]):
                gradients = [matrix.grad for matrix in matrices]
                moments = [self._moment(matrix) for matrix in matrices]
                torch._foreach_lerp_(moments, gradients, 1 - momentum)
                updates = torch._foreach_lerp(gradients, moments, momentum) if group["nesterov"] else moments
                stack = _orthogonal(
                    torch.stack(updates), group["ns_coefficients"], group["ns_steps"], group["eps"]
                ).to(matrices[0].dtype)
                torch._foreach_mul_(matrices, 1 - rate * group["weight_decay"])
                torch._foreach_add_(
                    matrices, stack.unbind(), alpha=-rate * _scale(stack.shape[1:], group["adjust_lr_fn"])
                )
        return loss

    def _moment(self, matrix: torch.Tensor) -> torch.Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix.grad)
        return state["momentum_buffer"]


def _of_one_shape(matrices: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Those that have a gradient, in parts that can be stacked: of at most `TOGETHER` numbers, or of one matrix."""
    alike = defaultdict(list)
    for matrix in matrices:
        if matrix.grad is not None and matrix.numel():
            alike[matrix.shape, matrix.dtype, matrix.grad.dtype, matrix.device].append(matrix)
    parts = []
    for same in alike.values():
        count = max(1, TOGETHER // same[0].numel())
        parts += [same[first : first + count] for first in range(0, len(same), count)]
    return parts


def _orthogonal(
    stack: torch.Tensor, coefficients: tuple[float, float, float], steps: int, epsilon: float
) -> torch.Tensor:
    """Each of the matrices (N, rows, columns) with singular values near 1, by the quintic Newton-Schulz iteration."""
    tall = stack.shape[1] > stack.shape[2]
    a, b, c = coefficients
    found = (stack.mT if tall else stack).to(_precision(stack.device))
    found = found / torch.linalg.matrix_norm(found, keepdim=True).clamp(min=epsilon)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return (found.mT if tall else found).contiguous()  # else the addition is one matrix after the other again


def _precision(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _scale(shape: torch.Size, adjust_lr_fn: str | None) -> float:
    """What the learning rate of a matrix is multiplied by, as torch's Muon has it."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1, rows / columns) ** 0.5
