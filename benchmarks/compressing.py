"""Compressing against the bare backbone's prefill on the same tokens: pictures per second and memory.

    python benchmarks/compressing.py [--size tiny|small|1b|7b] [--batches 1 8] [--k 16] [--output FILE.json]

- one stage: `compress` of a model loaded with `stage="compress"`, which has its adapter in the weights;
- adapters apart: the same of a model loaded whole;
- bare prefill: the backbone as transformers has it, on rows of the same length, `logits_to_keep=1`, no cache. This is
  the floor: what the model takes to read the picture at all;
- vision: of that, tower and connector.

All in turn, on tensors that are ready; ratios are medians over repetitions. Memory is what torch allocates at most
beyond the weights.
"""

from typing import Any

import torch
from measuring import (
    bare_backbone,
    draw,
    drawn_pictures,
    interleaved,
    medians,
    parser_of,
    peak_memory,
    ratio,
    report,
    set_up,
    stages_of,
)


def measure(model: Any, processor: Any, side: int, k: int, batch: int, repetitions: int) -> dict[str, Any]:
    """A row of the table."""
    inputs = processor.process_images(drawn_pictures(batch, side)).to(model.device, model.dtype)
    [alone], bare = stages_of(model, "compress"), bare_backbone(model)
    words = torch.full((batch, k), 5, device=model.device)
    ids = torch.cat([inputs["input_ids"], words], 1)
    row = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}
    runs = {
        "one stage": lambda: alone.compress(**inputs, num_summary_tokens=k),
        "adapters apart": lambda: model.compress(**inputs, num_summary_tokens=k),
        "bare prefill": lambda: bare(**row, logits_to_keep=1, use_cache=False),
        "vision": lambda: bare.base_model.get_image_features(pixel_values=row["pixel_values"]),
    }
    seconds = interleaved(runs, repetitions)
    found = medians(seconds)
    return {
        "batch": batch,
        "tokens": ids.shape[1],
        **{f"{name}, ms": 1000 * value for name, value in found.items()},
        "pictures/s": batch / found["one stage"],
        "one stage / bare": ratio(seconds, "one stage", "bare prefill"),
        "apart / bare": ratio(seconds, "adapters apart", "bare prefill"),
        "MB, one stage": peak_memory(runs["one stage"]) / 1e6,
        "MB, bare": peak_memory(runs["bare prefill"]) / 1e6,
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="sizes (default: 1 8)")
    parser.add_argument("--k", type=int, default=8, help="length of the summaries (default: 8)")
    args = parser.parse_args()
    model, processor, side = set_up(args)
    with torch.inference_mode():
        rows = [measure(model, processor, side, args.k, batch, args.repetitions) for batch in args.batches]
    report(args, rows)
    names = ("one stage, ms", "adapters apart, ms", "bare prefill, ms")
    draw(args, {name: (args.batches, [row[name] for row in rows]) for name in names}, "pictures in a batch", "ms")


if __name__ == "__main__":
    main()
