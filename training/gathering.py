"""What the processes of a run hand each other: rows of tensors, of which each has its own number, and gradients."""

from collections.abc import Iterable

import torch
import torch.distributed as dist


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_counts(counts: list[int], device: torch.device) -> torch.Tensor:
    """`(W, C)` the same C counts of each of the W processes, on the CPU."""
    own = torch.tensor(counts, device=device)
    if world_size() == 1:
        return own[None].cpu()
    found = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(found, own)
    return torch.stack(found).cpu()


def all_agree(yes: bool, device: torch.device) -> bool:
    """Whether every process says yes."""
    return bool(gather_counts([int(yes)], device).all())


def gather_rows(rows: torch.Tensor, counts: torch.Tensor) -> list[torch.Tensor]:
    """The rows `(n_w, ...)` of every process w, in order; without gradients.

    Args:
        rows: `(n, ...)` of this process; all but n is the same everywhere.
        counts: `(W,)` the n of each process.
    """
    if world_size() == 1:
        return [rows]
    padded = rows.new_zeros((int(counts.max()), *rows.shape[1:]))
    padded[: len(rows)] = rows
    # bool is not taken by every backend
    sent = padded.to(torch.uint8) if rows.dtype == torch.bool else padded
    found = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(found, sent.contiguous())
    return [each[:count].to(rows.dtype) for each, count in zip(found, counts.tolist(), strict=True)]


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Put into `grad` the mean over the processes, where one without a gradient counts as zero.

    A parameter that no process has used keeps none, so that an optimiser passes over it, as in a run of one process.
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    used = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.uint8)
    used = used.to(trained[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    by_dtype: dict[torch.dtype, list[torch.nn.Parameter]] = {}
    for parameter, is_used in zip(trained, used.tolist(), strict=True):
        if is_used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for group in by_dtype.values():
        flat = torch.cat([parameter.grad.flatten() for parameter in group])
        dist.all_reduce(flat)
        pieces = (flat / world_size()).split([parameter.numel() for parameter in group])
        for parameter, piece in zip(group, pieces, strict=True):
            parameter.grad.copy_(piece.view_as(parameter))
