"""Answering from a summary against three opponents: time to first token, decode, memory, cache.

    python benchmarks/answering.py [--size tiny|small|1b|7b] [--batches 1 8 32] [--ks 1 4 16 32] [--ways summary floor]
        [--output FILE.json]

- summary: `generate_from_summary` of a model loaded with `stage="generate"`, which has its adapter in the weights;
- apart: the same of a model loaded whole;
- floor: the bare language model's `generate` on as many tokens;
- uncompressed: the bare backbone's `generate` on all image tokens, pixels included;
- cached: the same with the keys and values of the picture kept ready, so that it reads only the question.

The time to the first token is that of an answer of one; decode is the time of a longer answer beyond it. In turn,
ratios are medians over repetitions. Memory is what torch allocates at most beyond weights and what is kept ready. Kept
for a picture: its summary, or its keys and values.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from measuring import (
    bare_backbone,
    bare_language_model,
    draw,
    drawn_pictures,
    interleaved,
    medians,
    parser_of,
    peak_memory,
    prompts,
    ratio,
    report,
    set_up,
    stages_of,
)

WAYS = ("summary", "apart", "floor", "uncompressed", "cached")


def cache_bytes(cache: Any) -> int:
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def runs_of(models: dict[str, Any], processor: Any, side: int, k: int, batch: int) -> tuple[dict[str, Any], int, int]:
    """For each way a function of the number of new tokens; length of the prompts; bytes of a picture's cache."""
    model, bare = models["apart"], models["uncompressed"]
    pictures = drawn_pictures(batch, side)
    images = processor.process_images(pictures).to(model.device, model.dtype)
    summary = model.compress(**images, num_summary_tokens=k)
    asked = prompts(processor, batch)
    inputs = processor(text=asked).to(model.device)
    length = inputs["input_ids"].shape[1] - 1 + k
    words = torch.randint(10, model.config.get_text_config().vocab_size, (batch, length), device=model.device)
    whole = processor.backbone_processor(
        images=[[one] for one in pictures], text=asked, return_tensors="pt", add_special_tokens=False
    ).to(model.device, model.dtype)
    ids = whole["input_ids"]
    until = int((ids[0] == model.image_token_id).nonzero().max()) + 1  # the picture's last token
    kept = bare(ids[:, :until], pixel_values=whole["pixel_values"], use_cache=True, logits_to_keep=1).past_key_values
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def options(new: int) -> dict[str, Any]:
        return {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}

    def from_cache(new: int) -> Any:
        cache = ready.pop() if ready else copy.deepcopy(kept)
        return bare.generate(**texts, past_key_values=cache, **options(new))

    ready: list[Any] = []
    runs: dict[str, Callable[[int], Any]] = {
        "summary": lambda new: models["summary"].generate_from_summary(summary, **inputs, **options(new)),
        "apart": lambda new: model.generate_from_summary(summary, **inputs, **options(new)),
        "floor": lambda new: models["floor"].generate(words, attention_mask=torch.ones_like(words), **options(new)),
        "uncompressed": lambda new: bare.generate(**whole, **options(new)),
        "cached": from_cache,
    }
    return (
        {"runs": runs, "fill": lambda count: ready.extend(copy.deepcopy(kept) for _ in range(count))},
        length,
        (cache_bytes(kept) // batch),
    )


def measure(models: dict[str, Any], processor: Any, side: int, k: int, batch: int, args: Any) -> dict[str, Any]:
    """A row of the table."""
    made, length, kept = runs_of(models, processor, side, k, batch)
    runs, new = {way: made["runs"][way] for way in args.ways}, args.new_tokens
    others = [way for way in args.ways if way not in ("summary", "apart")]
    made["fill"](args.repetitions + 2)
    first = interleaved({way: lambda run=run: run(1) for way, run in runs.items()}, args.repetitions)
    made["fill"](args.repetitions + 2)
    whole = interleaved({way: lambda run=run: run(1 + new) for way, run in runs.items()}, args.repetitions)
    start, all_of_it = medians(first), medians(whole)
    step = {way: (all_of_it[way] - start[way]) / new for way in args.ways}
    row: dict[str, Any] = {"batch": batch, "k": k, "tokens": length}
    row |= {f"first {way}, ms": 1000 * start[way] for way in args.ways}
    row |= {f"step {way}, ms": 1000 * step[way] for way in args.ways}
    row |= {f"first / {way}": ratio(first, "summary", way) for way in others}
    row |= {f"step / {way}": step["summary"] / step[way] for way in others}
    row["tokens/s"] = batch / step["summary"]
    row |= {f"MB {way}": peak_memory(lambda run=run: run(4)) / 1e6 for way, run in runs.items() if way != "apart"}
    width, size = models["apart"].summary_projector.out_features, models["apart"].dtype.itemsize
    return {**row, "kept summary, bytes": k * width * size, "kept cache, bytes": kept}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="sizes (default: 1 8 32)")
    parser.add_argument(
        "--ks", type=int, nargs="+", default=[1, 4, 16, 32], help="lengths of a summary, of those that"
    )
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="to compare (default: all)")
    parser.add_argument("--new-tokens", type=int, default=16, help="of which decode is the mean (default: 16)")
    args = parser.parse_args()
    if "summary" not in args.ways:
        parser.error("--ways must have summary, which the others are compared to")
    model, processor, side = set_up(args, max(args.ks))
    with torch.inference_mode():
        models = {"apart": model, "floor": bare_language_model(model), "uncompressed": bare_backbone(model)}
        [models["summary"]] = stages_of(model, "generate")
        ks = [k for k in args.ks if k <= model.config.num_summary_tokens]
        rows = [measure(models, processor, side, k, batch, args) for batch in args.batches for k in ks]
    report(args, rows)
    largest = [row for row in rows if row["k"] == ks[-1]]
    lines = {way: (args.batches, [row[f"first {way}, ms"] for row in largest]) for way in args.ways}
    draw(args, lines, f"prompts in a batch, k={ks[-1]}", "ms to the first token")


if __name__ == "__main__":
    main()
