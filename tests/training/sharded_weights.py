"""The program of processes that divide a tiny model: `sharded_weights.py METHOD FILE` writes what the first one holds.

And what it keeps for a backward pass, and what is gathered during a step and after it.
"""

import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tiny

import sample_run
import tiny
import torch

from fwd2bot.training.estimates import divided_weights, one_step
from fwd2bot.training.gathering import rank
from fwd2bot.training.sharding import Sharding, divided_parameters, held_part, is_divided
from fwd2bot.training.zero3 import is_divided as is_zero3

PROCESSES = 2


def step(method: str | None, checkpointing: bool) -> tuple[torch.nn.Module, int, int]:
    """A model after a step, the bytes kept for its backward pass, and what ZeRO-3 had gathered of weights at most."""
    options = {"batch": 4, "steps": 1, "shard": method, tiny.CHECKPOINTING: checkpointing}
    with tempfile.TemporaryDirectory() as folder:
        trainer = sample_run.build(folder, **options)
    trainer.create_optimizer()
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    kept, gathered = one_step(trainer, batch)[1], []

    def look(tensor: torch.Tensor) -> torch.Tensor:  # whenever autograd keeps something, or takes it up again
        here = (value for value in trainer.model.parameters() if is_zero3(value))
        gathered.append(sum(value.numel() * value.element_size() for value in here))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, look):
        trainer.training_step(trainer.model, batch)
    return trainer.model, kept, max(gathered)


if __name__ == "__main__":
    method, file = sys.argv[1:]
    whole = tiny.tiny_fwd2bot(summary_lengths=[1, 2, 4])
    estimate = divided_weights(whole, PROCESSES, Sharding(method))
    parts = divided_parameters(whole, Sharding(method)).values()
    divided = {id(value) for part in parts for value in part}
    expected_whole = [name for name, value in whole.named_parameters() if id(value) not in divided]
    plain = [step(None, checkpointing) for checkpointing in (False, True)]
    shared = [step(method, checkpointing) for checkpointing in (False, True)]
    model = shared[1][0]
    if rank() == 0:
        held = [held_part(value) for value in model.parameters()]
        told = {
            "held": sum(value.numel() * value.element_size() for value in held),
            "whole": [name for name, value in model.named_parameters() if not is_divided(value)],
            "left": [name for name, value in model.named_parameters() if is_zero3(value) and value.numel()],
            "estimate": asdict(estimate),
            "expected_whole": expected_whole,
            "kept": [kept for _, kept, _ in plain],
            "kept_sharded": [kept for _, kept, _ in shared],
            "gathered": max(gathered for _, _, gathered in shared),
        }
        Path(file).write_text(json.dumps(told))
    torch.distributed.destroy_process_group()
