"""The program of processes that divide a tiny model: `sharded_weights.py FILE` writes what the first one holds."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tiny

import tiny
import torch
from torch.distributed.tensor import DTensor

from fwd2bot.training.estimates import divided_weights
from fwd2bot.training.gathering import rank, world_size
from fwd2bot.training.sharding import shard_frozen

if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    model = tiny.tiny_fwd2bot()
    estimate = divided_weights(model, world_size())
    shard_frozen(model, torch.device("cpu"))
    own = [(value.to_local() if isinstance(value, DTensor) else value) for value in model.parameters()]
    if rank() == 0:
        held = sum(value.numel() * value.element_size() for value in own)
        names = [name for name, value in model.named_parameters() if not isinstance(value, DTensor)]
        Path(sys.argv[1]).write_text(json.dumps({"held": held, "whole": names, "estimate": asdict(estimate)}))
    torch.distributed.destroy_process_group()
