"""A run of Fwd2BotTrainer on a tiny model and samples of real shape; also the program of the processes of such a run.

`python sample_run.py '{"output_dir": ..., "batch": 4, ...}'` writes the losses of each step to `losses.json`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # for tiny

import chunked_batches as made
import tiny
import torch

from fwd2bot.training.recipe import OptimizerRecipe
from fwd2bot.training.sharding import Sharding, shard_frozen
from fwd2bot.training.train import training_arguments
from fwd2bot.training.trainer import Fwd2BotTrainer

SAMPLES = 48


class Samples(torch.utils.data.Dataset):
    """Sample i has picture i; runs of eight have no conversation, or no caption, for some of them."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        kind = (index // 4) % 4  # four in a row: on two processes of four samples one has other kinds than the other
        return {
            "index": index,
            "talks": kind != 1 or index % 4 == 0 and index > 24,
            "captions": [] if kind == 2 else [made.CAPTIONS[index % len(made.CAPTIONS)]] * (1 + index % 2),
        }


class Collator:
    """What the collator of real data gives, on these samples."""

    def __init__(self, chunk: int | None):
        self.processor, self.chunk = tiny.tiny_processor(), chunk
        self.drawn = tiny.pictures(SAMPLES)

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        size = self.chunk or len(samples)
        parts = [samples[first : first + size] for first in range(0, len(samples), size)]
        chunks = [
            made.conversation_chunk(
                self.processor, self.drawn, [one["index"] for one in part], [one["talks"] for one in part]
            )
            for part in parts
        ]
        captions = [caption for sample in samples for caption in sample["captions"]]
        owner = [row for row, sample in enumerate(samples) for _ in sample["captions"]]
        pieces = [captions[i : i + size] for i in range(0, len(captions), size)]
        return {
            "chunks": chunks,
            "text_chunks": [dict(self.processor.process_texts(piece)) for piece in pieces],
            "text_image": torch.tensor(owner, dtype=torch.long),
            "text_image_mask": torch.ones(len(samples), len(captions), dtype=torch.bool),
            "text_group": torch.tensor([made.CAPTIONS.index(caption) for caption in captions], dtype=torch.long),
            "image_group": torch.tensor([sample["index"] for sample in samples]),
        }


class InOrder(Fwd2BotTrainer):
    """Does not shuffle, so that the kinds of samples stay together."""

    def _get_train_sampler(self, *args: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def build(
    output_dir: str,
    batch: int,
    steps: int,
    chunk: int | None = None,
    accumulation: int = 1,
    optimizer: str = "adamw",
    shard: str | None = None,
    freeze: Sequence[str] = (),
    **training: Any,
) -> Fwd2BotTrainer:
    values = {
        "output_dir": output_dir,
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 5,
        **training,
    }
    model = tiny.tiny_fwd2bot(summary_lengths=[1, 2, 4])
    arguments = training_arguments(values)
    if shard:
        shard_frozen(model, arguments.device, Sharding(shard))
    return InOrder(
        model,
        arguments,
        train_dataset=Samples(),
        data_collator=Collator(chunk),
        processing_class=tiny.tiny_processor(),
        optimizer_recipe=OptimizerRecipe(name=optimizer, learning_rate=0.003, matrix_learning_rate=0.003),
        freeze=freeze,
    )


def losses(trainer: Fwd2BotTrainer) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "autoregressive_loss", "contrastive_loss", "temperature", "num_summary_tokens")
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{name: entry[name] for name in names if name in entry} for entry in logs]


def run(resume: bool = False, save_final: bool = False, **settings: Any) -> list[dict[str, float]]:
    trainer = build(**settings)
    trainer.train(resume_from_checkpoint=resume or None)
    if trainer.is_world_process_zero():
        folder = Path(settings["output_dir"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "losses.json").write_text(json.dumps(losses(trainer)), encoding="utf-8")
    if save_final:
        trainer.save_final(Path(settings["output_dir"]) / "final")
    return losses(trainer)


if __name__ == "__main__":
    run(**json.loads(sys.argv[1]))
