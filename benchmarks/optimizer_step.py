"""A step of `StackedMuon` beside one of `torch.optim.Muon`, on the matrices of Fwd2Bot: time, and operations.

    python benchmarks/optimizer_step.py [--rank 48] [--width 192] [--inner 512] [--layers 6] [--device cpu]

Down and up of two LoRA adapters in every linear layer of a Llama, and the projector; by default of the sizes of the
drawn world's recipe. In turn; the ratio is the median over repetitions. Operations are what torch dispatches.
"""

import argparse
import json
from typing import Any

import torch
from measuring import interleaved, machine, medians, ratio
from torch.utils._python_dispatch import TorchDispatchMode

from fwd2bot.training.muon import StackedMuon


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return function(*args, **(kwargs or {}))


def matrices(rank: int, width: int, inner: int, layers: int, device: str) -> list[torch.nn.Parameter]:
    """With gradients."""
    linear = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    shapes = [shape for into, out in linear for shape in ((rank, into), (out, rank))] * layers * 2 + [(width, width)]
    made = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=48)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--inner", type=int, default=512, help="width of the MLP (default: 512)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default: 1)")
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = (args.rank, args.width, args.inner, args.layers, args.device)
    ours, theirs = matrices(*sizes), matrices(*sizes)
    ways = {
        "StackedMuon": StackedMuon(ours, adjust_lr_fn="match_rms_adamw"),
        "torch.optim.Muon": torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw"),
    }
    seconds = interleaved({name: optimizer.step for name, optimizer in ways.items()}, args.repetitions)
    result: dict[str, Any] = {"matrices": len(ours)}
    result |= {f"{name}, ms": round(1000 * value, 1) for name, value in medians(seconds).items()}
    result["ratio"] = round(ratio(seconds, "torch.optim.Muon", "StackedMuon"), 1)
    for name, optimizer in ways.items():
        with Operations() as operations:
            optimizer.step()
        result[f"{name}, operations"] = operations.count
    print(json.dumps(result | vars(args) | machine(args)))


if __name__ == "__main__":
    main()
