"""A step of `StackedMuon` beside one of `torch.optim.Muon`, on the matrices of two LoRA adapters.

    python benchmarks/optimizer_step.py [--rank 48] [--width 192] [--inner 512] [--layers 5] [--device cpu]

The sizes are by default those of the drawn world's recipe. In turn, medians; the ratio is the median over repetitions.
"""

import argparse
import json
import platform
import statistics
import time

import torch

from fwd2bot.training.muon import StackedMuon


def matrices(rank: int, width: int, inner: int, layers: int, device: str) -> list[torch.nn.Parameter]:
    """Down and up of every linear layer of a Llama, for two stages, with gradients."""
    linear = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    shapes = [shape for into, out in linear for shape in ((rank, into), (out, rank))] * layers * 2
    made = [torch.nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def seconds(optimizer: torch.optim.Optimizer, device: str) -> float:
    start = time.perf_counter()
    optimizer.step()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=48)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--inner", type=int, default=512, help="width of the MLP (default: 512)")
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU (default: 1)")
    parser.add_argument("--repetitions", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = (args.rank, args.width, args.inner, args.layers, args.device)
    ways = {
        "StackedMuon": StackedMuon(matrices(*sizes)),
        "torch.optim.Muon": torch.optim.Muon(matrices(*sizes), adjust_lr_fn="match_rms_adamw"),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(args.repetitions + 1):
        for name, optimizer in ways.items():
            taken = seconds(optimizer, args.device)
            if repetition:  # the first warms up
                found[name].append(taken)
    ratio = statistics.median(b / a for a, b in zip(*found.values(), strict=True))
    result = {f"{name}, ms": round(1000 * statistics.median(times), 1) for name, times in found.items()}
    result |= {"ratio": round(ratio, 1), "matrices": len(matrices(*sizes)), "threads": args.threads}
    result |= {"device": torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()}
    print(json.dumps(result | {"torch": torch.__version__}))


if __name__ == "__main__":
    main()
